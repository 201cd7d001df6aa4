"""Makes noise-sample pairs of a teacher, in shards that `datamodules.pairs.PairsDataModule` trains on.

    python tools/make_pairs.py --config configs/digits/pairs.yaml --out data/pairs/digits
    python tools/make_pairs.py --config configs/sd15/pairs.yaml --out data/pairs/sd15 --of 64 --shard 3

The config says of which teacher, by which sampler, guidance and data; further ``--a.b=c`` change it. Without ``--shard`` all
shards are made in turn. A finished shard is not made again, a half one leaves nothing: start the same command again. Pairs are
drawn in the same whole batches however many shards there are: on one kind of machine, ``--of`` changes no bit of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from jsonargparse import ActionConfigFile, Namespace, set_parsing_settings
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from tqdm import tqdm

from datamodules.members import to_npy, to_png
from datamodules.ordered import OrderedDataModule
from datamodules.pairs import noise_hash
from datamodules.shard_writing import check_finite, save_shard, shared_null, unfinished_shards
from datamodules.shards import EMBEDDINGS, FORMAT, OWN_NULL
from distill.checkpoints import atomic_writer
from distill.cli import EXPECTED_WARNINGS, Parser, import_parts
from distill.denoiser import Denoiser
from distill.metrics.features import to_uint8
from distill.noise_pairs import NoisePairs
from distill.pretrained import identity_of
from distill.space import check_fit
from distill.types import Batch, Cond, DataSpec, label_conditions

NOT_THE_SAMPLES = ("batch_size", "num_workers", "seed", "batches_per_epoch", "eval_samples", "eval_batch_size", "verify")
PAIRS_OWN_NULL = (*OWN_NULL, "guidance")
SETTINGS = ("sampler", "steps", "guidance", "guidance_range", "anchored", "seed", "invert", "store", "dtype", "embeddings")
"""The keys of a config that a header holds as they are."""


# ------------------------------------------------------------------------------------------------------------ command line


@dataclass
class Shards:
    """Which pairs are made, and how they are stored.

    Attributes:
        out: folder of the shards.
        data: whose conditions the pairs have, those of its training samples in turn; null for the teacher's classes in turn.
        prompts: a text file, a prompt a line, taken in turn instead of what the data says.
        count: number of pairs; null for as many as the data has training samples, or the file lines.
        store: ``array`` for samples in model space, ``png`` for pixels in 8 bits.
        dtype: of samples that are stored as arrays.
        embeddings: how encoded prompts are stored beside their text; null to store the text alone, to be encoded in training.
        of: number of shards in all.
        shard: the one to make, 0 to OF - 1 (an array task's number); null for all.
        batch_size: pairs drawn at once.
        device: where to compute; null for the GPU, if there is one.

    Raises:
        ValueError: a number out of its range.
    """

    out: str
    data: OrderedDataModule | None = None
    prompts: str | None = None
    count: int | None = None
    store: Literal["array", "png"] = "array"
    dtype: Literal["float32", "float16"] = "float32"
    embeddings: Literal["float32", "float16"] | None = None
    of: int = 1
    shard: int | None = None
    device: str | None = None
    batch_size: int = 500

    def __post_init__(self) -> None:
        for key in ("count", "of", "batch_size"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value}: give at least 1.")
        if self.shard is not None and not 0 <= self.shard < self.of:
            raise ValueError(f"--shard={self.shard}: give 0 to {self.of - 1}, there are {self.of} shards (--of).")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def read_command(argv: list[str] | None) -> tuple[Namespace, Parser]:
    """What the config and the command line say; exits with 2 on what they cannot."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    import_parts()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = Parser(description=__doc__, parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile, help="a file of these keys; may be given repeatedly")
    parser.add_class_arguments(NoisePairs, sub_configs=True)
    parser.add_class_arguments(Shards, sub_configs=True, skip={"batch_size"})
    parser.add_argument("--batch-size", type=int, default=500, help="pairs drawn at once")
    return parser.parse_args(argv), parser


def plain(value: Any) -> Any:
    """A setting as JSON has it, without the places of the files that it was read from."""
    if isinstance(value, Namespace | dict):
        parts = (vars(value) if isinstance(value, Namespace) else value).items()
        return {str(key): plain(part) for key, part in parts if not str(key).startswith("__")}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


# --------------------------------------------------------------------------------------------------------- what they show


class Requests:
    """What each pair is to show: ``requests[numbers]`` is a batch of conditions and prompts, with samples only to be inverted.

    Args:
        pairs: by what they are drawn.
        shards: which they are.
        settings: of the data, for the header.

    Attributes:
        spec: what the batches are; without data, ``shape`` is that of samples in model space.
        record: where they come from, for the header.
        count: number of pairs.

    Raises:
        ValueError: no prompts in the file, no data where it is needed, a number of pairs that contradicts the data.
    """

    def __init__(self, pairs: NoisePairs, shards: Shards, settings: Any):
        self.invert, self.data, self.lines = pairs.invert, shards.data, read_lines(shards.prompts)
        if self.lines or self.data is None:
            shape = native_shape(pairs.teacher) if self.data is None else pairs.space.spec(self.data.spec).shape
            codec = (pairs.space.identity["codec"] or {}).get("sha256")
            self.spec = DataSpec(shape, None if self.lines else pairs.teacher.num_classes, bool(self.lines), codec=codec)
            self.record = {"prompts": hashlib.sha256("\n".join(self.lines).encode()).hexdigest()} if self.lines else {}
            self.period = len(self.lines)
        else:
            self.rows, self.items, self.spec = self.data.rows(), self.data.training_items(), self.data.spec
            kept = {key: value for key, value in settings.get("init_args", {}).items() if key not in NOT_THE_SAMPLES}
            self.record, self.period = {"class": type(self.data).__name__, **kept}, len(self.items)
        self.count = shards.count or self.period
        if self.invert and (self.lines or self.data is None or self.count != self.period):
            raise ValueError("invert=true: pairs are of the data's samples, each once; give data, prompts=null and count=null.")
        if not self.count:
            raise ValueError("count=null: give the number of pairs, or data.")

    def __getitem__(self, numbers: Tensor) -> Batch:
        if self.lines:
            return Batch(None, {}, {}, prompts=[self.lines[number % self.period] for number in numbers.tolist()])
        if self.data is None:
            classes = self.spec.num_classes
            return Batch(None, *(({}, {}) if classes is None else label_conditions(numbers % classes, classes)))
        batch = self.rows[self.items[numbers % self.period]]
        return batch if self.invert else replace(batch, x0=None)


def read_lines(file: str | None) -> list[str]:
    """The lines of a file that are not empty. Raises ValueError if there are none."""
    lines = [] if file is None else [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if file is not None and not lines:
        raise ValueError(f"prompts={file!r}: the file holds no line of text.")
    return lines


def native_shape(teacher: Denoiser) -> tuple[int, ...]:
    """Shape of the samples that a teacher was made for. Raises ValueError if it does not say."""
    shape = getattr(getattr(teacher, "network", None), "native_shape", teacher.shape)
    if shape is None or None in shape:
        raise ValueError(f"data=null: the teacher works on samples of any size ({shape}); give data of the size wanted.")
    return tuple(shape)


# ---------------------------------------------------------------------------------------------------------------- storing


class PairWriter:
    """Draws pairs and writes what shards hold of them.

    Args:
        pairs: draws them.
        shards: how they are stored.
        requests: what they show.
        header: of the shards.
    """

    def __init__(self, pairs: NoisePairs, shards: Shards, requests: Requests, header: dict[str, Any]):
        self.pairs, self.shards, self.requests, self.header = pairs, shards, requests, header

    def draw(self, numbers: Tensor) -> Batch:
        """The pairs with these numbers ``(b,)`` on the CPU, with the conditions that are stored, and their prompts."""
        asked = self.requests[numbers]
        drawn = self.pairs.draw(numbers, asked, tuple(self.header["shape"]))
        stored = {*asked.cond, "guidance"} if self.header["prompts"] else {*drawn.cond}
        cond, null = ({name: value for name, value in side.items() if name in stored} for side in (drawn.cond, drawn.null))
        return move_data_to_device(replace(drawn, cond=cond, null=null, prompts=asked.prompts), torch.device("cpu"))

    def members(self, numbers: Tensor, batch: Batch) -> Iterator[dict[str, bytes]]:
        """The members of each pair of a batch. Raises ValueError for a value that is not finite."""
        columns = {"x0": batch.x0, "noise": batch.noise, **batch.cond}
        check_finite(columns, numbers, "compute in float32 (teacher.init_args.dtype), or in more steps")
        png = to_uint8(columns.pop("x0")).numpy() if self.shards.store == "png" else None
        if not self.pairs.invert:
            del columns["noise"]
        arrays = {f"{name}.npy": self.stored(name, value).numpy() for name, value in columns.items() if value.ndim > 1}
        scalars = {name: value.tolist() for name, value in columns.items() if value.ndim == 1}
        for row, number in enumerate(numbers.tolist()):
            record: dict[str, Any] = {} if self.pairs.invert else {"noise": [self.pairs.seed, number]}
            record |= {name: values[row] for name, values in scalars.items()}
            record |= {} if batch.prompts is None else {"prompt": batch.prompts[row]}
            picture = {} if png is None else {"png": to_png(png[row])}
            yield {name: to_npy(value[row]) for name, value in arrays.items()} | picture | {"json": json.dumps(record).encode()}

    def stored(self, name: str, value: Tensor) -> Tensor:
        """An array in the precision in which it is stored; floating ones in float32 where no key says otherwise."""
        chosen = self.shards.dtype if name == "x0" else self.shards.embeddings if name in EMBEDDINGS else None
        return value.to(getattr(torch, chosen or "float32")) if value.is_floating_point() else value

    def null(self, batch: Batch, first: Cond | None = None) -> Cond:
        """The null conditions that all pairs share, of any batch; see `shared_null`."""
        cond, null = ({key: self.stored(key, value) for key, value in side.items()} for side in (batch.cond, batch.null))
        return shared_null(cond, null, PAIRS_OWN_NULL, first)

    def write(self, number: int, bar: tqdm) -> None:
        """Writes shard ``number`` and, when it is whole, its manifest."""
        size, (first, end) = self.shards.batch_size, batch_range(self.header, number)
        parts = torch.arange(first * size, min(end * size, self.header["total"])).split(size)
        batches = ((numbers, self.draw(numbers)) for numbers in parts)
        opening = next(batches)
        null = self.null(opening[1])
        rows = self.rows(chain([opening], batches), null, bar)
        save_shard(self.shards.out, atomic_writer, self.header | {"shard": number}, null, first * size, rows)

    def rows(self, batches: Iterable[tuple[Tensor, Batch]], null: Cond, bar: tqdm) -> Iterator[dict[str, bytes]]:
        """The members of the pairs of batches, whose shared null conditions must be those given."""
        for numbers, batch in batches:
            self.null(batch, null)
            yield from self.members(numbers, batch)
            bar.update(len(numbers))


def batch_range(header: dict[str, Any], shard: int) -> tuple[int, int]:
    """The batches of a shard, the first and the one after the last; the same batches, each whole, whatever ``of`` is."""
    batches = -(-header["total"] // header["batch_size"])
    return shard * batches // header["of"], (shard + 1) * batches // header["of"]


# ---------------------------------------------------------------------------------------------------------------- command


def make_header(pairs: NoisePairs, shards: Shards, requests: Requests, settings: Namespace) -> dict[str, Any]:
    """What made the shards of this command; the same for all but for ``shard``.

    Torch, NumPy and the device are recorded and not compared: pairs computed by others are pairs of the same teacher, if not
    the same bits. Noise that is drawn otherwise has another ``noise_check``, which is compared.

    Raises:
        ValueError: a teacher without a hash, or one that does not fit the data; samples that cannot be stored as asked; more
            shards than batches.
    """
    identity, spec, space = identity_of(pairs.teacher), requests.spec, pairs.space.identity
    if identity is None:
        name, reason = type(pairs.teacher).__name__, "was not read from a file, so nothing tells its pairs from another's"
        raise ValueError(f"teacher={name}: {reason}; export it, and give a PretrainedDenoiser of the folder.")
    inside = pairs.space.spec(spec)
    check_fit("teacher", pairs.teacher, inside)
    shape = list(inside.shape)
    if shards.store == "png" and (space["codec"] or spec.codec or shape[0] not in (1, 3)):
        raise ValueError(f"store=png: holds pixels of 1 or 3 channels, not samples of shape {shape} in a codec's; give array.")
    if shards.embeddings is not None and not set(EMBEDDINGS) & set(inside.widths):
        raise ValueError(f"embeddings={shards.embeddings}: neither data nor prompts make any; set it to null.")
    batches = -(-requests.count // shards.batch_size)
    if shards.of > batches:
        raise ValueError(f"--of={shards.of}: shards are of whole batches, and there are {batches}; lower --batch-size.")
    texts = spec.prompts and shards.embeddings is None
    return {
        "kind": "pairs",
        "format": FORMAT,
        "teacher": identity,
        "codec": space["codec"] or (spec.codec and {"sha256": spec.codec}),
        "conditioner": space["conditioner"] or (spec.conditioner and {"sha256": spec.conditioner}),
        **{key: plain(settings[key]) for key in SETTINGS},
        "shape": shape,
        "num_classes": inside.num_classes,
        "widths": dict(spec.widths if texts else inside.widths),
        "own_null": sorted(PAIRS_OWN_NULL),
        "prompts": texts,
        "dataset": requests.record,
        "total": requests.count,
        "of": shards.of,
        "batch_size": shards.batch_size,
        "noise_check": None if pairs.invert else noise_hash(pairs.seed, shape),
        "computed_by": {"torch": torch.__version__, "numpy": numpy.__version__, "device": device_name(shards.device)},
    }


def device_name(device: Any) -> str:
    """What computes: ``cpu``, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)


def main(argv: list[str] | None = None) -> None:
    """Makes pairs, and says what is there."""
    settings, parser = read_command(argv)
    try:
        built = parser.instantiate(settings)
        pairs, shards = (cls(**{key: built[key] for key in signature(cls).parameters}) for cls in (NoisePairs, Shards))
        requests = Requests(pairs, shards, plain(settings.data))
        header = make_header(pairs, shards, requests, settings)
        wanted = range(shards.of) if shards.shard is None else [shards.shard]
        made = unfinished_shards(shards.out, header, wanted)
        writer = PairWriter(pairs.to(shards.device), shards, requests, header)
        ends = [[min(end * shards.batch_size, requests.count) for end in batch_range(header, number)] for number in made]
        count = sum(end - first for first, end in ends)
        with tqdm(total=count, desc="pairs", unit="pair", disable=None) as bar:
            for number in made:
                writer.write(number, bar)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    there = f"{len(made)} shards made, {len(wanted) - len(made)} were there, of {shards.of} in all"
    print(f"{shards.out}: {count} pairs made; {there}")


if __name__ == "__main__":
    main()
