"""Two steps of DDIM as one: the grids, the rounds and the target of progressive distillation (Salimans & Ho 2202.00512).

DDIM moves ``x / sigma`` in proportion to its estimate of the clean sample: from t to s, with ``q = alpha / sigma``,

    x_s / sigma_s = x_t / sigma_t + (q_s - q_t) x0

so that steps t -> t' -> t'' with the estimates x1 and x2 land where a single step from t to t'' with this estimate lands:

    x* = a x2 + (1 - a) x1,   a = (q'' - q') / (q'' - q) in (0, 1)

The paper's form of it, ``x* = (x'' - r x) / (alpha'' - r alpha)`` with ``r = sigma'' / sigma`` (algorithm 2), subtracts what is
nearly equal when steps are short. The last step ends without noise, where q is infinite and a = 1: the student's last call is
its sample, and the target the teacher's own last estimate.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.grids import Grid
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, PerSample, Sample, Time


class Rounds:
    """How many steps the student of each round takes, and how long it is trained.

    Args:
        start_steps: of the first round's student; its teacher takes twice as many.
        end_steps: of the last round's, ``start_steps`` halved some number of times, or as many for a single round.
        round_steps: optimiser steps of every round, or of each.

    Raises:
        ValueError: ``end_steps`` is not reached by halving; a round without steps; another number of rounds.

    Attributes:
        steps: sampling steps of the students.
        lengths: optimiser steps of the rounds.
        firsts: the optimiser step, from 0, that each begins with.
    """

    def __init__(self, start_steps: int, end_steps: int, round_steps: int | Sequence[int]):
        times, rest = divmod(start_steps, end_steps) if end_steps >= 1 else (0, 0)
        if times < 1 or rest or times & (times - 1):
            raise ValueError(
                f"start_steps={start_steps} and end_steps={end_steps}: give end_steps >= 1 and start_steps = 1, 2, 4, 8 ... "
                "times as many."
            )
        self.steps = [start_steps >> halvings for halvings in range(times.bit_length())]
        self.lengths = [round_steps] * len(self.steps) if isinstance(round_steps, int) else list(round_steps)
        if len(self.lengths) != len(self.steps) or min(self.lengths) < 1:
            raise ValueError(
                f"round_steps={round_steps}: give one positive number, or one for each of the {len(self.steps)} rounds, whose "
                f"students take {self.steps} steps."
            )
        self.firsts = [0, *accumulate(self.lengths)][:-1]

    @property
    def total(self) -> int:
        """Optimiser steps of all rounds."""
        return sum(self.lengths)

    def index(self, step: int) -> int:
        """The round, from 0, of a 0-based optimiser step; the last one has no end."""
        return bisect_right(self.firsts, step) - 1


class Halved(NamedTuple):
    """Times ``(b,)`` of a student's step and of the teacher's two, in the precision of the sample.

    Attributes:
        t: where both begin.
        middle: where the teacher's second begins.
        end: where both land; the schedule's least noise for the last step, which is the sample itself.
        share: a, of the teacher's second estimate in the target; 1 for the last step.
        per_noise: what a unit of noise that the denoiser sees in x, other than what x0 leaves there, adds to the target:
            ``1 / (q'' - q)``, 0 for the last step.
    """

    t: Time
    middle: Time
    end: Time
    share: PerSample
    per_noise: PerSample


class HalvedGrid:
    """The steps of a student that takes ``steps`` of them over a grid, and of its teacher, which takes two for each.

    Raises:
        ValueError: a grid whose times for ``steps`` are not every other of those for twice as many.
    """

    def __init__(self, grid: Grid, schedule: NoiseSchedule, steps: int):
        times = grid.times(schedule, 2 * steps)
        own = grid.times(schedule, steps)
        if len(times) != 2 * len(own) or not torch.allclose(times[::2], own, rtol=1e-9, atol=1e-9):
            raise ValueError(
                f"grid={type(grid).__name__}: its {steps} times on {schedule} are not every other of its {2 * steps}, so that "
                "two steps of the teacher do not make one of the student; give one that halves, such as UniformGrid."
            )
        ratio = schedule.alpha(times) / schedule.sigma(times)
        gap = ratio[2::2] - ratio[:-2:2]
        one, end = times.new_ones(1), times.new_full((1,), schedule.t_min)
        self.steps = steps
        self.columns = torch.stack(
            [
                times[::2],
                times[1::2],
                torch.cat([times[2::2], end]),
                torch.cat([(ratio[2::2] - ratio[1:-1:2]) / gap, one]),
                torch.cat([1 / gap, 0 * one]),
            ]
        )
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, index: Tensor, x: Sample) -> Halved:
        """The student's steps number ``index`` ``(b,)``, from 0, for samples like ``x``."""
        if (key := (x.device, x.dtype)) not in self._placed:  # copied to the device once, not at each step
            self._placed = {key: self.columns.to(x)}
        return Halved(*self._placed[key][:, index])

    def draw(self, x: Sample) -> Halved:
        """A step for each of ``x`` ``(b, *shape)``, uniform over all."""
        return self.at(torch.randint(self.steps, (len(x),), device=x.device), x)


def two_step_target(teacher: Denoiser, x: Sample, steps: Halved, cond: Cond) -> Sample:
    """x* ``(b, *shape)``: the x0 with which one step of DDIM from ``x`` lands where two of the teacher's do.

    Two evaluations. A teacher with a noise of its own (CFG++) steps along that: ``d / (q'' - q)`` is added for the noises d by
    which its two exceed those that its estimates leave.
    """
    schedule = teacher.schedule
    first, noise = teacher.x0_and_eps(x, steps.t, cond)
    middle = schedule.add_noise(first, noise, steps.middle)
    if not teacher.own_noise:
        second = teacher(middle, steps.middle, cond)
        return per_sample(steps.share, x) * second + per_sample(1 - steps.share, x) * first
    second, last_noise = teacher.x0_and_eps(middle, steps.middle, cond)
    excess = noise - schedule.eps(x, first, steps.t) + last_noise - schedule.eps(middle, second, steps.middle)
    mean = per_sample(steps.share, x) * second + per_sample(1 - steps.share, x) * first
    return mean + per_sample(steps.per_noise, x) * excess
