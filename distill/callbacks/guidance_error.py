"""The EMA student's relative error to its guided teacher, logged in validation."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from distill.guidance_error import prepared, reads_scale, squared_errors
from distill.sharding import check_equal_batches


class GuidanceError(Callback):
    """At each end of validation logs ``val/guidance_error/K`` for each scale K, of all validation data, in model space.

    It is ``|D - D*| / |D*|`` over noised held-out data at uniform times, the same noise and times each time; D is the averaged
    student, D* the teacher under the method's rule at that scale; see `distill.guidance_error`.

    Args:
        scales: guidance scales, 1 is none; the papers' w is one less.

    Raises:
        ValueError: no scale, or a negative one; a method without a teacher, or whose student reads no scale.
    """

    def __init__(self, scales: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0)):
        if not scales or min(scales) < 0:
            raise ValueError(f"scales={list(scales)}: give at least one guidance scale, each 0 or more.")
        self.scales = scales

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a method that it cannot measure. Raises ValueError."""
        method: Any = pl_module
        if not getattr(method, "has_teacher", False):
            raise ValueError(f"GuidanceError: {type(method).__name__} has no teacher to compare with; leave the callback out.")
        own = getattr(method.guidance, "scale", None)
        if not reads_scale(method.student) and list(self.scales) != [own]:
            raise ValueError(f"scales={list(self.scales)}: the student reads no scale; give that of its rule, [{own}].")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs."""
        if trainer.sanity_checking:
            return
        method: Any = pl_module
        loader = trainer.datamodule.held_out_dataloader()  # type: ignore[attr-defined]
        check_equal_batches(method, [len(loader)], "GuidanceError")
        players, data = (method.generator(method.ema.module), method.teacher), prepared(method, loader)
        first = trainer.global_rank << 32  # each rank has data, and numbers of samples, of its own
        sums = squared_errors(*players, data, self.scales, method.guidance, method.evaluation.seed, first)
        error, whole = trainer.strategy.reduce(sums.float().to(method.device), reduce_op="sum").unbind(1)
        for scale, value in zip(self.scales, (error / whole).sqrt(), strict=True):
            pl_module.log(f"val/guidance_error/{scale:g}", value, sync_dist=True, batch_size=1)
