"""A progress bar over the whole run in steps: epochs mean little when the step budget ends a run."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar, counting optimiser steps up to ``max_steps`` instead of batches of an epoch."""

    def __init__(self, refresh_rate: int = 20):
        super().__init__(refresh_rate)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # type: ignore[override]
        """Starts the bar, at the step that a resumed run continues from."""
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.set_description("training")
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.initial = bar.n = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Nothing: the bar spans all epochs."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar to the present step, now and then and at the last one."""
        bar, step = self.train_progress_bar, trainer.global_step
        if not bar.disable and (step - bar.n >= self.refresh_rate or step == trainer.max_steps):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The logged figures of the bar, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
