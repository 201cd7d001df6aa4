"""Distributions over training times, discretisation grids and their curricula, pairs of times and weights ``w(t)``.

All times are in the units of the schedule that is passed in. Draws use torch's global generator, which the method seeds at
each step from (seed, step, rank).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.schedules import NoiseSchedule
from distill.types import PerSample, Time

# ---------------------------------------------------------------------------------------------------- distributions


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
        if not 0 <= low < high <= 1:
            raise ValueError(f"low={low} and high={high}: give fractions with 0 <= low < high <= 1.")
        self.low, self.high = low, high

    def unit(self, count: int, device: torch.device | None) -> Time:
        return self.low + (self.high - self.low) * torch.rand(count, device=device)


class LogitNormalTimes(UnitInterval):
    """``u = sigmoid(mean + std n)``, n normal (Esser et al. 2403.03206, section 3.1)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        _positive(std=std)
        self.mean, self.std = mean, std

    def unit(self, count: int, device: torch.device | None) -> Time:
        return torch.sigmoid(self.mean + self.std * torch.randn(count, device=device))


class UShapedTimes(UnitInterval):
    """Density proportional to ``exp(a u) + exp(a (1 - u))`` (rf++, Lee et al. 2405.20320, section 4.1).

    Args:
        a: steepness, > 0; the paper uses 4.
    """

    def __init__(self, a: float = 4.0):
        _positive(a=a)
        self.a = a

    def unit(self, count: int, device: torch.device | None) -> Time:
        rising = torch.log1p(torch.rand(count, device=device) * math.expm1(self.a)) / self.a
        return torch.where(torch.rand(count, device=device) < 0.5, rising, 1 - rising)


class LogNormalTimes(TimeDistribution):
    """Logarithm of the noise-to-signal ratio is normal: ``ln(sigma / alpha) ~ N(mean, std^2)`` (EDM, 2206.00364, table 1).

    Draws beyond the schedule's ends become the ends.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        _positive(std=std)
        self.mean, self.std = mean, std

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        nsr = torch.exp(self.mean + self.std * torch.randn(count, device=device))
        return schedule.time_of_nsr(nsr).clamp(schedule.t_min, schedule.t_max)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value}: give a positive number.")


# ------------------------------------------------------------------------------------------------------------ grids


class Grid(ABC):
    """Where a sampler evaluates its network, or a consistency method places its pairs."""

    @abstractmethod
    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        """``count`` decreasing times ``(count,)`` in float64, the first is ``t_max``."""

    def nodes(self, schedule: NoiseSchedule, count: int) -> Time:
        """``times`` with ``t_min`` as the last one: appended if it is not there."""
        times = self.times(schedule, count)
        return times if float(times[-1]) <= schedule.t_min else torch.cat([times, times.new_tensor([schedule.t_min])])


class UniformGrid(Grid):
    """``count`` equal steps from ``t_max`` to ``t_min``, which itself is not a point: ``t_max, ..., t_min + one step``."""

    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        return torch.linspace(schedule.t_max, schedule.t_min, count + 1, dtype=torch.float64)[:-1]


class DiscreteGrid(Grid):
    """DDIM's "trailing" indices of a DDPM schedule, ``round((i + 1) num_steps / count) - 1``: 999, 979, ..., 19 for 50.

    The grid on which latent consistency models are trained (Luo et al. 2310.04378).
    """

    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        steps = schedule.t_max + 1
        return torch.round(torch.arange(count, 0, -1, dtype=torch.float64) * steps / count) - 1


class KarrasGrid(Grid):
    """EDM's grid: ``sigma^(1/rho)`` in equal steps from ``sigma_max`` to ``sigma_min`` (Karras et al. 2206.00364, eq. 5).

    Args:
        rho: > 0; 7 in the paper.
        sigma_min, sigma_max: ends in noise-to-signal ratio; None takes the schedule's own (which must be finite and > 0).
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None):
        _positive(rho=rho)
        self.rho, self.sigma_min, self.sigma_max = rho, sigma_min, sigma_max

    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        ends = schedule.nsr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).tolist()
        high = ends[0] if self.sigma_max is None else self.sigma_max
        low = ends[1] if self.sigma_min is None else self.sigma_min
        if not 0 < low < high < math.inf:
            raise ValueError(
                f"KarrasGrid from sigma_max={high} to sigma_min={low}: the schedule's own ends are not positive and finite; "
                "set sigma_min and sigma_max of the grid, for example 0.002 and 80."
            )
        roots = torch.linspace(high ** (1 / self.rho), low ** (1 / self.rho), count, dtype=torch.float64)
        times = schedule.time_of_nsr(roots**self.rho)
        # The schedule's own ends exactly, not with the rounding of the roots: at t_min a method stops and takes the sample.
        if self.sigma_min is None:
            times[-1] = schedule.t_min
        if self.sigma_max is None:
            times[0] = schedule.t_max
        return times


