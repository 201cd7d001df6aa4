"""Samples that were encoded beforehand: latents and conditions from the shards of tools/encode_latents.py."""

from __future__ import annotations

from torch import Tensor

from datamodules.sharded import ShardedDataModule, ShardRows, as_tensor, spec_of
from datamodules.shards import read_folder
from distill.types import Batch


class EncodedRows(ShardRows):
    """Batches of chosen samples of the shards of one folder."""

    def __getitem__(self, items: Tensor) -> Batch:
        columns = {name[:-4]: as_tensor(rows) for name, rows in self.read(items).items() if name.endswith(".npy")}
        x0 = columns.pop("x0")
        return Batch(x0, columns, self.null(columns), encoded=self.shards[0].header["codec"] is not None)


class EncodedDataModule(ShardedDataModule):
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
        data = EncodedRows(read_folder(folder, "encoded", verify))
        super().__init__(data, data.shards, eval_samples, batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        self.spec = spec_of(data.shards[0].header)
