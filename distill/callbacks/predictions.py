"""What ``python -m distill predict`` leaves: the samples for the data module's conditions, as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes ``RUN/predictions/steps_N_rank_R.npz`` for each number of steps: ``arr_0``, uint8 ``(n, h, w, c)``.

    Samples are in the order of the rank's batches. ``tools/sample.py`` draws any number of samples in one file.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Writes this rank's samples."""
        import numpy

        from distill.metrics.features import to_uint8

        folder = Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        for steps in predictions[0]:
            samples = to_uint8(torch.cat([batch[steps] for batch in predictions]).cpu()).permute(0, 2, 3, 1)
            numpy.savez_compressed(folder / f"steps_{steps}_rank_{trainer.global_rank}.npz", samples.numpy())
