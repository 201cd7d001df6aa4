"""Labelled random images of any size: data for trying out a recipe, or its speed, before the real data is there."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.ordered import OrderedDataModule
from distill.noise import SeededNoise
from distill.types import Batch, DataSpec, label_conditions


class _Rows(Dataset):
    """Batches of the images with given numbers."""

    def __init__(self, module: SyntheticDataModule):
        self.batch_of, self.spec = module.batch_of, module.spec

    def __getitem__(self, items: Tensor) -> Batch:
        batch = self.batch_of(torch.stack([random_image(int(item), self.spec.shape) for item in items]), items)
        if self.spec.paired:
            batch.noise = SeededNoise(0, items.tolist(), self.spec.shape).draw()
        return batch


def random_image(item: int, shape: tuple[int, ...]) -> Tensor:
    """Image number ``item``, float32, its values uniform in [-1, 1): the same in every run."""
    generator = numpy.random.Generator(numpy.random.Philox(key=item))
    return torch.from_numpy(2 * generator.random(shape, dtype=numpy.float32) - 1)


class SyntheticDataModule(OrderedDataModule):
    """``size`` random images; number i has label ``i % num_classes`` and prompt ``image i``. All are trained on.

    Args:
        shape: of an image, ``(channels, height, width)``.
        num_classes: None for data without labels.
        prompts: whether batches carry prompts.
        paired: whether batches carry noise, image number i always the same: for recipes that train on pairs.
        size: number of images.
        batch_size, num_workers, seed, batches_per_epoch, eval_batch_size: see `OrderedDataModule`.

    Raises:
        ValueError: an argument out of its range; names it, its value and the range.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int | None = None,
        prompts: bool = False,
        size: int = 64,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        batches_per_epoch: int = 100,
        eval_batch_size: int = 16,
        paired: bool = False,
    ):
        super().__init__(batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        if min(shape) < 1:
            raise ValueError(f"shape={shape}: give channels, height and width of at least 1.")
        for key, value in (("num_classes", num_classes), ("size", size)):
            if value is not None and value < 1:
                raise ValueError(f"{key}={value}: give a number of at least 1.")
        self.size, self.spec = size, DataSpec(tuple(shape), num_classes, prompts, paired=paired)

    def batch_of(self, images: Tensor | None, items: Tensor, labels: Tensor | None = None) -> Batch:
        """A batch of images, or of none, with the prompts of these numbers ``(b,)``, and their labels or those given."""
        classes = self.spec.num_classes
        labels = items % (classes or 1) if labels is None else labels
        cond, null = ({}, {}) if classes is None else label_conditions(labels, classes)
        prompts = [f"image {item}" for item in items.tolist()] if self.spec.prompts else None
        return Batch(images, cond, null, prompts=prompts)

    def examples(self, count: int) -> Batch:
        """The first prompts; labels evenly spread over the classes, in order."""
        items = torch.arange(count)
        return self.batch_of(None, items, items * (self.spec.num_classes or 1) // max(count, 1))

    def rows(self) -> Dataset:
        return _Rows(self)

    def training_items(self) -> Tensor:
        return torch.arange(self.size)

    def evaluation_items(self) -> Tensor:
        return torch.arange(self.size)

    def order(self) -> dict[str, int]:
        return {"seed": self.seed, "size": self.size}
