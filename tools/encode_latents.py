"""Encodes images and prompts once: latents and conditions in shards that `datamodules.encoded.EncodedDataModule` trains on.

    python tools/encode_latents.py --config configs/captions/teacher.yaml --out data/captions
    python tools/encode_latents.py --config configs/sd15/lcm.yaml --images photos --size 512 --out data/sd15 --of 64 --shard 3

The codec and the conditioner are the config's ``model.space``; the samples are what its ``data`` trains on, each once, or the
pictures of a folder with their captions (``a.png`` and ``a.txt``). Further ``--a.b=c`` change the config. Without ``--shard``
all shards are made in turn. A finished shard is not made again, a half one leaves nothing: start the same command again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from tqdm import tqdm

from datamodules.members import to_npy
from datamodules.ordered import OrderedDataModule
from datamodules.pictures import Pictures
from datamodules.shard_writing import check_finite, save_shard, shared_null, unfinished_shards
from datamodules.shards import EMBEDDINGS, FORMAT, OWN_NULL
from distill import command_line
from distill.checkpoints import atomic_writer
from distill.cli import DistillCLI, Parser, import_parts
from distill.space import ModelSpace
from distill.types import Batch, DataSpec

NOT_THE_SAMPLES = ("batch_size", "num_workers", "seed", "batches_per_epoch", "eval_batch_size")


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to the config; exits with 2 on a wrong one."""
    parser = command_line.Parser(__doc__)
    parser.add_argument("--config", action="append", required=True, help="recipe with model.space; may be given repeatedly")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--images", help="folder of pictures to encode instead of the config's data")
    parser.add_argument("--size", type=int, help="height and width that pictures are resized and cropped to")
    parser.add_argument("--of", type=int, default=1, help="number of shards in all")
    parser.add_argument("--shard", type=int, help="the one shard to make, 0 to OF - 1 (an array task's number); default all")
    parser.add_argument("--posterior", choices=["sample", "mode"], help="draws of the codec's law, or its mean (the config's)")
    parser.add_argument("--embeddings", choices=["float32", "float16"], default="float32", help="precision of embeddings")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, with the shard's number")
    parser.add_argument("--batch-size", type=int, default=32, help="samples encoded at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    arguments, rest = parser.parse_known_args(argv)
    for name, least in (("of", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(arguments, name)}: give at least {least}.")
    if arguments.shard is not None and not 0 <= arguments.shard < arguments.of:
        parser.error(f"--shard={arguments.shard}: give 0 to {arguments.of - 1}, there are {arguments.of} shards (--of).")
    if (arguments.images is None) != (arguments.size is None) or (arguments.size or 1) < 1:
        parser.error(f"--images={arguments.images} and --size={arguments.size}: give both, the size in pixels, or neither.")
    return arguments, rest


# --------------------------------------------------------------------------------------------------------- what is encoded


class _Config(DistillCLI):
    """Reads a recipe and builds nothing of it: no method, no teacher, no Trainer."""

    def _set_seed(self) -> None:
        """Off: each shard has a seed of its own."""

    def instantiate_classes(self) -> None:
        """Off."""


def read_config(arguments: argparse.Namespace, rest: list[str]) -> Any:
    """The recipe, whose ``model.init_args.space`` says what to encode by.

    Raises:
        ValueError: it has none.
    """
    import_parts()
    config = _Config([word for file in arguments.config for word in ("--config", file)] + rest, run=False).config
    if config.model.init_args.get("space") is None:
        raise ValueError("model.space=null: the config names no codec and no conditioner; there is nothing to encode by.")
    return config


def build(part_class: type, config: Any) -> Any:
    """One part of a recipe."""
    parser = Parser(parser_mode="omegaconf+")
    parser.add_argument("--part", type=part_class)
    return parser.instantiate(parser.parse_object({"part": config})).part


@dataclass
class Source:
    """What is encoded.

    Attributes:
        samples: ``samples[items]`` is a batch.
        spec: what the batches are.
        items: numbers ``(n,)`` of the samples to encode.
        record: which samples they are, for the header.
    """

    samples: Any
    spec: DataSpec
    items: Tensor
    record: dict[str, Any]


def read_source(arguments: argparse.Namespace, config: Any) -> Source:
    """The pictures that the command names, else what the recipe's data trains on.

    Raises:
        ValueError: data that cannot be read by number or is encoded already; more shards than samples.
    """
    if arguments.images is not None:
        pictures = Pictures(arguments.images, arguments.size)
        record = {"images": arguments.images, "size": arguments.size}
        source = Source(pictures, pictures.spec, torch.arange(len(pictures)), record)
    else:
        data = build(LightningDataModule, config.data)
        name = type(data).__name__
        if not isinstance(data, OrderedDataModule) or data.spec.codec is not None:
            reason = "is encoded already" if isinstance(data, OrderedDataModule) else "cannot be read by number"
            raise ValueError(f"data={name}: {reason}; give an OrderedDataModule of images, or --images FOLDER --size N.")
        settings = config.data.as_dict().get("init_args", {})
        record = {"class": name, **{key: value for key, value in settings.items() if key not in NOT_THE_SAMPLES}}
        source = Source(data.rows(), data.spec, data.training_items(), json.loads(json.dumps(record)))
    if arguments.of > len(source.items):
        raise ValueError(f"--of={arguments.of}: there are {len(source.items)} samples, give at most as many shards.")
    return source


# --------------------------------------------------------------------------------------------------------------- encoding


class Encoder:
    """Turns samples into what shards hold of them.

    Args:
        arguments: the command line.
        space: codec and conditioner.
        samples: ``samples[items]`` is a batch.
    """

    def __init__(self, arguments: argparse.Namespace, space: ModelSpace, samples: Any):
        self.arguments, self.space, self.samples = arguments, space, samples

    @torch.no_grad()
    def batches(self, items: Tensor) -> Iterator[tuple[Tensor, Batch, list[str] | None]]:
        """Numbers, encoded batch and prompts, batch by batch under a progress bar.

        Raises:
            ValueError: a batch without images.
        """
        for numbers in tqdm(items.split(self.arguments.batch_size), desc="encoding", unit="batch", disable=None):
            batch = move_data_to_device(self.samples[numbers], torch.device(self.arguments.device))
            if batch.x0 is None:
                raise ValueError("data delivers no images (x0 is None): there is nothing to encode.")
            yield numbers, move_data_to_device(self.space.encode(batch), torch.device("cpu")), batch.prompts

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A condition in the precision in which it is stored."""
        return value.to(getattr(torch, self.arguments.embeddings)) if name in EMBEDDINGS else value

    def stored_all(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditions in the precision in which they are stored."""
        return {name: self.stored(name, value) for name, value in values.items()}

    def rows(
        self, numbers: Tensor, batch: Batch, prompts: list[str] | None, shared: dict[str, Tensor]
    ) -> Iterator[dict[str, bytes]]:
        """The members of each sample of a batch.

        Raises:
            ValueError: a value that is not finite; a null condition that is not the one that shards can hold.
        """
        arrays = self.stored_all({"x0": batch.x0, **batch.cond})
        shared_null(arrays, self.stored_all(batch.null), OWN_NULL, shared)
        check_finite(arrays, numbers, "compute (model.space) and store in float32")
        for row in range(len(numbers)):
            sample = {f"{name}.npy": to_npy(value[row].numpy()) for name, value in arrays.items()}
            yield sample if prompts is None else sample | {"txt": prompts[row].encode()}

    def shard(self, header: dict[str, Any], items: Tensor) -> None:
        """Writes one shard of ``items`` and, when it is whole, its manifest."""
        start, end = (number * len(items) // header["of"] for number in (header["shard"], header["shard"] + 1))
        torch.manual_seed(int(numpy.random.SeedSequence((self.arguments.seed, header["shard"])).generate_state(1)[0]))
        batches = self.batches(items[start:end])
        opening = next(batches)
        shared = shared_null(*map(self.stored_all, (opening[1].cond, opening[1].null)), OWN_NULL)
        rows = (self.rows(*part, shared) for part in chain([opening], batches))
        save_shard(self.arguments.out, atomic_writer, header, shared, start, chain.from_iterable(rows))


def make_header(arguments: argparse.Namespace, space: ModelSpace, source: Source) -> dict[str, Any]:
    """What made the shards of this command; the same for all but for ``shard``.

    Raises:
        ValueError: data that does not fit the space; a law that the codec does not have.
    """
    draws = getattr(space.codec, "sample", None)
    if arguments.posterior is not None:
        if draws is None:
            name = type(space.codec).__name__
            raise ValueError(f"--posterior={arguments.posterior}: {name} has no law to draw of; leave the option out.")
        draws = space.codec.sample = arguments.posterior == "sample"
    inside = space.spec(source.spec)
    return {
        "format": FORMAT,
        **space.identity,
        "posterior": None if draws is None else "sample" if draws else "mode",
        "shape": list(inside.shape),
        "num_classes": inside.num_classes,
        "widths": inside.widths,
        "own_null": sorted(OWN_NULL),
        "embeddings": arguments.embeddings,
        "dataset": source.record,
        "total": len(source.items),
        "of": arguments.of,
        "seed": arguments.seed,
    }


def main(argv: list[str] | None = None) -> None:
    """Encodes, and says what is there."""
    arguments, rest = parse_arguments(argv)
    try:
        config = read_config(arguments, rest)
        source = read_source(arguments, config)
        space = build(ModelSpace, config.model.init_args.space)
        header = make_header(arguments, space, source)
        wanted = range(arguments.of) if arguments.shard is None else [arguments.shard]
        made = unfinished_shards(arguments.out, header, wanted)
        encoder = Encoder(arguments, space.to(arguments.device), source.samples)
        for shard in made:
            encoder.shard(header | {"shard": shard}, source.items)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.out}: {len(made)} shards made, {len(wanted) - len(made)} were there, of {arguments.of} in all")


if __name__ == "__main__":
    main()
