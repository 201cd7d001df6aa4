"""What data modules over shards share: samples numbered over all shards, those of validation, what the order is of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.members import DECODERS
from datamodules.ordered import OrderedDataModule
from datamodules.shards import OpenFiles, Shard
from distill.types import Batch, Cond, DataSpec, label_conditions


class ShardRows(Dataset):
    """The samples of the shards of one folder, numbered over all of them.

    Args:
        shards: at least one.
    """

    def __init__(self, shards: list[Shard]):
        self.shards, self.files = shards, OpenFiles()
        places = [shard.places for shard in shards if shard.places is not None]
        self.places = numpy.concatenate(places) if len(places) == len(shards) else None
        self.ends = numpy.cumsum([shard.count for shard in shards])
        self.starts = numpy.concatenate([[0], self.ends[:-1]])
        self.shared_null = {name: in_float32(row) for name, row in shards[0].null().items()}
        self.own_null = shards[0].header["own_null"]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, items: Tensor) -> Batch:
        """The batch of the samples with the numbers ``items`` ``(b,)``."""
        raise NotImplementedError

    def read(self, items: Tensor) -> dict[str, Any]:
        """The members of the samples ``items`` ``(b,)`` by their names (``x0.npy``), decoded, each of ``b`` values.

        Raises:
            ValueError: a damaged shard; names it and the sample's key.
        """
        numbers = items.numpy()
        shards = numpy.searchsorted(self.ends, numbers, side="right")
        indices = (numbers - self.starts[shards]).tolist()
        places = [None] * len(items) if self.places is None else self.places[numbers].tolist()
        holders = [self.shards[shard] for shard in shards.tolist()]
        samples = [holder.read(*found, self.files) for holder, *found in zip(holders, indices, places)]

        def damaged(row: int, reason: object) -> ValueError:
            return holders[row].damaged(indices[row], reason)

        names = self.shards[0].names or sorted({name for sample in samples for name in sample})
        return {name: _decoded(name, [sample.get(name) for sample in samples], damaged) for name in names}

    def null(self, cond: Cond) -> Cond:
        """Null conditions of samples with conditions ``cond``: those of all samples expanded, or the conditions themselves."""
        size = len(next(iter(cond.values()), ()))
        shared = {name: row.expand(size, *row.shape[1:]) for name, row in self.shared_null.items()}
        return shared | {name: cond[name] for name in self.own_null if name in cond}


def _decoded(name: str, members: list[Any], damaged: Callable[[int, object], ValueError]) -> Any:
    """The members with a name, decoded; ``damaged`` makes the error to raise of one of them."""
    if None in members:
        raise damaged(members.index(None), f"there is no {name}")
    decode = DECODERS[name.rpartition(".")[2]]
    try:
        values = decode(members)
    except ValueError as error:
        alone = []
        for row, member in enumerate(members):
            try:
                alone.append(decode([member]))
            except ValueError as reason:
                raise damaged(row, f"{name}: {reason}") from reason
        raise damaged(_odd_one(alone), f"{name}: {error}") from error
    if isinstance(values, numpy.ndarray) and values.dtype.kind == "f" and not numpy.isfinite(values).all():
        finite = numpy.isfinite(values).reshape(len(values), -1).all(1)
        raise damaged(int(finite.argmin()), f"{name}: not finite")
    return values


def _odd_one(alone: list[Any]) -> int:
    """Which of several samples, each of which can be decoded alone, is unlike most; 0 where that cannot be said."""
    forms = [(value.shape, value.dtype) if isinstance(value, numpy.ndarray) else None for value in alone]
    usual = Counter(forms).most_common(1)[0][0]
    return next((row for row, form in enumerate(forms) if form != usual), 0)


def in_float32(value: Tensor) -> Tensor:
    """A tensor as it is delivered: in float32 if it is floating, whatever it was stored as."""
    return value.float() if value.is_floating_point() else value


def as_tensor(array: numpy.ndarray) -> Tensor:
    """A decoded column ``(b, ...)`` as it is delivered, contiguous."""
    return in_float32(torch.from_numpy(array)).contiguous()


def spec_of(header: dict[str, Any], **more: Any) -> DataSpec:
    """What the samples of shards with this header are."""
    codec, conditioner = ((header[part] or {}).get("sha256") for part in ("codec", "conditioner"))
    scales = header.get("guidance_range")
    more |= {"widths": dict(header["widths"]), "guidance_range": None if scales is None else tuple(scales)}
    return DataSpec(tuple(header["shape"]), header["num_classes"], codec=codec, conditioner=conditioner, **more)


class ShardedDataModule(OrderedDataModule):
    """An `OrderedDataModule` over the samples of shards.

    Args:
        data: batches of the samples, by their numbers over all shards.
        shards: that they are in, in this order.
        eval_samples: samples of validation, evenly spaced; None for all.
        batch_size, num_workers, seed, batches_per_epoch, eval_batch_size: see `OrderedDataModule`.

    Raises:
        ValueError: no samples, an argument out of its range.
    """

    def __init__(
        self,
        data: Dataset,
        shards: list[Shard],
        eval_samples: int | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        batches_per_epoch: int,
        eval_batch_size: int,
    ):
        super().__init__(batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        if eval_samples is not None and eval_samples < 1:
            raise ValueError(f"eval_samples={eval_samples}: give a number of at least 1, or null for all.")
        self.data, self.shards, self.size = data, shards, sum(shard.count for shard in shards)
        if not self.size:
            raise ValueError(f"folder={str(shards[0].file.parent)!r}: its shards hold no samples; make some.")
        self.eval_samples = min(eval_samples or self.size, self.size)

    def rows(self) -> Dataset:
        return self.data

    def training_items(self) -> Tensor:
        return torch.arange(self.size)

    def evaluation_items(self) -> Tensor:
        return self._spaced(self.eval_samples)

    def _spaced(self, count: int) -> Tensor:
        """Numbers ``(count,)`` of evenly spaced samples; some more than once if there are not so many."""
        return torch.arange(count) * self.size // count if count <= self.size else torch.arange(count) % self.size

    def order(self) -> dict[str, Any]:
        """The seed, and the samples that are ordered, wherever their folder is."""
        hashes = "".join(shard.sha256 for shard in self.shards)
        return super().order() | {"folder": f"(sha256 {hashlib.sha256(hashes.encode()).hexdigest()[:12]})"}

    def examples(self, count: int) -> Batch:
        """The classes in turn, if the class is the only condition; else the conditions of evenly spaced samples."""
        batch = self.data[self._spaced(count)]
        if self.spec.num_classes is not None and set(batch.cond) == {"labels"} and batch.prompts is None:
            return Batch(None, *label_conditions(torch.arange(count) % self.spec.num_classes, self.spec.num_classes))
        return Batch(None, batch.cond, batch.null, prompts=batch.prompts)
