"""scikit-learn's handwritten digits: 1,797 real 8x8 images of 10 classes, inside the package, without a download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test set).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.order import OrderedLoader, ResumableLoader, permutation, permuted_items, trained_batches
from datamodules.base import DataModule
from distill.types import Batch, DataSpec, label_conditions

SIZE, NUM_CLASSES = 1797, 10
NAMES = "zero one two three four five six seven eight nine".split()
SPLIT_SEED = 1797
"""The held-out images are the same in every run, whatever its seed: a student shall not train on what its teacher left out."""


@lru_cache(maxsize=1)
def load_digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)``, float32 in [-1, 1] (``v / 8 - 1`` of the values v in 0..16), and their labels ``(1797,)``."""
    from sklearn.datasets import load_digits as load

    data = load()
    images = torch.from_numpy(data.images.astype(numpy.float32)).div(8).sub(1).unsqueeze(1)
    return images, torch.from_numpy(data.target.astype(numpy.int64))


def split(labels: Tensor, holdout: int) -> tuple[Tensor, Tensor]:
    """Splits the images with ``labels`` ``(n,)`` into training items ``(n - holdout,)`` and held-out ones, both in order.

    Evenly spaced items of a random order sorted by class: every class loses its share, rounded down or up.
    """
    shuffled = permutation(len(labels), SPLIT_SEED, 0)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    middles = (2 * torch.arange(holdout) + 1) * len(labels) // max(2 * holdout, 1)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[by_class[middles]] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()


class _Rows(Dataset):
    """Batches of the images of given items."""

    def __init__(self, module: DigitsDataModule):
        self.batch_of = module.batch_of
        self.images, self.labels = load_digits()

    def __getitem__(self, items: Tensor) -> Batch:
        return self.batch_of(self.images[items], self.labels[items])


def caption(digit: int) -> str:
    """A prompt for a digit 0..9: ``a photo of the digit seven``."""
    return f"a photo of the digit {NAMES[digit]}"


