"""Noise-sample pairs: what a teacher made of numbered noise, from the shards of tools/make_pairs.py."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.ordered import OrderedDataModule, OrderedLoader
from datamodules.sharded import ShardedDataModule, ShardRows, as_tensor, spec_of
from datamodules.shards import Shard, again, read_folder, same
from distill.noise import SeededNoise
from distill.types import Batch, DataSpec

NOT_CONDITIONS = ("noise", "prompt")
GUIDANCE = ("guidance", "guidance_range", "anchored")
SAME = ("teacher", "codec", "conditioner", *GUIDANCE, "shape", "num_classes", "widths", "prompts")
"""What folders that are read together must agree in; samplers, their steps, and forms of storage may differ."""


def noise_hash(seed: int, shape: list[int]) -> str:
    """sha256 of the noise of pair 0 as this machine draws it."""
    return hashlib.sha256(SeededNoise(seed, [0], shape).draw().numpy().tobytes()).hexdigest()


class PairRows(ShardRows):
    """Batches of chosen pairs of one folder."""

    def __getitem__(self, items: Tensor) -> Batch:
        header, members = self.shards[0].header, self.read(items)
        records = members.pop("json")
        pixels = members.pop("png", None)
        columns = {name[:-4]: as_tensor(rows) for name, rows in members.items()}
        x0 = columns.pop("x0") if pixels is None else as_tensor(pixels).float() / 127.5 - 1
        if "noise" in columns:
            noise = columns.pop("noise")
        else:
            noise = SeededNoise(header["seed"], [record["noise"][1] for record in records], header["shape"]).draw()
        for name in records[0]:
            if name not in NOT_CONDITIONS:
                columns[name] = torch.tensor([record[name] for record in records])
        prompts = [record["prompt"] for record in records] if header["prompts"] else None
        return Batch(x0, columns, self.null(columns), noise, prompts, encoded=header["codec"] is not None)


class PairFolders(Dataset):
    """Batches of chosen pairs of several folders, numbered over all of them.

    Args:
        folders: the pairs of each.
    """

    def __init__(self, folders: list[PairRows]):
        self.folders, self.ends = folders, numpy.cumsum([len(rows) for rows in folders])

    def __getitem__(self, items: Tensor) -> Batch:
        """The batch of the pairs with the numbers ``items`` ``(b,)``."""
        if len(self.folders) == 1:
            return self.folders[0][items]
        of = torch.from_numpy(numpy.searchsorted(self.ends, items.numpy(), side="right"))
        groups = {folder: torch.nonzero(of == folder).flatten() for folder in of.unique().tolist()}
        parts = [self.folders[n][items[rows] - int(self.ends[n]) + len(self.folders[n])] for n, rows in groups.items()]
        order = torch.cat(list(groups.values())).argsort()
        x0, noise = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("x0", "noise"))
        cond = {name: torch.cat([part.cond[name] for part in parts])[order] for name in parts[0].cond}
        prompts = [prompt for part in parts for prompt in part.prompts or []]
        texts = [prompts[row] for row in order.tolist()] if prompts else None
        return Batch(x0, cond, self.folders[0].null(cond), noise, texts, parts[0].encoded)


def read_folders(folders: list[str], verify: bool) -> list[list[Shard]]:
    """The shards of folders that belong together.

    Raises:
        FileNotFoundError, ValueError: see `datamodules.shards.read_folder`; folders of different teachers, or that were guided
            or encoded differently; noise that this machine draws otherwise than the one that made the pairs.
    """
    found = [read_folder(folder, "pairs", verify) for folder in folders]
    first = found[0][0].header
    for name, shards in zip(folders, found, strict=True):
        header = shards[0].header
        for key in SAME:
            if not same(header, first, key):
                raise ValueError(
                    f"folder={name!r}: its pairs have {key}={header[key]}, those of {folders[0]!r} {key}={first[key]}: read "
                    f"together they are no pairs of one flow; {again('pairs')} with the same {key}."
                )
        if header["noise_check"] is not None and noise_hash(header["seed"], header["shape"]) != header["noise_check"]:
            raise ValueError(
                f"folder={name!r}: numpy {numpy.__version__} here draws other noise from the same seed than numpy "
                f"{header['computed_by']['numpy']}, by which the pairs were made: install that version, or {again('pairs')}."
            )
    return found


class PairsDataModule(ShardedDataModule):
    """Pairs that tools/make_pairs.py wrote, as batches whose ``noise`` is what the teacher made ``x0`` of.

    Noise is drawn again from the seed of each pair, bit for bit. ``spec`` carries the hash of the teacher. The order of
    training is exact and resumable, see `OrderedDataModule`.

    Args:
        folder: the shards and their manifests; several folders of one teacher are read as one.
        repeat: how often the pairs of each folder come in a pass; null for once.
        real: data of validation, test, prediction and examples, whose settings are its own; null for the pairs' own samples.
        batch_size: training pairs a batch on each rank.
        num_workers: processes that read; pairs are read from the disk one by one.
        seed: of the order of training.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch.
        eval_samples: pairs of validation, evenly spaced; null for all. Not used with ``real``.
        eval_batch_size: at most so many pairs a batch on each rank in validation. Not used with ``real``.
        verify: whether every shard is read once and its hash compared at the start, rather than its size and header.

    Raises:
        FileNotFoundError: no folder, no manifest, a missing shard; names what to run.
        ValueError: a truncated or damaged shard, pairs of different teachers, noise that cannot be drawn again, ``real`` of
            another kind than the pairs, an argument out of its range.
    """

    def __init__(
        self,
        folder: str | list[str],
        repeat: list[int] | None = None,
        real: OrderedDataModule | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        batches_per_epoch: int = 100,
        eval_samples: int | None = None,
        eval_batch_size: int = 300,
        verify: bool = False,
    ):
        folders = [folder] if isinstance(folder, str) else folder
        repeat = [1] * len(folders) if repeat is None else repeat
        if not folders or len(repeat) != len(folders) or min(repeat) < 1:
            raise ValueError(f"repeat={repeat}: give a number of at least 1 for each of {len(folders)} folders, or null.")
        found = read_folders(folders, verify)
        rows, shards = [PairRows(shards) for shards in found], [shard for shards in found for shard in shards]
        loading = (batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        super().__init__(PairFolders(rows), shards, eval_samples, *loading)
        self.sizes, self.repeat, self.real = [len(part) for part in rows], repeat, real
        header = found[0][0].header
        prompts = header["prompts"] or (real is not None and real.spec.prompts)
        self.spec = spec_of(header, prompts=prompts, paired=True, teacher=header["teacher"]["sha256"])
        if real is not None:
            _check_real(self.spec, real.spec)

    def training_items(self) -> Tensor:
        """The pairs of each folder as often as it is repeated."""
        parts = torch.arange(self.size).split(self.sizes)
        return torch.cat([part.repeat(times) for part, times in zip(parts, self.repeat, strict=True)])

    def order(self) -> dict[str, Any]:
        return super().order() | {"repeat": self.repeat}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.real is not None:
            self.real.trainer = self.trainer  # for its rank

    @property
    def eval_batch_size(self) -> int:
        return super().eval_batch_size if self.real is None else self.real.eval_batch_size

    def examples(self, count: int) -> Batch:
        return super().examples(count) if self.real is None else self.real.examples(count)

    def val_dataloader(self) -> OrderedLoader:
        return super().val_dataloader() if self.real is None else self.real.val_dataloader()

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def _check_real(pairs: DataSpec, real: DataSpec) -> None:
    """Raises ValueError if validation data is of another kind than the pairs; pixels of pairs that are latents are encoded."""
    for key in ("shape", "num_classes", "codec"):
        mine, other = getattr(pairs, key), getattr(real, key)
        encoded_later = key != "num_classes" and real.codec is None and pairs.codec is not None
        if mine != other and not encoded_later:
            raise ValueError(f"real delivers {key}={other}, the pairs {key}={mine}: give data like the teacher's own.")
