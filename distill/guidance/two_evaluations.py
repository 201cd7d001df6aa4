"""Rules of two evaluations: one forward for both, and a noise interval outside of which the second is not made."""

from __future__ import annotations

from dataclasses import is_dataclass, replace

import torch
from torch import Tensor

from distill.denoiser import Denoiser, FreshNoise
from distill.guidance.evaluations import Evaluations, Memory, Query, Some
from distill.guidance.rule import GuidanceRule
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, Sample, Time


class TwoEvaluationRule(GuidanceRule):
    """Makes one ``x0`` of the denoiser's own and a reference's; outside of a noise interval the denoiser's stays as it is.

    Attributes:
        scale: one number for all, as a tensor ``()`` if it was drawn, or one a sample ``(b,)``.
        sigma_low, sigma_high: the interval ``(sigma_low, sigma_high]`` (Kynkäänniemi et al. 2404.07724), in noise-to-signal
            ratio; None leaves that side open. If one is set, each evaluation asks the device once which samples are inside, and
            the network is given no second row for the others.
    """

    scale: float | Tensor
    sigma_low: float | None
    sigma_high: float | None

    own_noise = False
    """Whether the solver's noise is what the reference leaves, not the guided ``x0``."""

    away_from_null = True
    """Whether the reference is the null condition, which data and network must then have."""

    unguided_at_1 = True
    """Whether scale 1 is the denoiser itself, in one evaluation."""

    def __call__(self, denoiser: Denoiser, null: Cond) -> Denoiser:
        if self.unguided_at_1 and isinstance(self.scale, float | int) and self.scale == 1:
            return denoiser
        self.check(denoiser, null)
        return GuidedDenoiser(denoiser, null, self)

    def check(self, denoiser: Denoiser, null: Cond) -> None:
        """Raises ValueError for a denoiser or null conditions that this rule cannot guide by."""
        if not self.away_from_null:
            return
        if not null:
            raise ValueError(
                f"guidance.scale={self.scale}: the data carries no condition, so there is nothing to guide towards; "
                "set guidance to null, or give data with labels or prompts."
            )
        if denoiser.num_classes is not None and not denoiser.null_class:
            raise ValueError(
                f"guidance.scale={self.scale}: the network has {denoiser.num_classes} classes and no null class to be guided "
                "away from; set guidance to null, or to IndependentConditionGuidance, which needs none."
            )

    def at(self, scale: float | Tensor) -> GuidanceRule:
        """The same rule at another scale."""
        assert is_dataclass(self)
        return replace(self, scale=scale)  # type: ignore[type-var]

    def check_interval(self) -> None:
        """Raises ValueError for an interval without a noise level in it."""
        if self.sigma_low is not None and self.sigma_high is not None and self.sigma_low >= self.sigma_high:
            raise ValueError(
                f"sigma_low={self.sigma_low} and sigma_high={self.sigma_high}: an empty interval; give sigma_low < sigma_high."
            )

    def inside(self, nsr: Time) -> Tensor | None:
        """Whether each noise-to-signal ratio ``(b,)`` lies in the interval, ``(b,)``; None if no interval is set."""
        if self.sigma_low is None and self.sigma_high is None:
            return None
        inside = torch.ones_like(nsr, dtype=torch.bool)
        if self.sigma_low is not None:
            inside &= nsr > self.sigma_low
        if self.sigma_high is not None:
            inside &= nsr <= self.sigma_high
        return inside

    def guided_samples(self, schedule: NoiseSchedule, t: Time, memory: Memory | None) -> Tensor | None:
        """Which samples ``(b,)`` are evaluated twice at times ``t``; None for all, without a look at the device."""
        return self.inside(schedule.nsr(t))

    def scale_at(self, schedule: NoiseSchedule, query: Query, rows: Tensor | None) -> Tensor:
        """The guidance scale of the samples with numbers ``rows`` ``(k,)``, whose arguments are ``query``: ``(k,)``."""
        dtype, device = torch.promote_types(query.x.dtype, torch.float32), query.x.device
        if not isinstance(self.scale, Tensor):
            return torch.full((len(query),), float(self.scale), dtype=dtype, device=device)
        scale = self.scale.to(device, dtype)
        return scale.expand(len(query)) if scale.dim() == 0 else scale if rows is None else scale[rows]

    def reference_conditions(self, denoiser: Denoiser, query: Query, null: Cond, memory: Memory | None) -> Cond:
        """The conditions of the second evaluation, a row for each sample of the batch: those of ``null`` where it has them."""
        return {key: null.get(key, value).expand_as(value) for key, value in query.cond.items()}

    def evaluate(
        self, denoiser: Denoiser, query: Query, null: Cond, rows: Tensor | None, memory: Memory | None
    ) -> tuple[Sample, Some]:
        """``x0`` of the batch and the reference of the samples with numbers ``rows``, from one forward of both."""
        second = replace(query, cond=self.reference_conditions(denoiser, query, null, memory)).take(rows)
        values = query.joined(second).asked(denoiser)
        return values[: len(query)], values[len(query) :]

    def combine(self, both: Evaluations) -> Some:
        """The guided ``x0`` ``(k, *shape)``: ``reference + scale (x0 - reference)``, unless a rule says otherwise."""
        return both.reference + both.scale * (both.x0 - both.reference)


class GuidedDenoiser(Denoiser):
    """A denoiser under a rule of two evaluations; ``memory`` is there on a trajectory only."""

    def __init__(self, base: Denoiser, null: Cond, rule: TwoEvaluationRule, memory: Memory | None = None):
        super().__init__()
        self.base, self.null, self.rule, self.memory = base, null, rule, memory
        self.describe_as(base)
        self.own_noise = rule.own_noise

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        return self.both(Query(x, t, cond, r))[0]

    def x0_and_eps(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> tuple[Sample, Sample]:
        if not self.own_noise:
            return super().x0_and_eps(x, t, cond, r)
        x0, reference = self.both(Query(x, t, cond, r))
        return x0, self.schedule.eps(x, reference, t)

    def both(self, query: Query) -> tuple[Sample, Sample]:
        """The guided ``x0`` and what it is guided away from, each ``(b, *shape)``; the latter is ``x0`` where unguided."""
        guided = self.rule.guided_samples(self.schedule, query.t, self.memory)
        rows = None if guided is None else guided.nonzero()[:, 0]
        x0, reference = self.rule.evaluate(self.base, query, self.null, rows, self.memory)
        if rows is not None and len(rows) == 0:
            return x0, x0
        some = query.take(rows)
        scale = per_sample(self.rule.scale_at(self.schedule, some, rows), x0)
        own = x0 if rows is None else x0[rows]
        made = self.rule.combine(Evaluations(some, own, reference, scale, self.schedule, rows, len(query), self.memory))
        return (made, reference) if rows is None else (x0.index_copy(0, rows, made), x0.index_copy(0, rows, reference))

    def trajectory(self, fresh: FreshNoise) -> Denoiser:
        return GuidedDenoiser(self.base.trajectory(fresh), self.null, self.rule, Memory(fresh))
