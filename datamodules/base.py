"""What every data module offers to methods, callbacks and tools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pytorch_lightning import LightningDataModule

from distill.types import Batch, DataSpec


class DataModule(LightningDataModule, ABC):
    """Batches of `distill.types.Batch`.

    Attributes:
        spec: what is delivered; networks that do not fit it are refused before any work is done.
    """

    spec: DataSpec

    @property
    @abstractmethod
    def eval_batch_size(self) -> int:
        """Samples a batch on each rank in validation: batch k of rank r starts at ``(k * ranks + r) * eval_batch_size``."""

    @abstractmethod
    def examples(self, count: int) -> Batch:
        """A batch without ``x0``: conditions, or prompts, of ``count`` typical samples, for pictures. The same at each call."""

    def held_out_dataloader(self) -> Any:
        """Batches of what validation reads and training never does, each rank its share; by default all of it."""
        return self.val_dataloader()
