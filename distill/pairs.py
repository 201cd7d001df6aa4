"""Pairs of times between which a consistency method asks its student to agree.

All times are in the units of the schedule that is passed in. Draws use torch's global generator, which the method seeds at
each step from (seed, step, rank).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.grids import Curriculum, Grid
from distill.schedules import NoiseSchedule
from distill.times import TimeDistribution
from distill.types import Time


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
