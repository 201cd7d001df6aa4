"""Straightness and transport cost of the EMA student's flow, logged in validation, and the teacher's for comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from distill.denoiser import Denoiser
from distill.guidance import guided
from distill.methods.sampled import SampledModule
from distill.noise import SeededNoise
from distill.sharding import is_sharded
from distill.straightness import follow
from distill.types import Batch, Cond


class FlowMeasures(Callback):
    """At each end of validation, follows the EMA student's flow from the evaluation's seeds, by Euler's steps.

    Logs ``val/straightness`` and ``val/transport_cost``, means over all samples, which the ranks share among them, in model
    space; the first time ``val/teacher_straightness`` and ``val/teacher_transport_cost`` too if there is a teacher, guided as
    the method guides it. The figures are of a flow: a student whose denoiser is not read as a velocity (a consistency function)
    has figures that say nothing.

    Args:
        num: number of samples; conditions are those of the data module's ``examples``.
        steps: Euler steps; one step is always straight.

    Raises:
        ValueError: no sample, or fewer than 2 steps.
    """

    def __init__(self, num: int = 256, steps: int = 16):
        for name, value, least in (("num", num, 1), ("steps", steps, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: give at least {least}.")
        self.num, self.steps = num, steps
        self.teacher_measured = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs."""
        if trainer.sanity_checking or not isinstance(pl_module, SampledModule):
            return  # not a method: an autoencoder or a text tower has no flow
        figures = self.measure(trainer, pl_module, "")
        if pl_module.has_teacher and not self.teacher_measured:
            figures |= self.measure(trainer, pl_module, "teacher_")
            self.teacher_measured = True
        for name, value in figures.items():
            # The same value on every rank; Lightning wants to be told.
            pl_module.log(f"val/{name}", value, sync_dist=True, batch_size=self.num)

    @torch.no_grad()
    def measure(self, trainer: Trainer, method: Any, player: str) -> dict[str, Tensor]:
        """``straightness`` and ``transport_cost``, named after a player: the student ``""`` or ``"teacher_"``."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if is_sharded(method) and self.num % trainer.world_size:
            raise ValueError(f"num={self.num}: {trainer.world_size} ranks of a sharded network draw together; give a multiple.")
        examples, size = data.examples(self.num), data.eval_batch_size
        sums = torch.zeros(3, device=method.device)
        for first in range(trainer.global_rank, self.num, trainer.world_size * size):
            share = range(self.num)[first : first + trainer.world_size * size : trainer.world_size]
            ready = method.prepare(move_data_to_device(_rows(examples, share), method.device))
            denoiser, cond = _flow(method, ready, player)
            noise = SeededNoise(method.evaluation.seed, share, method.model_shape).draw(method.device)
            paths = follow(denoiser.eval(), noise, cond, self.steps)
            sums += torch.stack([paths.straightness.sum(), paths.cost.sum(), sums.new_tensor(len(share))])
        straightness, cost, count = trainer.strategy.reduce(sums, reduce_op="sum")
        return {f"{player}straightness": straightness / count, f"{player}transport_cost": cost / count}


def _rows(batch: Batch, share: range) -> Batch:
    """Some rows of a batch without data."""
    rows = slice(share.start, share.stop, share.step)
    cond, null = ({key: value[rows] for key, value in side.items()} for side in (batch.cond, batch.null))
    return replace(batch, cond=cond, null=null, prompts=None if batch.prompts is None else batch.prompts[rows])


def _flow(method: Any, ready: Batch, player: str) -> tuple[Denoiser, Cond]:
    """The denoiser whose flow is measured, guided as when it is drawn in validation, and its conditions."""
    cond, null = ready.cond, ready.null
    if not player:
        return method.guided_generator(method.generator(method.ema.module), cond, null, None)
    if method.teacher_scale is not None:
        return guided(method.teacher, cond, null, method.teacher_scale, method.guidance)
    return method.guided_teacher(null), cond
