"""Points of a guided teacher's trajectories, from the shards of tools/make_trajectories.py."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.utils.data import Dataset

from datamodules.drawn import DrawnDataModule
from datamodules.ordered import OrderedDataModule, OrderedLoader
from distill.types import Batch


class Conditions(Dataset):
    """The conditions of samples, without the samples.

    Args:
        rows: ``rows[items]`` is a batch of the samples.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __getitem__(self, items: Tensor) -> Batch:
        """The conditions of the samples with the numbers ``items`` ``(b,)``."""
        return replace(self.rows[items], x0=None, noise=None, time=None)


class TrajectoriesDataModule(DrawnDataModule):
    """Points that tools/make_trajectories.py wrote: AGD's data (2503.07274), for distilling guidance without the teacher.

    A batch has ``x0``, what the guided teacher predicted at a point, ``noise``, what that leaves in it, and its ``time`` in the
    teacher's schedule: the point is ``x_t = alpha x0 + sigma noise``. ``cond["guidance"]`` is the scale of its trajectory,
    where one was drawn. Points come in a random order over all trajectories, one that is exact and resumable, see
    `OrderedDataModule`. ``spec`` says that they are points, and carries the hash of the teacher.

    Args:
        folder: the shards and their manifests; several folders of one teacher, guided alike, are read as one.
        real: data of validation, test, prediction and examples, whose settings are its own; null for the conditions of the
            points, without samples: a point's ``x0`` is a prediction, with which no sample should be compared.
        batch_size: points a batch on each rank.
        num_workers: processes that read; points are read from the disk one by one.
        seed: of the order of training.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch.
        eval_samples: points whose conditions validation has, evenly spaced; null for all. Not used with ``real``.
        eval_batch_size: at most so many of them a batch on each rank. Not used with ``real``.
        verify: whether every shard is read once and its hash compared at the start, rather than its size and header.

    Raises:
        FileNotFoundError: no folder, no manifest, a missing shard; names what to run.
        ValueError: a truncated or damaged shard, folders of different teachers or guidance, ``real`` of another kind than the
            points, an argument out of its range.
    """

    def __init__(
        self,
        folder: str | list[str],
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
        if not folders:
            raise ValueError("folder=[]: give at least one.")
        loading = (batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        super().__init__("trajectories", folders, None, real, verify, eval_samples, *loading)

    def val_dataloader(self) -> OrderedLoader:
        loader = super().val_dataloader()
        if self.real is None:
            loader.dataset = Conditions(loader.dataset)
        return loader

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