class DigitsDataModule(DataModule):
    """The digits as batches of `distill.types.Batch`, ``x0`` ``(b, 1, 8, 8)`` in [-1, 1], labels 0..9, null label 10.

    Training reads permutation after permutation of the training images (seeded by the seed and the pass), the global batch k
    being items ``k * batch_size * ranks`` onwards and each rank's share a slice of it. Nothing is lost or repeated in a pass,
    also when a run is cut anywhere and resumed, with another batch size or number of ranks if need be. Validation, test and
    prediction read all 1,797 images in order, each on one rank.

    Args:
        batch_size: training images a batch on each rank.
        num_workers: processes that prepare the batches; the images are in memory, so 0 is the fastest.
        seed: of the order of training, not of the split.
        holdout: images that are never trained on, the same in every run, in proportion to the classes.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch.
        labels: False for unconditional data, whose conditions are empty.
        captions: whether batches also carry prompts, ``a photo of the digit seven``.
        eval_batch_size: at most so many images a batch on each rank in validation; see `eval_batch_size`.

    Raises:
        ValueError: an argument out of its range; names it, its value and the range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        holdout: int = 297,
        batches_per_epoch: int = 100,
        labels: bool = True,
        eval_batch_size: int = 300,
        captions: bool = False,
    ):
        super().__init__()
        positive = {"batch_size": batch_size, "batches_per_epoch": batches_per_epoch, "eval_batch_size": eval_batch_size}
        for least, values in ((1, positive), (0, {"num_workers": num_workers, "seed": seed})):
            for key, value in values.items():
                if value < least:
                    raise ValueError(f"{key}={value}: give a number of at least {least}.")
        if not 0 <= holdout < SIZE:
            raise ValueError(f"holdout={holdout}: give 0 to {SIZE - 1}, there are {SIZE} digits.")
        self.batch_size, self.num_workers, self.seed, self.holdout = batch_size, num_workers, seed, holdout
        self.batches_per_epoch, self.largest_eval_batch = batches_per_epoch, eval_batch_size
        self.spec = DataSpec((1, 8, 8), NUM_CLASSES if labels else None, captions)
        self._start = 0
        self._trained_at_start: int | None = None

    def examples(self, count: int) -> Batch:
        """The classes in turn; without conditions for unconditional data."""
        return self.batch_of(None, torch.arange(count) % NUM_CLASSES)

    def batch_of(self, images: Tensor | None, labels: Tensor) -> Batch:
        """A batch of images, or of none, with the class labels ``(b,)``."""
        cond, null = label_conditions(labels, NUM_CLASSES) if self.spec.num_classes else ({}, {})
        prompts = [caption(digit) for digit in labels.tolist()] if self.spec.prompts else None
        return Batch(images, cond, null, prompts=prompts)

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's rank and the number of ranks; 0 and 1 without a trainer."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def consumed(self) -> int:
        """Images, over all ranks, that training has worked on since the run began: the position in the order."""
        if self._trained_at_start is None:
            return self._start
        return self._start + (trained_batches(self.trainer) - self._trained_at_start) * self.batch_size * self.ranks[1]

    def setup(self, stage: str) -> None:
        """A new trainer starts the order afresh; Lightning restores the position of a resumed run after this."""
        if self.trainer is not None and trained_batches(self.trainer) == 0:
            self._start, self._trained_at_start = 0, None

    def train_dataloader(self) -> ResumableLoader:
        """Epochs of ``batches_per_epoch`` batches, from the position on.

        Raises:
            ValueError: the trainer asks for ``overfit_batches``, which this order cannot repeat.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit > 0:
            raise ValueError(
                f"trainer.overfit_batches={overfit}: the order of digits repeats no batch; leave it 0, "
                f"and train on few images by data.holdout={SIZE - 32}."
            )
        self._start, self._trained_at_start = self.consumed, trained_batches(self.trainer)
        return ResumableLoader(_Rows(self), self._next_batches, self.batches_per_epoch, self.num_workers)

    def _next_batches(self) -> list[Tensor]:
        """The items of this rank in the next ``batches_per_epoch`` batches."""
        training, _ = split(load_digits()[1], self.holdout)
        rank, ranks = self.ranks
        first = self.consumed + rank * self.batch_size
        starts = range(first, first + self.batches_per_epoch * self.batch_size * ranks, self.batch_size * ranks)
        return [training[permuted_items(len(training), self.seed, start, self.batch_size)] for start in starts]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        batch = self.batch_size * self.ranks[1]
        return {"consumed": self.consumed, "seed": self.seed, "holdout": self.holdout, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the position saved.

        Raises:
            ValueError: another seed or holdout, so another order: images would be lost or repeated.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # validation of a checkpoint consumes no training data
        for key, value in (("seed", self.seed), ("holdout", self.holdout)):
            if state_dict[key] != value:
                raise ValueError(
                    f"data.{key}={value}: the run to be resumed has {state_dict[key]}, hence another order, and images "
                    f"would be lost or repeated; set data.{key}={state_dict[key]}, or start a new run."
                )
        before, now = state_dict["batch"], self.batch_size * self.ranks[1]
        if before != now:
            rank_zero_info(f"The batch over all ranks was {before} images and is {now} from here on; none is lost or repeated.")
        self._start, self._trained_at_start = state_dict["consumed"], None

    # ---------------------------------------------------------------------------------------------------- evaluation

    @property
    def eval_batch_size(self) -> int:
        """Images a batch on each rank in validation: batch k of rank r starts with image ``(k * ranks + r) * eval_batch_size``.

        The largest not above the argument with which every rank has as many batches as the others, the last one apart.
        """
        ranks = self.ranks[1]
        batches = -(-SIZE // (self.largest_eval_batch * ranks)) * ranks
        return -(-SIZE // batches)

    def val_dataloader(self) -> OrderedLoader:
        """All images in order, split over the ranks.

        Raises:
            ValueError: so many ranks that one would have no batch.
        """
        (rank, ranks), size = self.ranks, self.eval_batch_size
        batches = torch.arange(SIZE).split(size)
        if len(batches) < ranks:
            raise ValueError(f"{ranks} ranks cannot share {SIZE} images in batches of {size}: validate on fewer ranks.")
        mine = list(batches[rank::ranks])
        return OrderedLoader(_Rows(self), lambda: mine, len(mine), self.num_workers)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
