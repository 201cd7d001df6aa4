"""What methods in halving rounds share (progressive distillation, Salimans & Ho 2202.00512): who teaches, and for how long.

Each round's student takes half the steps of its teacher, which is the given one first and then the student that the last round
left; it starts as its teacher, its optimiser's state is new and its learning rate is a function of the step within the round.
All rounds are one run. A round begins with its first step, not with the end of the last: a checkpoint of the boundary is the
old round's, and what begins follows from the number of the step alone.
"""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.frozen import still_copy
from distill.grids import Grid, UniformGrid
from distill.guidance import GuidanceRule
from distill.halving import HalvedGrid, Rounds
from distill.methods.base import Method
from distill.networks.base import inner_models
from distill.optimization import Optimization
from distill.samplers import OdeSampler, Sampler
from distill.schedules import NoiseSchedule
from distill.solvers import DDIM
from distill.space import ModelSpace
from distill.types import Batch


class Snapshot(nn.Module):
    """A module as it is now, never trained, in evaluation mode, saved with its owner. What is not trained is shared with it."""

    module: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = still_copy(module)

    def train(self, mode: bool = True) -> Snapshot:
        """It stays in evaluation mode."""
        return self


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Makes the weights and buffers of ``target`` those of ``source``, a module of the same structure, to the bit."""
    for parts in ((source.parameters(), target.parameters()), (source.buffers(), target.buffers())):
        for value, own in zip(*parts, strict=True):
            if own is not value:
                own.copy_(value)


class HalvingMethod(Method, ABC):
    """A student that is taught to make two steps of its teacher in one, round by round.

    Held are the student, its average and the given teacher, which stays for comparison, and from the second round on the last
    round's student (under LoRA all of them the layers alone). The average begins anew with each round, as that round's student:
    the paper has none, and over a boundary it would mix students of different steps. ``DecayAveraging(0)`` is none.

    Args:
        student: starts as the teacher.
        teacher: frozen; the first round's.
        start_steps, end_steps, round_steps: see `distill.halving.Rounds`.
        optimization, evaluation, space: see `Method`. The learning rate counts the steps of a round and falls over its length;
            the default sampler is DDIM on the grid.
        guidance: see `Method`.
        grid: the times of sampling; None for `UniformGrid`.
        schedule: in which the method works; None is the student's own.

    Raises:
        ValueError: rounds that do not halve, or a grid that does not.

    Attributes:
        previous: the student of the last round, None in the first.
    """

    previous: Snapshot | None

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        start_steps: int,
        end_steps: int,
        round_steps: int | list[int],
        optimization: Optimization,
        evaluation: Evaluation,
        guidance: GuidanceRule | None = None,
        grid: Grid | None = None,
        schedule: NoiseSchedule | None = None,
        space: ModelSpace | None = None,
    ):
        rounds, grid = Rounds(start_steps, end_steps, round_steps), grid or UniformGrid()
        schedule = student.schedule if schedule is None else schedule
        grids = [HalvedGrid(grid, schedule, steps) for steps in rounds.steps]
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        self.rounds, self.grid, self.grids, self.schedule = rounds, grid, grids, schedule
        self.register_module("previous", None)

    def generator(self, student: Denoiser) -> Denoiser:
        return student.under(self.schedule)

    @property
    def student_sampler(self) -> Sampler:
        return self.evaluation.sampler or OdeSampler(DDIM(), self.grid)

    @property
    def halved(self) -> HalvedGrid:
        """The steps of this round's student and of its teacher."""
        return self.grids[self.rounds.index(self.student_step)]

    @property
    def round_teacher(self) -> Denoiser:
        """Whom this round's student learns from, not guided."""
        return self.generator(self.teacher if self.previous is None else self.previous.module)

    def sharded_parts(self) -> list[nn.Module]:
        raise ValueError(
            f"trainer.strategy=fsdp2: {type(self).__name__} copies the student when a round ends, which cannot be done with "
            "sharded networks; use trainer.strategy=ddp."
        )

    # ---------------------------------------------------------------------------------------------------------- rounds

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if (steps := self.trainer.max_steps) > self.rounds.total:
            raise ValueError(
                f"trainer.max_steps={steps}: the rounds of model.round_steps={self.rounds.lengths} end after "
                f"{self.rounds.total} steps; give no more, or a longer last round."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self.within_step and self.student_step in self.rounds.firsts[1:]:
            self.begin_round()

    def begin_round(self) -> None:
        """The student as it is becomes the teacher; its average starts from it, its optimiser as at the start of a run."""
        if self.previous is None:
            self.previous = Snapshot(self.student)
            if self.optimization.compile:
                for model in inner_models(self.previous):
                    model.compile()
        else:
            copy_weights(self.student, self.previous.module)
        copy_weights(self.student, self.ema.module)
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.state.clear()

    def step_in_round(self, step: int) -> tuple[int, int]:
        """The 0-based step within its round, and the steps of that round, of a 0-based step of the run."""
        index = self.rounds.index(step)
        return step - self.rounds.firsts[index], self.rounds.lengths[index]

    def rate_factor(self, index: int, step: int) -> float:
        return self.optimization.learning_rate.factor(*self.step_in_round(step))

    def after_student_step(self, step: int, images: int, skipped: Tensor) -> None:
        super().after_student_step(self.step_in_round(step)[0], images, skipped)

    # ------------------------------------------------------------------------------------------------------- contracts

    def round_settings(self) -> dict[str, int]:
        """What a checkpoint says of the round that the next step belongs to."""
        index = self.rounds.index(self.student_step)
        return {"steps": self.rounds.steps[index], "first": self.rounds.firsts[index]}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distill"]["round"] = self.round_settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved, own = checkpoint["distill"].get("round"), self.round_settings()
        if saved != own:
            raise ValueError(
                f"The checkpoint at step {self.student_step} is of the round {saved}, but model.start_steps, end_steps and "
                f"round_steps make it {own}: give the same, or start a new run."
            )
        taught = any(name.startswith("previous.") for name in checkpoint["state_dict"])
        self.previous = Snapshot(self.student) if taught else None
