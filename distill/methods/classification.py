"""Training of a small classifier of images, whose hidden layer then serves as features (see `distill.image_features`).

    L = E_{x, c, n} -log softmax(f(x + s n))_c,   n ~ N(0, 1)
    x, n: (b, c, h, w), x in [-1, 1]; f: (b, k) logits

The noise keeps the classifier, and with it the gradients of its features, smooth where a generator's samples are not yet data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import move_data_to_device
from torch.nn.functional import cross_entropy

from distill.classifier import ConvClassifier
from distill.methods.trained import TrainedModule
from distill.optimization import Optimization
from distill.types import Batch, DataSpec, Losses


class ClassifierTraining(TrainedModule):
    """Trains a `ConvClassifier` on labelled images; exported as ``config.json`` and ``model.safetensors``.

    Validation logs ``val/accuracy`` over all that the data validates on, and ``val/held_out_accuracy`` over what of it is
    never trained on.

    Args:
        student: the classifier.
        optimization: see `TrainedModule`.
        noise: s, standard deviation of the noise that is added to training images, at least 0.

    Raises:
        ValueError: negative noise.
    """

    student: ConvClassifier

    def __init__(self, student: ConvClassifier, optimization: Optimization, noise: float = 0.2):
        if noise < 0:
            raise ValueError(f"noise={noise}: give a standard deviation of 0 or more.")
        super().__init__(student, optimization)
        self.noise = noise

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        logits, labels = self.student(batch.x0 + self.noise * torch.randn_like(batch.x0)), batch.cond["labels"]
        return {"loss": cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def check_data(self, spec: DataSpec) -> None:
        student = self.student
        if spec.codec is not None or (spec.shape, spec.num_classes) != (student.shape, student.config["num_classes"]):
            raise ValueError(
                f"model.student reads images of shape {student.shape} of {student.config['num_classes']} classes, but data "
                f"delivers {spec.shape} of {spec.num_classes} classes{'' if spec.codec is None else ', latents of a codec'}: "
                "give such images, or another model.student."
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/accuracy", self._correct(batch).mean(), batch_size=len(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Reads what is held out, each rank its share, and logs the accuracy over all of it."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        sums = torch.zeros(2, device=self.device)
        for batch in data.held_out_dataloader():
            correct = self._correct(move_data_to_device(batch, self.device))
            sums += torch.stack([correct.sum(), torch.ones_like(correct).sum()])
        right, count = self.trainer.strategy.reduce(sums, reduce_op="sum").unbind()
        self.log("val/held_out_accuracy", right / count, batch_size=1, sync_dist=True)

    def _correct(self, batch: Batch) -> torch.Tensor:
        """Whether the averaged classifier reads the label, 0. or 1. ``(b,)``."""
        assert batch.x0 is not None
        return (self.ema.module(batch.x0).argmax(1) == batch.cond["labels"]).float()

    def export(self, folder: Path, data: LightningDataModule) -> None:
        """Writes the averaged classifier into ``folder``."""
        self.ema.module.save(folder)
