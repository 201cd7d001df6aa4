"""Independent condition guidance (ICG, Sadat et al. 2407.02687): away from a condition drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.guidance.evaluations import Memory, Query, unit_numbers
from distill.guidance.two_evaluations import TwoEvaluationRule
from distill.schedules import per_sample
from distill.types import Cond


@dataclass
class IndependentConditionGuidance(TwoEvaluationRule):
    """Classifier-free guidance of a network without a null condition: ``x0 = x0_random + scale (x0_cond - x0_random)``.

    The second evaluation has conditions that say nothing about the sample, drawn anew each time: a class out of all, the
    sample's own included, and for embeddings Gaussian noise of the standard deviation of the sample's own. Along a trajectory
    they are drawn from the sampler's source of noise, so that sample i is the same in any batch; elsewhere from torch's
    generator.

    Attributes:
        scale: as in `ClassifierFreeGuidance`.
        conditions: names of those that are drawn; None for ``labels`` and those whose name ends in ``_embeds``. Others, such as
            masks and sizes, stay as they are.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`.

    Raises:
        ValueError: an empty interval; a denoiser without conditions to draw, or a condition that is not there.
    """

    scale: float | Tensor
    conditions: list[str] | None = None
    sigma_low: float | None = None
    sigma_high: float | None = None

    away_from_null = False

    def __post_init__(self) -> None:
        self.check_interval()

    def check(self, denoiser: Denoiser, null: Cond) -> None:
        if denoiser.num_classes is None and not denoiser.widths:
            raise ValueError(
                f"guidance.scale={self.scale}: the network reads no condition that could be drawn; set guidance to null, or to "
                "TimeStepGuidance, which needs none."
            )

    def reference_conditions(self, denoiser: Denoiser, query: Query, null: Cond, memory: Memory | None) -> Cond:
        names = self.conditions
        if names is None:
            names = [name for name in query.cond if name == "labels" or name.endswith("_embeds")]
        if not names or (missing := [name for name in names if name not in query.cond]):
            raise ValueError(
                f"guidance.conditions={names if not names else missing}: the batch has {list(query.cond)}; name some of these."
            )
        return query.cond | {name: self.random(denoiser, name, query, memory) for name in names}

    def random(self, denoiser: Denoiser, name: str, query: Query, memory: Memory | None) -> Tensor:
        """A condition drawn for each sample, like ``query.cond[name]`` ``(b, ...)``."""
        value = query.cond[name]
        if value.is_floating_point():
            noise = unit_numbers(query.x, value[0].numel(), memory).reshape(value.shape).to(value)
            return noise * per_sample(value.flatten(1).std(1), value)
        if denoiser.num_classes is None:
            raise ValueError(f"guidance.conditions={[name]}: the network names no number of classes; leave it out.")
        uniform = torch.special.ndtr(unit_numbers(query.x, 1, memory)[:, 0].double())
        return (uniform * denoiser.num_classes).to(value.dtype).clamp(max=denoiser.num_classes - 1)
