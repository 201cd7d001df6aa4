"""Methods with two players: a student and a critic (a fake score, a discriminator) that take turns."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.guidance import GuidanceRule
from distill.lora import checkpoint_gradients
from distill.methods.base import Method
from distill.methods.players import Player
from distill.optimization import Optimization, PlayerOptimization
from distill.space import ModelSpace
from distill.types import Batch, Losses


class TwoPlayerMethod(Method, ABC):
    """A student and a critic (a fake score, a discriminator) take turns: ``critic_steps`` of the critic, one of the student.

    A batch is one player's turn (or one part of it, if gradients are accumulated); only that player's parameters require
    gradients in it, and only that player is in training mode.

    Args:
        critic: the module that the critic's turns train.
        critic_optimization: its optimiser, learning rate and clipping.
        critic_steps: the critic's turns for one of the student's, at least 1.
        critic_warmup: turns that are all the critic's, before the student's first round.
        others: of `Method`.
    """

    critic_key = "critic_optimization"
    """How a recipe names the settings of the critic's optimisation."""

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        critic: nn.Module,
        guidance: GuidanceRule | None,
        optimization: Optimization,
        critic_optimization: PlayerOptimization,
        evaluation: Evaluation,
        critic_steps: int = 1,
        critic_warmup: int = 0,
        space: ModelSpace | None = None,
    ):
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        if critic_steps < 1:
            raise ValueError(f"critic_steps={critic_steps}: give at least 1.")
        if critic_warmup < 0:
            raise ValueError(f"critic_warmup={critic_warmup}: give 0 or more.")
        self.critic, self.critic_optimization = critic, critic_optimization
        self.critic_steps, self.critic_warmup = critic_steps, critic_warmup
        if critic_optimization.gradient_checkpointing:
            checkpoint_gradients(critic, self.critic_key)

    @abstractmethod
    def critic_losses(self, batch: Batch) -> Losses:
        """The critic's losses on a batch, with gradient; ``loss`` is minimised."""

    def players(self) -> list[Player]:
        return [*super().players(), Player("critic", self.critic_losses, self.critic, self.critic_optimization)]

    def turn(self, step: int) -> int:
        round_step = step - self.critic_warmup
        return 0 if round_step >= 0 and round_step % (self.critic_steps + 1) == self.critic_steps else 1

    def player_step(self, index: int, step: int) -> int:
        student = max(step - self.critic_warmup, 0) // (self.critic_steps + 1)
        return student if index == 0 else step - student
