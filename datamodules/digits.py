"""scikit-learn's handwritten digits: 1,797 real 8x8 images of 10 classes, inside the package, without a download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test set).
"""

from __future__ import annotations

from functools import lru_cache

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.order import permutation
from datamodules.ordered import OrderedDataModule
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


class DigitsDataModule(OrderedDataModule):
    """The digits as batches of `distill.types.Batch`, ``x0`` ``(b, 1, 8, 8)`` in [-1, 1], labels 0..9, null label 10.

    Validation, test and prediction read all 1,797 images in order.

    Args:
        holdout: images that are never trained on, the same in every run, in proportion to the classes.
        labels: False for unconditional data, whose conditions are empty.
        captions: whether batches also carry prompts, ``a photo of the digit seven``.
        batch_size, num_workers, seed, batches_per_epoch, eval_batch_size: see `OrderedDataModule`; the images are in memory, so
            no workers are the fastest.

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
        super().__init__(batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        if not 0 <= holdout < SIZE:
            raise ValueError(f"holdout={holdout}: give 0 to {SIZE - 1}, there are {SIZE} digits.")
        self.holdout = holdout
        self.spec = DataSpec((1, 8, 8), NUM_CLASSES if labels else None, captions)

    def examples(self, count: int) -> Batch:
        """The classes in turn; without conditions for unconditional data."""
        return self.batch_of(None, torch.arange(count) % NUM_CLASSES)

    def batch_of(self, images: Tensor | None, labels: Tensor) -> Batch:
        """A batch of images, or of none, with the class labels ``(b,)``."""
        cond, null = label_conditions(labels, NUM_CLASSES) if self.spec.num_classes else ({}, {})
        prompts = [caption(digit) for digit in labels.tolist()] if self.spec.prompts else None
        return Batch(images, cond, null, prompts=prompts)

    def rows(self) -> Dataset:
        return _Rows(self)

    def training_items(self) -> Tensor:
        return split(load_digits()[1], self.holdout)[0]

    def evaluation_items(self) -> Tensor:
        return torch.arange(SIZE)

    def held_out_items(self) -> Tensor:
        return split(load_digits()[1], self.holdout)[1] if self.holdout else self.evaluation_items()

    def order(self) -> dict[str, int]:
        return {"seed": self.seed, "holdout": self.holdout}
