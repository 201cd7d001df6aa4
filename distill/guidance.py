"""Guidance: a rule turns a denoiser into a denoiser; methods, solvers and samplers never see the difference.

House convention: ``x0 = x0_null + scale (x0_cond - x0_null)``, so 1 is no guidance. Papers that write ``(1 + w) cond - w null``
(Ho & Salimans 2207.12598; latent consistency models) have ``scale = 1 + w``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.schedules import per_sample
from distill.types import Cond, Sample, Time


class GuidanceRule(ABC):
    """``rule(denoiser, null)`` is a denoiser that is guided away from ``null``."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, null: Cond) -> Denoiser:
        """The guided denoiser; ``null`` has the keys and shapes of its conditions will have, or one row for all."""

    def drawn(self, device: torch.device) -> GuidanceRule:
        """The rule of one batch: itself, unless something in it is random."""
        return self


@dataclass
class ClassifierFreeGuidance(GuidanceRule):
    """Classifier-free guidance (Ho & Salimans 2207.12598, eq. 6), both evaluations in one batched forward.

    With an interval (Kynkäänniemi et al. 2404.07724) only noise levels in ``(sigma_low, sigma_high]`` are guided.

    Attributes:
        scale: one number for all, as a tensor ``()`` if it was drawn, or one a sample ``(b,)``; the number 1 is no guidance
            and costs one evaluation.
        sigma_low, sigma_high: the interval, in noise-to-signal ratio; None leaves that side open.
    """

    scale: float | Tensor
    sigma_low: float | None = None
    sigma_high: float | None = None

    def __post_init__(self) -> None:
        if self.sigma_low is not None and self.sigma_high is not None and self.sigma_low >= self.sigma_high:
            raise ValueError(
                f"sigma_low={self.sigma_low} and sigma_high={self.sigma_high}: an empty interval; give sigma_low < sigma_high."
            )

    def __call__(self, denoiser: Denoiser, null: Cond) -> Denoiser:
        if isinstance(self.scale, float | int) and self.scale == 1:
            return denoiser
        if not null:
            raise ValueError(
                f"guidance.scale={self.scale}: the data carries no condition, so there is nothing to guide towards; "
                "set guidance to null, or give data with labels or prompts."
            )
        if denoiser.num_classes is not None and not denoiser.null_class:
            raise ValueError(
                f"guidance.scale={self.scale}: the network has {denoiser.num_classes} classes and no null class to be guided "
                "away from; set guidance to null."
            )
        return GuidedDenoiser(denoiser, null, self)

    def scale_at(self, nsr: Time) -> Tensor:
        """Guidance scale of each sample at its noise-to-signal ratio ``(b,)``."""
        inside = torch.ones_like(nsr, dtype=torch.bool)
        if self.sigma_low is not None:
            inside &= nsr > self.sigma_low
        if self.sigma_high is not None:
            inside &= nsr <= self.sigma_high
        return torch.where(inside, self.scale, 1.0).to(nsr.dtype)


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
        return ClassifierFreeGuidance((self.low + self.high) / 2)(denoiser, null)

    def drawn(self, device: torch.device) -> GuidanceRule:
        """Guidance by one scale for the whole batch, a tensor ``()`` on the device; each rank draws its own."""
        return ClassifierFreeGuidance(self.low + (self.high - self.low) * torch.rand((), device=device))


def check_null_share(probability: float, denoiser: Denoiser) -> None:
    """Raises ValueError for a share of samples without conditions that is none, or that the network has no null class for."""
    if not 0 <= probability < 1:
        raise ValueError(f"null_probability={probability}: give a share in [0, 1).")
    if probability and denoiser.num_classes is not None and not denoiser.null_class:
        raise ValueError(f"null_probability={probability}: the network has no null class; set it to 0.")


def drop_conditions(cond: Cond, null: Cond, probability: float) -> Cond:
    """``cond`` with rows replaced by those of ``null``, each sample's with ``probability``, all its conditions together.

    Raises:
        ValueError: conditions to drop, and no null conditions to put in their place.
    """
    if not cond or probability == 0:
        return cond
    if not null:
        raise ValueError(f"null_probability={probability}: the data delivers no null conditions; set it to 0.")
    rows = next(iter(cond.values()))
    dropped = torch.rand(len(rows), device=rows.device) < probability
    return {key: torch.where(per_sample(dropped, value), null[key], value) for key, value in cond.items()}


def guided(denoiser: Denoiser, cond: Cond, null: Cond, scale: float) -> tuple[Denoiser, Cond]:
    """A denoiser and its conditions at a guidance scale: given as an input to one that reads it, else classifier-free."""
    if "guidance" not in denoiser.scalar_inputs:
        return ClassifierFreeGuidance(scale)(denoiser, null), cond
    rows = next(iter(cond.values()))
    return denoiser, {**cond, "guidance": torch.full((len(rows),), float(scale), device=rows.device)}


class GuidedDenoiser(Denoiser):
    """A denoiser under a classifier-free guidance rule."""

    def __init__(self, base: Denoiser, null: Cond, rule: ClassifierFreeGuidance):
        super().__init__()
        self.base, self.null, self.rule = base, null, rule
        self.describe_as(base)

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        both = {key: torch.cat([value, self.null.get(key, value).expand_as(value)]) for key, value in cond.items()}
        twice_r = None if r is None else r.repeat(2)
        x0_cond, x0_null = self.base(torch.cat([x, x]), t.repeat(2), both, twice_r).chunk(2)
        scale = self.rule.scale_at(self.schedule.nsr(t))
        return x0_null + per_sample(scale, x) * (x0_cond - x0_null)
