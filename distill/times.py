"""Distributions over training times.

All times are in the units of the schedule that is passed in. Draws use torch's global generator, which the method seeds at
each step from (seed, step, rank).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from distill.schedules import NoiseSchedule, VariancePreserving
from distill.types import Time


class TimeDistribution(ABC):
    """A law over training times."""

    @abstractmethod
    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        """``count`` independent times ``(count,)`` of ``schedule``, float32."""


class UnitInterval(TimeDistribution):
    """A law over u in [0, 1], carried to ``t_min + u (t_max - t_min)``."""

    @abstractmethod
    def unit(self, count: int, device: torch.device | None) -> Time:
        """``count`` draws in [0, 1]."""

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        return schedule.t_min + self.unit(count, device) * (schedule.t_max - schedule.t_min)


class UniformTimes(UnitInterval):
    """Uniform over the part ``[low, high]`` of the schedule.

    Args:
        low, high: fractions of the way from ``t_min`` to ``t_max``, ``0 <= low < high <= 1``.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0):
        _check_part(low, high)
        self.low, self.high = low, high

    def unit(self, count: int, device: torch.device | None) -> Time:
        return self.low + (self.high - self.low) * torch.rand(count, device=device)


class LogitNormalTimes(UnitInterval):
    """``u = sigmoid(mean + std n)``, n normal (Esser et al. 2403.03206, section 3.1)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        check_positive(std=std)
        self.mean, self.std = mean, std

    def unit(self, count: int, device: torch.device | None) -> Time:
        return torch.sigmoid(self.mean + self.std * torch.randn(count, device=device))


class UShapedTimes(UnitInterval):
    """Density proportional to ``exp(a u) + exp(a (1 - u))`` (rf++, Lee et al. 2405.20320, section 4.1).

    FlashAudio's second stage draws from it too, its first from `LogitNormalTimes` (2410.12266, "bifocal" samplers).

    Args:
        a: steepness, > 0; both papers use 4.
        margin: distance that is kept from both ends, in [0, 0.5); 1e-5 in rf++'s code.
    """

    def __init__(self, a: float = 4.0, margin: float = 1e-5):
        check_positive(a=a)
        if not 0 <= margin < 0.5:
            raise ValueError(f"margin={margin}: give a number in [0, 0.5).")
        self.a, self.margin = a, margin

    def unit(self, count: int, device: torch.device | None) -> Time:
        rising = torch.log1p(torch.rand(count, device=device) * math.expm1(self.a)) / self.a
        u = torch.where(torch.rand(count, device=device) < 0.5, rising, 1 - rising)
        return self.margin + (1 - 2 * self.margin) * u


class LogNormalTimes(TimeDistribution):
    """Logarithm of the noise-to-signal ratio is normal: ``ln(sigma / alpha) ~ N(mean, std^2)`` (EDM, 2206.00364, table 1).

    Draws beyond the schedule's ends become the ends.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        check_positive(std=std)
        self.mean, self.std = mean, std

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        nsr = torch.exp(self.mean + self.std * torch.randn(count, device=device))
        return schedule.time_of_nsr(nsr).clamp(schedule.t_min, schedule.t_max)


class KarrasTimes(TimeDistribution):
    """``nsr = (a + u (b - a))^rho``, ``a = sigma_min^(1/rho)``, ``b = sigma_max^(1/rho)``, u uniform in ``[low, high]``.

    ``nsr`` is the noise-to-signal ratio ``sigma / alpha``: the law whose quantiles are EDM's grid (Karras et al. 2206.00364,
    eq. 5, there from ``sigma_max`` down). SiD (Zhou et al. 2404.04057) trains with ``high=0.8``. DMD2 (Yin et al. 2405.14867)
    draws numbers 20 to 980 of 1000 such points: ``low=0.02, high=0.98``, here continuous. Draws beyond the schedule's ends
    become the ends.

    Args:
        low, high: part of the law, ``0 <= low < high <= 1``; 1 is the most noise.
        rho: > 0; 7 in the paper.
        sigma_min, sigma_max: ends in noise-to-signal ratio, ``0 < sigma_min < sigma_max``.
    """

    def __init__(
        self,
        low: float = 0.0,
        high: float = 1.0,
        rho: float = 7.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ):
        _check_part(low, high)
        check_positive(rho=rho)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max}: give 0 < sigma_min < sigma_max, both finite.")
        self.low, self.high, self.rho, self.sigma_min, self.sigma_max = low, high, rho, sigma_min, sigma_max

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        u = self.low + (self.high - self.low) * torch.rand(count, device=device)
        least, most = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        nsr = (least + u * (most - least)) ** self.rho
        return schedule.time_of_nsr(nsr).clamp(schedule.t_min, schedule.t_max)


class IndexTimes(TimeDistribution):
    """Uniform over the whole numbers ``low, ..., high``, both included: the indices of a DDPM schedule.

    SiD-LSG (Zhou et al. 2406.01561) trains on 20 to 979, DMD2 (Yin et al. 2405.14867) its generator on 20 to 980 and its fake
    score on 0 to 999.

    Args:
        low, high: ``0 <= low <= high``, at most the ``num_steps - 1`` of the schedule.
    """

    def __init__(self, low: int, high: int):
        if not 0 <= low <= high:
            raise ValueError(f"low={low} and high={high}: give whole numbers with 0 <= low <= high.")
        self.low, self.high = low, high

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        """``count`` times ``(count,)``. Raises ValueError for a schedule without indices, or with fewer than ``high + 1``."""
        if not isinstance(schedule, VariancePreserving):
            raise ValueError(f"IndexTimes on {schedule!r}: its times are not indices; give KarrasTimes or UniformTimes.")
        if self.high > schedule.t_max:
            raise ValueError(f"high={self.high}: the schedule's last index is {schedule.t_max:.0f}; give that or less.")
        return torch.randint(self.low, self.high + 1, (count,), device=device).float()


def check_positive(**values: float) -> None:
    """Raises ValueError for the first value that is not above 0, by its name."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value}: give a positive number.")


def _check_part(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low} and high={high}: give fractions with 0 <= low < high <= 1.")
