"""Adaptive guidance (Castillo et al. 2312.12487): no second evaluation once both predictions agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distill.denoiser import Denoiser
from distill.guidance.evaluations import Evaluations, Memory, Some
from distill.guidance.spaces import Space, check_space, to_space
from distill.guidance.two_evaluations import TwoEvaluationRule
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, Time


@dataclass
class AdaptiveGuidance(TwoEvaluationRule):
    """Classifier-free guidance of each sample until the cosine of its two predictions passes a threshold.

    From that evaluation on a sample follows its condition alone, for the rest of the trajectory at one evaluation a call.
    Where there is no trajectory (a teacher at a random time) each evaluation is decided by itself, and nothing is saved.

    Attributes:
        scale: as in `ClassifierFreeGuidance`.
        threshold: of the cosine over a sample's elements, in (-1, 1]; the paper's is about 0.991.
        space: the type of prediction that is compared; noise in the paper. Noise predictions agree where there is little
            signal too: a flow, which starts without any, is refused, and on schedules that start near that (EDM's) ``x0``,
            whose cosine only rises, is the safe choice.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`.

    Raises:
        ValueError: another threshold, or an empty interval; a flow and ``eps``.
    """

    scale: float | Tensor
    threshold: float = 0.991
    space: Space = "eps"
    sigma_low: float | None = None
    sigma_high: float | None = None

    def __post_init__(self) -> None:
        self.check_interval()
        if not -1 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: give a cosine in (-1, 1], e.g. 0.991.")

    def check(self, denoiser: Denoiser, null: Cond) -> None:
        super().check(denoiser, null)
        check_space("guidance.space", self.space, denoiser.schedule)

    def guided_samples(self, schedule: NoiseSchedule, t: Time, memory: Memory | None) -> Tensor | None:
        inside = super().guided_samples(schedule, t, memory)
        if memory is None or "stopped" not in memory.values:
            return inside
        going = ~memory.values["stopped"]
        return going if inside is None else inside & going

    def combine(self, both: Evaluations) -> Some:
        query, schedule = both.query, both.schedule
        sides = [to_space(self.space, schedule, query.x, x0, query.t) for x0 in (both.x0, both.reference)]
        stopped = cosine_similarity(sides[0].flatten(1), sides[1].flatten(1)) > self.threshold
        both.keep("stopped", stopped)
        guided = super().combine(both)
        return torch.where(per_sample(stopped, guided), both.x0, guided)
