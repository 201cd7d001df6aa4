"""Solvers of the probability-flow ODE: stateless, differentiable steps from times ``t`` to earlier times ``s``, batched.

A consistency method's teacher step and the multi-step sampler call the same code. ``order`` is the global order of
convergence; the tests hold each solver to it on every schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from distill.denoiser import Denoiser, refuse_own_noise
from distill.schedules import per_sample
from distill.types import Cond, Sample, Time


class Solver(ABC):
    """One step of an ODE solver."""

    order: int

    @abstractmethod
    def step(self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
        """``x_s`` from ``x_t``, ``(b, *shape)``; ``s <= t``, each ``(b,)``, in the denoiser's schedule, ``sigma(t) > 0``."""

    def advance(
        self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond, memory: Any = None
    ) -> tuple[Sample, Any]:
        """A step that may use what the last one returned: ``(x_s, memory)``. Single-step solvers remember nothing."""
        return self.step(denoiser, x, t, s, cond), None


class Euler(Solver):
    """``x_s = x_t + (s - t) dx/dt``: in the schedule's own time."""

    order = 1

    def step(self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
        refuse_own_noise(self, denoiser)
        slope = denoiser.schedule.velocity(x, denoiser(x, t, cond), t)
        return x + per_sample(s - t, x) * slope


class DDIM(Solver):
    """``x_s = alpha_s x0 + sigma_s eps`` (Song et al. 2010.02502, eq. 12 with eta = 0).

    The same on every schedule: it is Euler's step in ``x / alpha`` against ``sigma / alpha``.
    """

    order = 1

    def step(self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
        x0, eps = denoiser.x0_and_eps(x, t, cond)
        return denoiser.schedule.add_noise(x0, eps, s)


class Heun(Solver):
    """Euler's step, then the mean of the slopes at both ends (Karras et al. 2206.00364, algorithm 1); two evaluations.

    Where ``sigma(s)`` is zero the step is Euler's, as in the paper: the slope there is not defined.
    """

    order = 2

    def step(self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
        refuse_own_noise(self, denoiser)
        schedule, gap = denoiser.schedule, per_sample(s - t, x)
        slope = schedule.velocity(x, denoiser(x, t, cond), t)
        guess = x + gap * slope
        noisy = schedule.sigma(s) > 0
        end = torch.where(noisy, s, t)
        end_slope = schedule.velocity(guess, denoiser(guess, end, cond), end)
        return torch.where(per_sample(noisy, x), x + gap * (slope + end_slope) / 2, guess)


class DPMSolver2M(Solver):
    """DPM-Solver++(2M), data prediction (Lu et al. 2211.01095, algorithm 2); one evaluation.

    With ``lambda = ln(alpha / sigma)`` and ``h = lambda_s - lambda_t``: ``x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D``,
    ``D = x0 + (x0 - x0_last) h / (2 h_last)``. The first step, and `step` alone, is DDIM.
    """

    order = 2

    def step(self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
        return self.advance(denoiser, x, t, s, cond)[0]

    def advance(
        self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond, memory: Any = None
    ) -> tuple[Sample, Any]:
        refuse_own_noise(self, denoiser)
        schedule = denoiser.schedule
        x0 = denoiser(x, t, cond)
        nsr_t, nsr_s = schedule.nsr(t.double()), schedule.nsr(s.double())
        h = nsr_t.log() - nsr_s.log()
        data = x0
        if memory is not None:
            last_x0, last_h = memory
            # A last step to zero noise has infinite h; there the method falls back to first order, as diffusers' does.
            ratio = torch.where(h.isfinite(), h / (2 * last_h), 0.0).to(x0.dtype)
            data = x0 + per_sample(ratio, x0) * (x0 - last_x0)
        kept = (schedule.sigma(s) / schedule.sigma(t)).to(x.dtype)
        gained = (schedule.alpha(s) * -torch.expm1(-h)).to(x.dtype)
        return per_sample(kept, x) * x + per_sample(gained, x) * data, (x0, h)
