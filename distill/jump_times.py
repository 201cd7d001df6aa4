"""Times of inductive moment matching (Zhou et al. 2503.07565): laws of jumps from t to s, maps to the r between, a grid.

All times are in the units of the schedule that is passed in. Draws use torch's global generator, which the method seeds at
each step from (seed, step, rank).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from distill.grids import Grid
from distill.schedules import NoiseSchedule
from distill.times import check_positive
from distill.types import Time


class JumpTimes(ABC):
    """A law of jumps: t between two ends, then s by the same law between the lower end and t.

    Args:
        low, high: the ends; None for the schedule's own. The paper has 0.006 (CIFAR-10) or 0 (ImageNet) and 0.994 on its flow.
    """

    def __init__(self, low: float | None = None, high: float | None = None):
        self.low, self.high = low, high

    def ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """The ends in a schedule.

        Raises:
            ValueError: ends that are not the schedule's, or an upper one without any signal, where nsr is infinite.
        """
        low = schedule.t_min if self.low is None else self.low
        high = schedule.t_max if self.high is None else self.high
        if not schedule.t_min <= low < high <= schedule.t_max:
            raise ValueError(f"low={low}, high={high}: give times of {schedule}, {schedule.t_min} to {schedule.t_max}.")
        if not math.isfinite(nsr_at(schedule, high)):
            raise ValueError(f"high={high} of {schedule} is noise without signal; give less, e.g. 0.994 for a flow.")
        return low, high

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> tuple[Time, Time]:
        """``(t, s)``, each ``(count,)`` float32, ``s <= t``. Raises ValueError for ends that `ends` refuses."""
        low, high = self.ends(schedule)
        bottom = torch.full((count,), low, device=device)
        t = self.between(bottom, torch.full_like(bottom, high), schedule)
        return t, self.between(bottom, t, schedule)

    @abstractmethod
    def between(self, low: Time, high: Time, schedule: NoiseSchedule) -> Time:
        """A draw ``(b,)`` for each pair of ends ``(b,)``, within them."""


class UniformJumps(JumpTimes):
    """Both uniform in time: the paper's choice."""

    def between(self, low: Time, high: Time, schedule: NoiseSchedule) -> Time:
        return (low + (high - low) * torch.rand_like(low)).minimum(high)


class LogNormalJumps(JumpTimes):
    """Both with a normal logarithm of the noise-to-signal ratio, truncated to their ends.

    Args:
        mean, std: of ``ln(sigma / alpha)`` here; the paper's -1.1 and 2.0 are of it over the data's deviation ``sigma_d``.
        low, high: see `JumpTimes`.
    """

    def __init__(self, mean: float = -1.1, std: float = 2.0, low: float | None = None, high: float | None = None):
        super().__init__(low, high)
        check_positive(std=std)
        self.mean, self.std = mean, std

    def between(self, low: Time, high: Time, schedule: NoiseSchedule) -> Time:
        first, last = (torch.special.ndtr((schedule.nsr(t.double()).log() - self.mean) / self.std) for t in (low, high))
        share = first + (last - first) * torch.rand_like(low)
        nsr = (self.mean + self.std * torch.special.ndtri(share)).exp()
        return schedule.time_of_nsr(nsr).to(low.dtype).maximum(low).minimum(high)


class JumpMap(ABC):
    """The time r, not above t, from which the target of a jump from t sets out."""

    @abstractmethod
    def __call__(self, t: Time, s: Time, ends: tuple[float, float], schedule: NoiseSchedule) -> Time:
        """``r`` ``(b,)``, ``s <= r <= t``; ``ends`` are those of the law of t."""


class Decrement(JumpMap):
    """``u_r = u_t - (u_high - u_low) / 2^k``, not below ``u_s``; u is the noise-to-signal ratio, as in the paper, or the time.

    In the ratio, r is s for all but high noise: 166 / 2^12 is the ratio of t = 0.04. In time, steps are equal everywhere.

    Args:
        k: >= 0; the paper has 12 on ImageNet and 15 on CIFAR-10.
        unit: ``nsr`` or ``time``.
    """

    def __init__(self, k: int = 12, unit: Literal["nsr", "time"] = "nsr"):
        if k < 0:
            raise ValueError(f"k={k}: give 0 or more; steps are 2^-k of the whole way.")
        self.k, self.unit = k, unit

    def __call__(self, t: Time, s: Time, ends: tuple[float, float], schedule: NoiseSchedule) -> Time:
        low, high = ends
        if self.unit == "time":
            r = t - (high - low) / 2**self.k
        else:
            step = (nsr_at(schedule, high) - nsr_at(schedule, low)) / 2**self.k
            r = schedule.time_of_nsr((schedule.nsr(t.double()) - step).clamp(min=0)).to(t.dtype)
        return r.minimum(t).maximum(s)


def nsr_at(schedule: NoiseSchedule, time: float) -> float:
    """Noise-to-signal ratio at a time; infinite where there is no signal."""
    return float(schedule.nsr(torch.tensor(time, dtype=torch.float64)))


class CutGrid(Grid):
    """Equal steps from ``high``, not the schedule's end, down to its ``t_min``; or times that are given.

    A departure from what a `Grid` promises: the first time is ``high``, at which unit noise is what sampling starts from all
    the same. Inductive moment matching is trained up to 0.994 on its flow, and starts there.

    Args:
        high: the first time, above ``t_min``.
        times: times by number of steps, noisiest first, instead: ``{2: [0.994, 0.583]}``.
    """

    def __init__(self, high: float, times: dict[int, list[float]] | None = None):
        for steps, values in (times or {}).items():
            if len(values) != steps or sorted(values, reverse=True) != values:
                raise ValueError(f"times[{steps}]={values}: give {steps} decreasing times.")
        self.high, self.given = high, times or {}

    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        """``count`` times ``(count,)``, float64. Raises ValueError for a first one that is not of the schedule."""
        if not schedule.t_min < self.high <= schedule.t_max:
            raise ValueError(f"high={self.high}: give a time of {schedule}, at most {schedule.t_max}.")
        start = float(schedule.sigma(torch.tensor(self.high, dtype=torch.float64)))
        if abs(schedule.prior_scale / start - 1) > 0.02:
            raise ValueError(
                f"high={self.high}: sampling starts from noise of deviation {schedule.prior_scale:.4g}, that of {schedule} "
                f"there is {start:.4g}; give a time nearer to {schedule.t_max}."
            )
        if count in self.given:
            return torch.tensor(self.given[count], dtype=torch.float64)
        ways: Tensor = torch.linspace(self.high, schedule.t_min, count + 1, dtype=torch.float64)
        return ways[:-1]
