"""Classifier-free guidance, plain and with what is put around it: an interval, a weight that changes in time, rescaling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.guidance.evaluations import Evaluations, Query, Some
from distill.guidance.rule import GuidanceRule
from distill.guidance.spaces import Space, check_space, from_space, to_space
from distill.guidance.two_evaluations import TwoEvaluationRule
from distill.guidance.weights import GuidanceWeight
from distill.schedules import NoiseSchedule
from distill.types import Cond


@dataclass
class ClassifierFreeGuidance(TwoEvaluationRule):
    """Classifier-free guidance (Ho & Salimans 2207.12598, eq. 6), both evaluations in one batched forward.

    It is linear, hence the same on predictions of any type; the rescaling of Lin et al. (2305.08891, section 3.4) is not:
    ``rescale`` of the guided prediction is brought to the standard deviation that the conditional one has, over a sample's
    elements.

    Attributes:
        scale: one number for all, as a tensor ``()`` if it was drawn, or one a sample ``(b,)``; the number 1 is no guidance
            and costs one evaluation.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`.
        weight: how ``scale - 1`` changes in time; None for not at all.
        rescale: phi, in [0, 1]; the paper has 0.7.
        rescale_space: the type of prediction that is rescaled; v is the paper's.

    Raises:
        ValueError: an empty interval, or phi outside of [0, 1].
    """

    scale: float | Tensor
    sigma_low: float | None = None
    sigma_high: float | None = None
    weight: GuidanceWeight | None = None
    rescale: float = 0.0
    rescale_space: Space = "v"

    def __post_init__(self) -> None:
        self.check_interval()
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale}: give a share in [0, 1].")

    def check(self, denoiser: Denoiser, null: Cond) -> None:
        super().check(denoiser, null)
        if self.weight is not None:
            self.weight.check(denoiser.schedule)
        if self.rescale:
            check_space("guidance.rescale_space", self.rescale_space, denoiser.schedule)

    def scale_at(self, schedule: NoiseSchedule, query: Query, rows: Tensor | None) -> Tensor:
        scale = super().scale_at(schedule, query, rows)
        return scale if self.weight is None else 1 + self.weight(scale - 1, schedule, query.t).to(scale.dtype)

    def combine(self, both: Evaluations) -> Some:
        guided = super().combine(both)
        return self.rescaled(guided, both) if self.rescale else guided

    def rescaled(self, guided: Some, both: Evaluations) -> Some:
        """``guided`` with ``rescale`` of its deviation replaced by that of the denoiser's own prediction."""
        query, space = both.query, self.rescale_space
        made = to_space(space, both.schedule, query.x, guided, query.t)
        own = to_space(space, both.schedule, query.x, both.x0, query.t)
        elements = tuple(range(1, made.dim()))
        ratio = own.std(elements, keepdim=True) / made.std(elements, keepdim=True)
        factor = 1 + self.rescale * (ratio - 1)
        return from_space(space, both.schedule, query.x, factor * made, query.t)


@dataclass
class RandomGuidance(GuidanceRule):
    """Classifier-free guidance at a scale drawn for each batch, uniform in [low, high]: SNOOPI's PG-SB (2412.02687).

    The paper's ranges are 0.5 to 4 for Stable Diffusion 1.5 and 2.1, 0.5 to 3 for PixArt-alpha. Called itself, as when a
    teacher is sampled for comparison, it guides by the middle of its range.

    Attributes:
        low, high: the range, ``0 <= low < high``.

    Raises:
        ValueError: another range.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"low={self.low} and high={self.high}: give 0 <= low < high, or ClassifierFreeGuidance for one scale."
            )

    def __call__(self, denoiser: Denoiser, null: Cond) -> Denoiser:
        return self.at((self.low + self.high) / 2)(denoiser, null)

    def drawn(self, device: torch.device) -> GuidanceRule:
        """Guidance by one scale for the whole batch, a tensor ``()`` on the device; each rank draws its own."""
        return self.at(self.low + (self.high - self.low) * torch.rand((), device=device))

    def at(self, scale: float | Tensor) -> GuidanceRule:
        """Classifier-free guidance at this scale."""
        return ClassifierFreeGuidance(scale)
