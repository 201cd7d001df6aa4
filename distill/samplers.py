"""Samplers: few-step generation built of denoiser calls and solver steps, ``sampler(denoiser, noise, cond, steps) -> x0``.

Sample i depends on its own noise alone (`distill.noise.SeededNoise`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.denoiser import Denoiser, FreshNoise, refuse_own_noise
from distill.grids import Grid
from distill.schedules import per_sample
from distill.solvers import Solver
from distill.types import Cond, Sample, Time


class Sampler(ABC):
    """Turns unit noise into samples."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, fresh: FreshNoise = torch.randn_like
    ) -> Sample:
        """``x0`` ``(b, *shape)`` from unit ``noise`` in ``steps`` >= 1 steps; ``fresh`` supplies any further noise."""

    def takes(self, steps: int) -> bool:
        """Whether it can sample in so many steps; calls with others raise ValueError."""
        return steps >= 1


def _all(time: Tensor, x: Sample) -> Time:
    """A scalar time of the CPU for the whole batch, filled in on the device: copied to it, the device would be waited for."""
    return x.new_full((len(x),), float(time))


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: give at least one step.")


class OdeSampler(Sampler):
    """Follows the probability-flow ODE from ``t_max`` over the points of a grid; the last step is the denoiser itself.

    That last step is Euler's to zero noise, so ``steps`` of a one-evaluation solver are ``steps`` evaluations, and Heun's
    are ``2 steps - 1`` (Karras et al. 2206.00364).
    """

    def __init__(self, solver: Solver, grid: Grid):
        self.solver, self.grid = solver, grid

    def __call__(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, fresh: FreshNoise = torch.randn_like
    ) -> Sample:
        _check_steps(steps)
        denoiser = denoiser.trajectory(fresh)
        times = self.grid.times(denoiser.schedule, steps)
        x, memory = denoiser.schedule.prior_scale * noise, None
        for t, s in zip(times[:-1], times[1:], strict=True):
            x, memory = self.solver.advance(denoiser, x, _all(t, x), _all(s, x), cond, memory)
        return denoiser(x, _all(times[-1], x), cond)


class RenoiseSampler(Sampler):
    """Consistency models' multi-step sampling: denoise, add fresh noise of a lower level, denoise (2303.01469, algorithm 1).

    The noise has the whole level tau, as in ECT (2406.14548), not the paper's ``sqrt(tau^2 - t_min^2)``, which is the same to
    one part in 10^5 at the times in use.

    Args:
        grid: where the times lie if ``times`` does not say.
        times: times by number of steps, noisiest first, in the denoiser's schedule, for example ``{2: [80, 0.821]}``.
        clip: bound on ``|x0|`` after each call, as in the paper's pixel models; None for none.
        same_noise: whether the noise added is the one that sampling began with, every time: rf++'s update for straight flows,
            whose points know their noise (Lee et al. 2405.20320, section 5.3).
    """

    def __init__(
        self,
        grid: Grid,
        times: dict[int, list[float]] | None = None,
        clip: float | None = None,
        same_noise: bool = False,
    ):
        for steps, values in (times or {}).items():
            if len(values) != steps or sorted(values, reverse=True) != values:
                raise ValueError(f"times[{steps}]={values}: give {steps} decreasing times.")
        self.grid, self.times, self.clip, self.same_noise = grid, times or {}, clip, same_noise

    def __call__(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, fresh: FreshNoise = torch.randn_like
    ) -> Sample:
        _check_steps(steps)
        refuse_own_noise(self, denoiser)
        denoiser = denoiser.trajectory(fresh)
        schedule = denoiser.schedule
        if steps in self.times:
            times = torch.tensor(self.times[steps], dtype=torch.float64)
        else:
            times = self.grid.starts(schedule, steps)
        x = schedule.prior_scale * noise
        for step, time in enumerate(times):
            if step > 0:
                x = schedule.add_noise(x, noise if self.same_noise else fresh(x), _all(time, x))
            x = denoiser(x, _all(time, x), cond)
            x = x if self.clip is None else x.clamp(-self.clip, self.clip)
        return x


class JumpSampler(Sampler):
    """Jumps of a student with a second time: ``x_s = alpha_s x0(x_t, t, s) + sigma_s eps``, down a grid.

    With ``gamma`` > 0 the jump goes lower, to noise-to-signal ratio ``sqrt(1 - gamma^2)`` of the next, and fresh noise makes
    up the rest: CTM's gamma-sampling (Kim et al. 2310.02279, algorithm 2). 0 is deterministic, 1 re-noises entirely.

    Args:
        grid: the times at which the jumps start.
        gamma: in [0, 1].
    """

    def __init__(self, grid: Grid, gamma: float = 0.0):
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma}: give a number in [0, 1].")
        self.grid, self.gamma = grid, gamma

    def __call__(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, fresh: FreshNoise = torch.randn_like
    ) -> Sample:
        _check_steps(steps)
        denoiser = denoiser.trajectory(fresh)
        schedule = denoiser.schedule
        times = self.grid.starts(schedule, steps)
        end = times.new_tensor([schedule.t_min])
        x = schedule.prior_scale * noise
        for t, s in zip(times, torch.cat([times[1:], end]), strict=True):
            last = bool(s == schedule.t_min)
            low = s if last else schedule.time_of_nsr((1 - self.gamma**2) ** 0.5 * schedule.nsr(s))
            x0, eps = denoiser.x0_and_eps(x, _all(t, x), cond, _all(low, x))
            if last:
                return x0
            x = schedule.add_noise(x0, eps, _all(low, x))
            x = self._add_the_rest(x, denoiser, low, s, fresh)
        return x

    def _add_the_rest(self, x: Sample, denoiser: Denoiser, low: Tensor, s: Tensor, fresh: FreshNoise) -> Sample:
        """From ``x_low`` to ``x_s``: scale the signal and add what is missing of the noise's variance."""
        if self.gamma == 0:
            return x
        schedule = denoiser.schedule
        signal = schedule.alpha(s) / schedule.alpha(low)
        missing = (schedule.sigma(s) ** 2 - (signal * schedule.sigma(low)) ** 2).clamp(min=0).sqrt()
        return per_sample(_all(signal, x), x) * x + per_sample(_all(missing, x), x) * fresh(x)
