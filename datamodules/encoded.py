"""Samples that were encoded beforehand: latents and conditions from the shards of tools/encode_latents.py."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.ordered import OrderedDataModule
from datamodules.shards import Shard, read_folder
from distill.types import Batch, Cond, DataSpec, label_conditions


class EncodedRows(Dataset):
    """Batches of chosen samples of shards, read from the places that the manifests name.

    Args:
        shards: of one folder.
    """

    def __init__(self, shards: list[Shard]):
        self.shards, header = shards, shards[0].header
        self.ends = numpy.cumsum([shard.count for shard in shards])
        self.encoded, self.own_null = header["codec"] is not None, header["own_null"]
        self.null = {name: row.float() if row.is_floating_point() else row for name, row in shards[0].null().items()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, items: Tensor) -> Batch:
        """The batch of the samples with the numbers ``items`` ``(b,)``, counted over all shards."""
        samples = [self._read(item) for item in items.tolist()]
        columns = {name: _tensor([sample[name] for sample in samples]) for name in samples[0]}
        x0 = columns.pop("x0")
        null: Cond = {name: row.expand(len(items), *row.shape[1:]) for name, row in self.null.items()}
        own = {name: columns[name] for name in self.own_null if name in columns}
        return Batch(x0, columns, null | own, encoded=self.encoded)

    def _read(self, item: int) -> dict[str, numpy.ndarray]:
        shard = int(numpy.searchsorted(self.ends, item, side="right"))
        return self.shards[shard].read(item - int(self.ends[shard]) + self.shards[shard].count)


def _tensor(arrays: list[numpy.ndarray]) -> Tensor:
    """The arrays as one tensor; floating ones, whatever they were stored as, in float32."""
    value = torch.from_numpy(numpy.stack(arrays))
    return value.float() if value.is_floating_point() else value


class EncodedDataModule(OrderedDataModule):
    """Latents and conditions that tools/encode_latents.py wrote, as batches of `distill.types.Batch` that are encoded.

    ``spec`` carries the hashes of the codec and the conditioner that made them: a ``model.space`` with others is refused. Null
    conditions are stored once and expanded. The order of training is exact and resumable, see `OrderedDataModule`.

    Args:
        folder: the shards and their manifests, all of one run of the tool.
        batch_size: training samples a batch on each rank.
        num_workers: processes that read; samples are read from the disk one by one.
        seed: of the order of training.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch.
        eval_samples: samples of validation, evenly spaced; null for all.
        eval_batch_size: at most so many samples a batch on each rank in validation; see `eval_batch_size`.
        verify: whether every shard is read once and its hash compared at the start, rather than its size and header.

    Raises:
        FileNotFoundError: no folder, no manifest, a missing shard; names what to run.
        ValueError: a truncated or damaged shard, shards that were made by different things, an argument out of its range.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        batches_per_epoch: int = 100,
        eval_samples: int | None = None,
        eval_batch_size: int = 300,
        verify: bool = False,
    ):
        super().__init__(batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        if eval_samples is not None and eval_samples < 1:
            raise ValueError(f"eval_samples={eval_samples}: give a number of at least 1, or null for all.")
        self.data = EncodedRows(read_folder(folder, verify))
        if not len(self.data):
            raise ValueError(f"folder={folder!r}: its shards hold no samples; encode some by tools/encode_latents.py.")
        self.eval_samples = min(eval_samples or len(self.data), len(self.data))
        header = self.data.shards[0].header
        self.spec = DataSpec(
            tuple(header["shape"]),
            header["num_classes"],
            widths=dict(header["widths"]),
            codec=(header["codec"] or {}).get("sha256"),
            conditioner=(header["conditioner"] or {}).get("sha256"),
        )

    def rows(self) -> EncodedRows:
        return self.data

    def training_items(self) -> Tensor:
        return torch.arange(len(self.data))

    def evaluation_items(self) -> Tensor:
        return self._spaced(self.eval_samples)

    def _spaced(self, count: int) -> Tensor:
        """Numbers ``(count,)`` of evenly spaced samples; some more than once if there are not so many."""
        size = len(self.data)
        return torch.arange(count) * size // count if count <= size else torch.arange(count) % size

    def order(self) -> dict[str, Any]:
        """The seed, and the samples that are ordered, wherever their folder is."""
        hashes = "".join(shard.sha256 for shard in self.data.shards)
        return super().order() | {"folder": f"(sha256 {hashlib.sha256(hashes.encode()).hexdigest()[:12]})"}

    def examples(self, count: int) -> Batch:
        """The classes in turn, if the class is the only condition; else the conditions of evenly spaced samples."""
        if self.spec.num_classes is not None and set(self.data.null) == {"labels"}:
            return Batch(None, *label_conditions(torch.arange(count) % self.spec.num_classes, self.spec.num_classes))
        batch = self.data[self._spaced(count)]
        return Batch(None, batch.cond, batch.null)
