"""Grids of times, for samplers and for the pairs of consistency methods, laws over them, and curricula of their sizes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from distill.schedules import NoiseSchedule, VariancePreserving
from distill.times import TimeDistribution, check_positive
from distill.types import Time

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

    def starts(self, schedule: NoiseSchedule, steps: int) -> Time:
        """``steps`` times, all above ``t_min``: a grid that counts ``t_min`` among its points is asked for one more."""
        nodes = self.nodes(schedule, steps)
        return (nodes if len(nodes) > steps else self.nodes(schedule, steps + 1))[:-1]


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


class LeadingGrid(Grid):
    """DDIM's first indices of a DDPM schedule, ``i floor(num_steps / count)``: 800, 600, ..., 0 for 5 (Song et al. 2010.02502).

    The paper's own choice, which MMD-DDM keeps. A departure from what a `Grid` promises: the first point lies below ``t_max``,
    and is given unit noise all the same.

    Raises:
        ValueError: at `times`, a schedule without indices, or a single step, which would be called at 0 with nothing but noise.
    """

    def times(self, schedule: NoiseSchedule, count: int) -> Time:
        if not isinstance(schedule, VariancePreserving):
            raise ValueError(f"LeadingGrid: {schedule} is no DDPM schedule, whose indices it counts; give UniformGrid.")
        if not 2 <= count <= schedule.num_steps:
            raise ValueError(f"{count} steps of LeadingGrid: give 2 to {schedule.num_steps}; for one step, DiscreteGrid.")
        return torch.arange(count - 1, -1, -1, dtype=torch.float64) * (schedule.num_steps // count)


class KarrasGrid(Grid):
    """EDM's grid: ``sigma^(1/rho)`` in equal steps from ``sigma_max`` to ``sigma_min`` (Karras et al. 2206.00364, eq. 5).

    Args:
        rho: > 0; 7 in the paper.
        sigma_min, sigma_max: ends in noise-to-signal ratio; None takes the schedule's own (which must be finite and > 0).
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None):
        check_positive(rho=rho)
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


class GridTimes(TimeDistribution):
    """Uniform over the times at which a sampler of ``steps`` steps calls its network: what distillation into k steps trains.

    One step is the noise end alone (Liu et al. 2209.03003, section 2.2; InstaFlow, 2309.06380, equation 6).

    Args:
        steps: k, at least 1.
        grid: the sampler's; None for `UniformGrid`.
    """

    def __init__(self, steps: int, grid: Grid | None = None):
        if steps < 1:
            raise ValueError(f"steps={steps}: give at least one step.")
        self.steps, self.grid = steps, grid or UniformGrid()
        self._placed: dict[tuple, Time] = {}

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        if (key := (repr(schedule), device)) not in self._placed:  # copied to the device once, not at each step
            self._placed = {key: self.grid.starts(schedule, self.steps).float().to(device)}
        return self._placed[key][torch.randint(self.steps, (count,), device=device)]


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
