"""A training order that is a pure function of (seed, position), and a loader that hands it to Lightning untouched.

The order is the permutations of all items, one after another without end. Whoever knows the position knows what comes next: to
resume, or to share a batch among ranks, nothing else need be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.workers import iterate


@lru_cache(maxsize=4)  # a pass is asked for batch by batch
def permutation(size: int, seed: int, number: int) -> Tensor:
    """The order ``(size,)``, int64, of the items ``0..size-1`` in pass ``number`` over them.

    NumPy freezes the streams of SeedSequence, MT19937 and RandomState (NEP 19), those of its Generator and of torch may change:
    a run may be resumed under other versions.
    """
    bits = numpy.random.MT19937(numpy.random.SeedSequence((seed, number)))
    return torch.from_numpy(numpy.random.RandomState(bits).permutation(size).astype(numpy.int64))


def permuted_items(size: int, seed: int, start: int, count: int) -> Tensor:
    """The items ``(count,)`` at positions ``start .. start+count-1`` of the concatenated permutations."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    while count > 0:
        number, offset = divmod(start, size)
        pieces.append(permutation(size, seed, number)[offset : offset + count])
        start, count = start + len(pieces[-1]), count - len(pieces[-1])
    return torch.cat(pieces)


def trained_batches(trainer: Trainer | None) -> int:
    """Batches of this rank whose training step has ended, since the run began; restored when a run is resumed.

    Lightning's ``processed``, and neither ``ready`` (counts the batch being worked on) nor ``completed`` (not yet raised in
    ``on_train_batch_end``, where checkpoints are saved). Without a trainer 0.
    """
    return 0 if trainer is None else getattr(trainer.fit_loop.epoch_loop.batch_progress.total, "processed")  # noqa: B009


class OrderedLoader:
    """Batches of chosen items, in the order chosen. What Lightning iterates over.

    It is no torch DataLoader, so Lightning leaves it alone: it would wrap the sampler of a DataLoader in a DistributedSampler
    (``use_distributed_sampler``) or replace it in prediction. The order given here has this rank's share alone already.

    Args:
        dataset: ``dataset[items]`` is the batch of the items ``(b,)``.
        order: called when iteration starts, gives the items of each batch.
        length: the number of batches that ``order`` gives, or of an epoch.
        num_workers: processes that prepare batches; 0 for none.
    """

    def __init__(self, dataset: Dataset, order: Callable[[], list[Tensor]], length: int, num_workers: int = 0):
        self.dataset, self.order, self.length, self.num_workers = dataset, order, length, num_workers

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        # A generator function: Lightning calls iter() long before the first batch, and the order is asked for at that batch.
        yield from iterate(self.dataset, self.order(), self.num_workers)


class ResumableLoader(OrderedLoader):
    """An `OrderedLoader` whose ``order`` starts where training stands, so that it may be left and resumed anywhere.

    Lightning asks loaders for a state and warns of those that have none. The position is in the data module's state; this
    one is empty.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
