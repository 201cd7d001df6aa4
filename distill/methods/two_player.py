"""Methods with two players: a student and a critic (a fake score, a discriminator) that take turns."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.guidance import GuidanceRule
from distill.methods.base import Method
from distill.methods.trained import Player, trained_parameters
from distill.optimization import Optimization
from distill.space import ModelSpace
from distill.types import Batch, Losses


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
        space: ModelSpace | None = None,
    ):
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        if critic_steps < 1:
            raise ValueError(f"critic_steps={critic_steps}: give at least 1.")
        self.critic, self.critic_optimization, self.critic_steps = critic, critic_optimization, critic_steps

    @abstractmethod
    def critic_losses(self, batch: Batch) -> Losses:
        """The critic's losses on a batch, with gradient; ``loss`` is minimised."""

    def players(self) -> list[Player]:
        critic = Player("critic", self.critic_losses, trained_parameters(self.critic), self.critic_optimization)
        return [*super().players(), critic]

    def turn(self, step: int) -> int:
        return 0 if step % (self.critic_steps + 1) == self.critic_steps else 1

    def player_step(self, index: int, step: int) -> int:
        student = step // (self.critic_steps + 1)
        return student if index == 0 else step - student