# --------------------------------------------------------------------------------------------------------- curricula


class Curriculum(ABC):
    """Number of grid points as a function of the training step."""

    @abstractmethod
    def points(self, step: int) -> int:
        """Grid points at 0-based ``step``, at least 2."""


class ConstantPoints(Curriculum):
    """The same number of points throughout, as in consistency distillation.

    Args:
        count: at least 2; consistency models use 18 on CIFAR-10 and 40 on ImageNet-64.
    """

    def __init__(self, count: int = 18):
        if count < 2:
            raise ValueError(f"count={count}: a grid of times has at least 2 points.")
        self.count = count

    def points(self, step: int) -> int:
        return self.count


class SquareRootPoints(Curriculum):
    """``N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1`` (CT, Song et al. 2303.01469, appendix C)."""

    def __init__(self, total_steps: int, start: int = 2, end: int = 150):
        _rising_curriculum(total_steps, start, end)
        self.total_steps, self.start, self.end = total_steps, start, end

    def points(self, step: int) -> int:
        done = min(step / self.total_steps, 1.0)
        return math.ceil(math.sqrt(done * ((self.end + 1) ** 2 - self.start**2) + self.start**2) - 1) + 1


class DoublingPoints(Curriculum):
    """``N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = floor(K / (log2 floor(s1/s0) + 1))`` (improved CT, 2310.14189, eq. 9)."""

    def __init__(self, total_steps: int, start: int = 10, end: int = 1280):
        _rising_curriculum(total_steps, start, end)
        self.start, self.end = start, end
        self.stage = max(1, math.floor(total_steps / (math.log2(end // start) + 1)))

    def points(self, step: int) -> int:
        return min(self.start * 2 ** (step // self.stage), self.end) + 1


def _rising_curriculum(total_steps: int, start: int, end: int) -> None:
    if total_steps < 1 or not 2 <= start <= end:
        raise ValueError(f"total_steps={total_steps}, start={start}, end={end}: give total_steps >= 1, 2 <= start <= end.")


# -------------------------------------------------------------------------------------------------------------- pairs


class TimePairs(ABC):
    """Pairs ``u < t`` between which a consistency method asks its student to agree."""

    @abstractmethod
    def sample(
        self, count: int, step: int, schedule: NoiseSchedule, device: torch.device | None = None
    ) -> tuple[Time, Time]:
        """``(t, u)``, each ``(count,)`` float32, at 0-based training ``step``; ``u`` may be at or below ``t_min``: the data."""


class GridPairs(TimePairs):
    """Neighbours on a grid: ``t = t_i, u = t_{i+skip}``, i uniform, or in proportion to a log-normal law of the noise level.

    Args:
        grid: where the points lie.
        points: how many, as a function of the step.
        skip: how many grid steps lie between t and u, >= 1 (the k of latent consistency models).
        log_normal: ``(mean, std)`` of ``ln(sigma / alpha)``; interval i is drawn with the mass this law gives it, as improved
            consistency training does with (-1.1, 2.0) (2310.14189, eq. 10). None draws i uniformly.
    """

    def __init__(
        self,
        grid: Grid,
        points: Curriculum,
        skip: int = 1,
        log_normal: tuple[float, float] | None = None,
    ):
        if skip < 1:
            raise ValueError(f"skip={skip}: give the number of grid steps between the two times, at least 1.")
        self.grid, self.points, self.skip, self.log_normal = grid, points, skip, log_normal
        self._placed: dict[tuple, tuple[Tensor, Tensor | None]] = {}

    def sample(
        self, count: int, step: int, schedule: NoiseSchedule, device: torch.device | None = None
    ) -> tuple[Time, Time]:
        nodes, masses = self.placed(self.points.points(step), schedule, device)
        if masses is None:
            index = torch.randint(len(nodes) - 1, (count,), device=device)
        else:
            index = torch.multinomial(masses, count, replacement=True)
        return nodes[index], nodes[(index + self.skip).clamp(max=len(nodes) - 1)]

    def placed(
        self, points: int, schedule: NoiseSchedule, device: torch.device | None
    ) -> tuple[Tensor, Tensor | None]:
        """The nodes, float32, and the masses of the intervals, on the device: made once for each number of points."""
        key = (points, repr(schedule), device)
        if key not in self._placed:
            nodes = self.grid.nodes(schedule, points)
            masses = None if self.log_normal is None else self.interval_masses(nodes, schedule).to(device)
            self._placed = {key: (nodes.float().to(device), masses)}
        return self._placed[key]

    def interval_masses(self, nodes: Time, schedule: NoiseSchedule) -> Tensor:
        """Probability that the log-normal law gives to each of the ``len(nodes) - 1`` intervals, not normalised."""
        assert self.log_normal is not None
        mean, std = self.log_normal
        cumulative = torch.erf((schedule.nsr(nodes).log() - mean) / (math.sqrt(2) * std))
        return cumulative[:-1] - cumulative[1:]


class RatioPairs(TimePairs):
    """Easy consistency tuning (Geng et al. 2406.14548): noise levels ``s_u = s_t max(0, 1 - n(s_t) / q^(a+1))``.

    ``n(s) = 1 + k sigmoid(-b s)``, stage ``a = step // stage_steps``, ``s_t`` from ``times``. At stage 0 many ``u`` are the
    data itself, so that training begins as denoising and tightens to consistency. Departure: "the data" is ``t_min``, the
    least level of the schedule, not 0, as everywhere in this package; and ``s_t`` is at least twice that level.

    Args:
        times: law of t; log-normal (-1.1, 2.0) on CIFAR-10 and (-0.8, 1.6) on ImageNet-64.
        q: how fast the ratio tightens, > 1: 2 on CIFAR-10 (256 in the one-hour recipe), 4 on ImageNet-64.
        stage_steps: steps a stage; the paper has 8 stages on CIFAR-10 and 4 on ImageNet-64.
        k, b: shape of n.
    """

    def __init__(
        self, times: TimeDistribution, stage_steps: int, q: float = 2.0, k: float = 8.0, b: float = 1.0
    ):
        if q <= 1 or stage_steps < 1:
            raise ValueError(f"q={q}, stage_steps={stage_steps}: give q > 1 and stage_steps >= 1.")
        self.times, self.stage_steps, self.q, self.k, self.b = times, stage_steps, q, k, b

    def sample(
        self, count: int, step: int, schedule: NoiseSchedule, device: torch.device | None = None
    ) -> tuple[Time, Time]:
        t = self.times.sample(count, schedule, device)
        # Not below twice the schedule's least level, where u may be: weights divide by the gap between the two.
        floor = 2 * schedule.nsr(torch.full_like(t, schedule.t_min))
        level = schedule.nsr(t)
        t, level = torch.where(level < floor, schedule.time_of_nsr(floor), t), torch.maximum(level, floor)
        mapping = 1 + self.k * torch.sigmoid(-self.b * level)
        lower = level * (1 - mapping / self.q ** (step // self.stage_steps + 1)).clamp(min=0)
        # Levels that no time of the schedule has become t_min, which the method takes for the data.
        return t, schedule.time_of_nsr(lower)


# ------------------------------------------------------------------------------------------------------------ weights


class Weight(ABC):
    """Weight of a sample's loss from its times."""

    @abstractmethod
    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        """Weights ``(b,)`` at ``t`` (for consistency losses, with the lower time ``u``)."""


class ConstantWeight(Weight):
    """1 everywhere."""

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        return torch.ones_like(t)


class InverseGapWeight(Weight):
    """``1 / (s_t - s_u)`` in noise-to-signal ratio (improved consistency training, 2310.14189, section 3.4)."""

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        return 1 / (schedule.nsr(t) - schedule.nsr(u))


class KarrasWeight(Weight):
    """EDM's ``(s^2 + sigma_data^2) / (s sigma_data)^2``, s the noise-to-signal ratio (2206.00364, table 1; ECT too)."""

    def __init__(self, sigma_data: float = 0.5):
        _positive(sigma_data=sigma_data)
        self.sigma_data = sigma_data

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        level = schedule.nsr(t)
        return (level**2 + self.sigma_data**2) / (level * self.sigma_data) ** 2
