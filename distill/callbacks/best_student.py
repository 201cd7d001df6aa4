"""The best student of a run by a figure that its training did not read, and what is exported of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from distill.callbacks.export import ExportDenoiser
from distill.checkpoints import RunCheckpoint, find_checkpoint, read_checkpoint
from distill.image_features import check_independent
from distill.sharding import is_sharded


class BestStudent(Callback):
    """Has ``checkpoints/best.ckpt`` follow a metric of the validation, and ends a run with the student in it.

    The file is `RunCheckpoint`'s, a whole checkpoint: ``--checkpoint best`` of the tools takes it, and the best figure so far
    is in every checkpoint, so that a resumed run goes on from it. When training has ended, the student and its average become
    those of ``best.ckpt``, which is what `ExportDenoiser` then writes; ``last.ckpt`` stays what it was. For finetuning by a
    discrepancy of features, of which the best of many snapshots is kept (Aiello et al. 2301.07969).

    Args:
        metric: name of a metric and number of steps, ``frechet_pixels/4``, as logged after ``val/``.

    Raises:
        ValueError: when a run starts: a metric that is not measured, or whose features the student is trained on; another
            ``checkpoint.monitor``; `ExportDenoiser` before this callback.
    """

    def __init__(self, metric: str):
        self.metric = metric

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be, and sets the monitor of the run's checkpoints."""
        if stage != "fit":
            return
        metric = self.find_metric(pl_module)
        if features := getattr(pl_module, "trained_features", None):
            check_independent([metric], features)
        mode = "max" if metric.higher_is_better else "min"
        kept, monitor = self.run_checkpoint(trainer), f"val/{self.metric}"
        if kept.monitor not in (None, monitor):
            raise ValueError(f"checkpoint.monitor={kept.monitor} and BestStudent.metric={self.metric}: leave the monitor out.")
        kept.monitor, kept.mode = monitor, mode
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, ExportDenoiser) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError("trainer.callbacks: ExportDenoiser before BestStudent would export the last student; swap them.")

    def find_metric(self, method: Any) -> Any:
        """The metric of the method's evaluation that is named. Raises ValueError if there is none."""
        logged = {f"{name}/{steps}": metric for steps, row in method.metrics.items() for name, metric in row.items()}
        if self.metric not in logged:
            raise ValueError(f"BestStudent.metric={self.metric}: evaluation measures {sorted(logged) or 'nothing'}; give one.")
        return logged[self.metric]

    def run_checkpoint(self, trainer: Trainer) -> RunCheckpoint:
        """What keeps the run's checkpoints. Raises ValueError if nothing does."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                return callback
        raise ValueError("BestStudent: the run keeps no checkpoints to choose from; leave it out.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the best student, and says which it is; also when a finished run is started again."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.strategy.barrier("best student")  # rank zero may still be writing it
        kept = self.run_checkpoint(trainer)
        # A file of an earlier run in the folder is not this run's: its figure is not in this run's state.
        path = None if kept.best is None else find_checkpoint(Path(trainer.default_root_dir), "best")
        if path is None:
            rank_zero_info(f"no student was measured by val/{self.metric}: the last one is kept")
            return
        method: Any = pl_module
        best = read_checkpoint(path, mapped=is_sharded(method))
        method.load_state_dict(best["state_dict"], strict=True)
        figure = best["callbacks"][kept.state_key]["best"]
        rank_zero_info(f"best student: step {best['global_step']}, val/{self.metric} {figure:.4f}, of {path}")
