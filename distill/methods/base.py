"""The training loop that every method shares. A method writes ``losses(batch)``; one with two players ``critic_losses`` too.

Optimisation is manual, for one and two players alike: one optimiser step for each batch (or each ``accumulate_batches``), so
that ``global_step`` counts them. Every batch seeds its draws from (seed, batch, rank): a resumed run repeats nothing, ranks
differ, and a batch can be replayed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.denoiser import Denoiser
from distill.ema import EMA
from distill.evaluation import Evaluation
from distill.frozen import Frozen
from distill.guidance import ClassifierFreeGuidance, GuidanceRule
from distill.optimization import Optimization, SkippedSteps, clip_gradients, step_unless
from distill.pretrained import identity_of
from distill.samplers import SeededNoise
from distill.types import Batch, Cond, DataSpec, Losses, Sample


@dataclass
class Player:
    """One side of a method: what it trains and how."""

    name: str
    losses: Callable[[Batch], Losses]
    parameters: list[nn.Parameter]
    optimization: Optimization


class Method(LightningModule, ABC):
    """Trains ``student``, with the help of a frozen ``teacher`` if there is one.

    Args:
        student: the denoiser that is trained.
        teacher: a denoiser that is never trained and never saved; checkpoints keep its path and hash.
        guidance: how the teacher is guided, in training and in its samples; None for not.
        optimization: optimiser, learning rate, clipping, accumulation, averaging.
        evaluation: what is drawn and measured in validation.

    Attributes:
        ema: the average of the student, which is what is sampled.
        batches_seen: training batches that this rank has worked on since the run began.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        guidance: GuidanceRule | None,
        optimization: Optimization,
        evaluation: Evaluation,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.student: Denoiser = student.train()
        self._teacher: Frozen | None = None if teacher is None else Frozen(teacher)
        self.guidance, self.optimization, self.evaluation = guidance, optimization, evaluation
        self.ema = EMA(student, optimization.averaging)
        self.skipped = SkippedSteps(optimization.max_skipped)
        self.metrics = nn.ModuleDict(
            {str(n): nn.ModuleDict({str(m.name): m.clone() for m in evaluation.metrics}) for n in evaluation.steps}
        )
        self.batches_seen = 0
        self._accumulated_bad: Tensor | None = None

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """The student's losses on a batch, with gradient; ``loss`` is minimised."""

    def generator(self, student: Denoiser) -> Denoiser:
        """The denoiser that is sampled, made of the student or its average: itself, unless a method wraps it."""
        return student

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher. Raises ValueError if there is none."""
        if self._teacher is None:
            raise ValueError(f"{type(self).__name__} was built without a teacher: set model.teacher.")
        return self._teacher.module

    @property
    def has_teacher(self) -> bool:
        """Whether the method was built with a teacher."""
        return self._teacher is not None

    def guided_teacher(self, null: Cond) -> Denoiser:
        """The teacher under the method's guidance rule."""
        return self.teacher if self.guidance is None else self.guidance(self.teacher, null)

    # ------------------------------------------------------------------------------------------------ optimisation

    def players(self) -> list[Player]:
        """The sides of the method, in the order of their optimisers."""
        return [Player("student", self.losses, _trained(self.student), self.optimization)]

    def turn(self, step: int) -> int:
        """Whose turn it is at optimiser step ``step``: an index into `players`."""
        return 0

    def player_step(self, index: int, step: int) -> int:
        """Steps of its own that player ``index`` has made before optimiser step ``step``; its schedules count these."""
        return step

    @property
    def student_step(self) -> int:
        """Steps that the student has made: what curricula count."""
        return self.player_step(0, self.batches_seen // self.optimization.accumulate_batches)

    def configure_optimizers(self) -> list[Optimizer]:
        self._players = self.players()
        optimizers = [player.optimization.optimizer(player.parameters) for player in self._players]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        return optimizers

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step, part = divmod(self.batches_seen, self.optimization.accumulate_batches)
        index = self.turn(step)
        player = self._players[index]
        for other in self._players:
            for parameter in other.parameters:
                parameter.requires_grad_(other is player)
        self.seed_draws()
        losses = player.losses(batch)
        last = part + 1 == self.optimization.accumulate_batches
        with self._gradient_sync(last):
            self.manual_backward(losses["loss"] / self.optimization.accumulate_batches)
        bad = ~torch.isfinite(losses["loss"].detach())
        self._accumulated_bad = bad if part == 0 or self._accumulated_bad is None else self._accumulated_bad | bad
        if last:
            self._optimizer_step(index, step, len(batch) * self.optimization.accumulate_batches * self.trainer.world_size)
        self.batches_seen += 1
        for name, value in losses.items():
            self.log(f"train/{player.name}/{name}", value.detach(), prog_bar=name == "loss", batch_size=len(batch))

    def _gradient_sync(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients in the last backward of a step only."""
        strategy = self.trainer.strategy
        if wanted or not isinstance(strategy, ParallelStrategy):
            return contextlib.nullcontext()
        return strategy.block_backward_sync()

    def _optimizer_step(self, index: int, step: int, images: int) -> None:
        player, optimizer = self._players[index], self.optimizers(use_pl_optimizer=True)
        optimizer = optimizer[index] if isinstance(optimizer, list) else optimizer
        norm = clip_gradients(player.parameters, player.optimization.gradient_clip_norm)
        assert self._accumulated_bad is not None
        bad = self._accumulated_bad | ~torch.isfinite(norm)
        if self.trainer.world_size > 1:
            # The largest over the ranks: all skip, or none does. (Lightning's own reduction waits in a barrier first.)
            flag = bad.float()
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            bad = flag > 0
        own_step = self.player_step(index, step)
        budget = self.trainer.max_steps  # -1 for a run that ends by time
        own_budget = budget if budget < 0 else self.player_step(index, budget)
        rate = player.optimization.learning_rate.factor(own_step, own_budget)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        step_unless(bad, optimizer.optimizer, optimizer.step)
        optimizer.zero_grad(set_to_none=True)
        self.skipped.count(bad)
        if index == 0:
            self.after_student_step(own_step, images, bad)
        self.log(f"train/{player.name}/gradient_norm", norm, batch_size=1)
        # A tensor made on the device: Lightning would copy a number to it, and wait.
        shown = torch.full((), optimizer.param_groups[0]["lr"], device=self.device)
        self.log(f"train/{player.name}/learning_rate", shown, batch_size=1)
        self.log("train/skipped_steps", self.skipped.total.float(), batch_size=1)

    def after_student_step(self, step: int, images: int, skipped: Tensor) -> None:
        """Moves the averages after the student's 0-based ``step`` on ``images`` images, unless the step was ``skipped``."""
        self.ema.update(self.student, step, images, skipped)

    def seed_draws(self, stream: str = "") -> None:
        """Seeds torch's generators from (seed, batch, rank) and the name of a ``stream`` of draws within the batch."""
        run_seed = os.environ.get("PL_GLOBAL_SEED", "0")
        key = f"{run_seed}/{self.batches_seen}/{self.global_rank}/{stream}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True))

    # -------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def draw(
        self,
        steps: int,
        indices: Sequence[int],
        cond: Cond,
        null: Cond,
        seed: int = 0,
        source: str = "ema",
        guidance: float | None = None,
    ) -> Sample:
        """Samples number ``indices`` of a seed, ``(len(indices), *shape)``, each the same in any batch and on any rank.

        Args:
            steps: sampler steps.
            indices: numbers of the samples; ``cond`` and ``null`` have a row for each.
            cond, null: conditions on this module's device.
            seed: seed of the set.
            source: ``ema``, ``student`` or ``teacher``.
            guidance: a guidance scale (1 is none) for the sampled network; None leaves the teacher its rule.
        """
        shape = self.student.shape
        if shape is None:
            raise ValueError("The student's network does not say the shape of its samples; give it a 'shape' (c, h, w).")
        fresh = SeededNoise(seed, indices, shape)
        noise = fresh.draw(self.device)
        if source not in ("ema", "student", "teacher"):
            raise ValueError(f"source={source!r}: give 'ema', 'student' or 'teacher'.")
        if source == "teacher":
            rule = self.guidance if guidance is None else ClassifierFreeGuidance(guidance)
            denoiser = self.teacher if rule is None else rule(self.teacher, null)
            return self.evaluation.sample_teacher(denoiser, noise, cond, steps, fresh)
        module: Denoiser = {"ema": self.ema.module, "student": self.student}[source]
        denoiser, cond = self.guided_generator(self.generator(module), cond, null, guidance)
        training = module.training
        samples = self.evaluation.sample_student(denoiser.eval(), noise, cond, steps, fresh)
        module.train(training)
        return samples

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """The generator and conditions for sampling at a guidance scale: by default a classifier-free rule around it."""
        return (generator if guidance is None else ClassifierFreeGuidance(guidance)(generator, null)), cond

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for steps, samples in self.predict_step(batch, batch_idx).items():
            metrics: Any = self.metrics[str(steps)]
            for name, metric in metrics.items():
                metric.update(samples, batch.x0, batch.cond)
                self.log(f"val/{name}/{steps}", metric, batch_size=len(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[int, Sample]:
        """Samples for the conditions of the batch, by number of steps."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        first = (batch_idx * self.trainer.world_size + self.global_rank) * data.eval_batch_size
        indices = range(first, first + len(batch))
        return {n: self.draw(n, indices, batch.cond, batch.null, self.evaluation.seed) for n in self.evaluation.steps}

    # ----------------------------------------------------------------------------------------------------- contracts

    def check_data(self, spec: DataSpec) -> None:
        """Refuses data that a network does not fit.

        Raises:
            ValueError: naming the keys and both values.
        """
        for key, denoiser in (("teacher", self._teacher and self._teacher.module), ("student", self.student)):
            if denoiser is None:
                continue
            if denoiser.shape is not None and denoiser.shape != spec.shape:
                raise ValueError(
                    f"model.{key} works on samples of shape {denoiser.shape} (channels, height, width), but data delivers "
                    f"{spec.shape}: give a {key} of the data's shape, or other data."
                )
            if denoiser.num_classes is not None and denoiser.num_classes != spec.num_classes:
                raise ValueError(
                    f"model.{key} has {denoiser.num_classes} classes, but data has {spec.num_classes}: "
                    f"give a {key} with as many classes as the data."
                )

    @property
    def within_step(self) -> bool:
        """Whether some, not all, batches of an accumulated step are done; their gradients are in no checkpoint."""
        return self.batches_seen % self.optimization.accumulate_batches > 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.within_step:
            raise RuntimeError(
                f"A checkpoint after batch {self.batches_seen} would lose gradients: a step accumulates "
                f"{self.optimization.accumulate_batches} batches (optimization.accumulate_batches); save at the end of a step."
            )
        teacher = None if self._teacher is None else identity_of(self._teacher.module)
        checkpoint["distill"] = {"batches_seen": self.batches_seen, "teacher": teacher}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["distill"]
        own = None if self._teacher is None else identity_of(self._teacher.module)
        if (saved["teacher"] or {}).get("sha256") != (own or {}).get("sha256"):
            raise ValueError(
                f"The checkpoint was trained with the teacher {saved['teacher']}, but model.teacher is {own}: "
                "give the same teacher, or start a new run."
            )
        self.batches_seen = saved["batches_seen"]


class TwoPlayerMethod(Method, ABC):
    """A student and a critic (a fake score, a discriminator) take turns: ``critic_steps`` of the critic, one of the student.

    A batch is one player's turn (or one part of it, if gradients are accumulated); only that player's parameters require
    gradients in it.

    Args:
        critic: the module that the critic's turns train.
        critic_optimization: its optimiser, learning rate and clipping; averaging and accumulation are the student's.
        critic_steps: the critic's turns for one of the student's, at least 1.
        others: of `Method`.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        critic: nn.Module,
        guidance: GuidanceRule | None,
        optimization: Optimization,
        critic_optimization: Optimization,
        evaluation: Evaluation,
        critic_steps: int = 1,
    ):
        super().__init__(student, teacher, guidance, optimization, evaluation)
        if critic_steps < 1:
            raise ValueError(f"critic_steps={critic_steps}: give at least 1.")
        self.critic, self.critic_optimization, self.critic_steps = critic, critic_optimization, critic_steps

    @abstractmethod
    def critic_losses(self, batch: Batch) -> Losses:
        """The critic's losses on a batch, with gradient; ``loss`` is minimised."""

    def players(self) -> list[Player]:
        critic = Player("critic", self.critic_losses, _trained(self.critic), self.critic_optimization)
        return [*super().players(), critic]

    def turn(self, step: int) -> int:
        return 0 if step % (self.critic_steps + 1) == self.critic_steps else 1

    def player_step(self, index: int, step: int) -> int:
        student = step // (self.critic_steps + 1)
        return student if index == 0 else step - student


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
