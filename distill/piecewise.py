"""Piecewise linear flows (PeRFlow, Yan et al. 2405.07510): windows of time, what a student predicts in one, and its sampler.

The schedule's time is cut into K equal windows. In a window from s down to e the teacher's flow takes x_s to x_e; the student
follows the chord between them:

    x_c = x_s + tau (x_e - x_s),   tau = (c - s) / (e - s) in [0, 1)

Its prediction p at x_c, made of its x0, means ``x_e = lambda x_s + eta p`` with two numbers of the window:

    velocity   p = the chord's velocity        lambda = 1                    eta = e - s, in shares of the schedule's range
    ddim_eps   p = a noise, kept by DDIM       lambda = alpha_e / alpha_s    eta = sigma_e - lambda sigma_s
    diff_eps   p = a noise, added from e to s  lambda = alpha_e / alpha_s    eta = -sqrt(lambda^2 sigma_s^2 - sigma_e^2)

The last is the paper's ``-sqrt(1 - gamma^2) / gamma, gamma = 1 / lambda`` where ``alpha^2 + sigma^2 = 1``. With the chord's
equation solved for x_s, each gives x_e back at any x_c: ``x_e = (lambda x_c + (1 - tau) eta p) / (1 - tau + tau lambda)``.

The last window ends at ``t_min``, and what is there is the sample: on a flow free of noise, on DDPM's indices with the little
of index 0, as in the published scheduler (magic-research/piecewise-rectified-flow, src/scheduler_perflow.py).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from distill.denoiser import Denoiser, refuse_own_noise
from distill.samplers import FreshNoise, Sampler
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, Sample, Time

Parameterisation = Literal["velocity", "ddim_eps", "diff_eps"]

LEAST_LEFT = 1e-3
"""Of a window, how much lies below any time drawn: a student's velocity divides by sigma, which is 0 at a flow's end."""

ROUNDING = 1e-4
"""Of a window, how far above its start a time still belongs to it: an edge may have been rounded up, to float32."""

LEAST_SIGNAL = 1e-6
"""An alpha below it is none: lambda, which divides by it, would leave nothing of x_s in float32."""


class PiecewiseLinear:
    """K windows of a schedule's time, and what a student predicts on their chords.

    Args:
        windows: K, at least 1; 4 in the paper.
        parameterisation: ``velocity``, ``ddim_eps`` or ``diff_eps``.

    Raises:
        ValueError: no window, or another parameterisation.
    """

    def __init__(self, windows: int = 4, parameterisation: Parameterisation = "velocity"):
        if windows < 1:
            raise ValueError(f"windows={windows}: give at least one; the paper has 4.")
        if parameterisation not in get_args(Parameterisation):
            raise ValueError(f"parameterisation={parameterisation!r}: give one of {', '.join(get_args(Parameterisation))}.")
        self.windows, self.parameterisation = windows, parameterisation

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises ValueError for a noise to be predicted on a schedule that starts without signal."""
        signal = float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)))
        if self.parameterisation != "velocity" and signal < LEAST_SIGNAL:
            raise ValueError(
                f"parameterisation={self.parameterisation!r}: {schedule!r} starts without signal (alpha={signal:.1g}), where a "
                "noise does not say what x_e is; set it to velocity, or give a schedule of DDPM's kind."
            )

    # ------------------------------------------------------------------------------------------------------------ times

    def edges(self, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        """``(K + 1,)`` float64, decreasing from ``t_max`` to ``t_min``, both exact.

        The published edges are DDPM's indices 999, 749, 499, 249 and 0; these are less than one index above.
        """
        return torch.linspace(schedule.t_max, schedule.t_min, self.windows + 1, dtype=torch.float64, device=device)

    def window(self, schedule: NoiseSchedule, t: Time) -> tuple[Time, Time]:
        """``(s, e)``, each ``(b,)``: start and end of the windows of times ``t``, ``e < t <= s``; ``t_min`` is in the last."""
        edges = self.edges(schedule, t.device)
        passed = (edges[0] - t.double()) / (edges[0] - edges[-1]) * self.windows
        number = (passed + ROUNDING).floor().clamp(0, self.windows - 1).long()
        return edges[number].to(t.dtype), edges[number + 1].to(t.dtype)

    def draw(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> tuple[Time, Time, Time]:
        """``(c, s, e)``, each ``(count,)`` float32: c uniform over the windows, and the window that it is in.

        The published times are 1/1000 (SDXL: 1/200) of the whole apart, and no window's end. Here c is continuous, and at least
        a thousandth of its window lies below it.
        """
        edges = self.edges(schedule, device).float()
        number = torch.randint(self.windows, (count,), device=device)
        s, e = edges[number], edges[number + 1]
        return s + (1 - LEAST_LEFT) * torch.rand(count, device=device) * (e - s), s, e

    # ------------------------------------------------------------------------------------------------------ predictions

    def coefficients(self, schedule: NoiseSchedule, s: Time, e: Time) -> tuple[Time, Time]:
        """``(lambda, eta)`` with ``x_e = lambda x_s + eta p``, each ``(b,)`` float64."""
        s, e = s.double(), e.double()
        if self.parameterisation == "velocity":
            return torch.ones_like(s), (e - s) / (schedule.t_max - schedule.t_min)
        signal = schedule.alpha(e) / schedule.alpha(s)
        kept, end = signal * schedule.sigma(s), schedule.sigma(e)
        return signal, end - kept if self.parameterisation == "ddim_eps" else -(kept**2 - end**2).sqrt()

    def target(self, schedule: NoiseSchedule, x_s: Sample, x_e: Sample, s: Time, e: Time) -> Sample:
        """p of the chord from ``x_s`` to ``x_e``, ``(b, *shape)``: ``(x_e - lambda x_s) / eta``."""
        signal, eta = self.coefficients(schedule, s, e)
        return (x_e - _like(signal, x_s) * x_s) / _like(eta, x_s)

    def prediction(self, schedule: NoiseSchedule, x_c: Sample, x0: Sample, c: Time) -> Sample:
        """p of a student whose x0 at ``(x_c, c)`` is ``x0``, ``(b, *shape)``; ``sigma(c) > 0``."""
        if self.parameterisation == "velocity":
            return (schedule.t_max - schedule.t_min) * schedule.velocity(x_c, x0, c)
        return schedule.eps(x_c, x0, c)

    def window_end(self, schedule: NoiseSchedule, x_c: Sample, p: Sample, c: Time, s: Time, e: Time) -> Sample:
        """``x_e``, ``(b, *shape)``, of the chord through ``x_c`` at time ``c`` on which the prediction is ``p``."""
        signal, eta = self.coefficients(schedule, s, e)
        left = (e.double() - c) / (e.double() - s)  # 1 - tau
        whole = left + (1 - left) * signal
        return _like(signal / whole, x_c) * x_c + _like(left * eta / whole, x_c) * p

    def step(self, denoiser: Denoiser, x: Sample, c: Time, u: Time, cond: Cond) -> Sample:
        """``x_u`` ``(b, *shape)`` on the denoiser's chord through ``x`` at ``c``; ``u`` lies in c's window or is its end."""
        schedule = denoiser.schedule
        s, e = self.window(schedule, c)
        p = self.prediction(schedule, x, denoiser(x, c, cond), c)
        return x + per_sample((u - c) / (e - c), x) * (self.window_end(schedule, x, p, c, s, e) - x)


def _like(factor: Tensor, x: Sample) -> Tensor:
    """A number a sample, in the precision of ``x`` and shaped to multiply it."""
    return per_sample(factor.to(x.dtype), x)


class PiecewiseSampler(Sampler):
    """Follows a student's chords: Euler's steps, at least one a window, those of a window equal in time.

    Steps are spread evenly over the windows; where they do not divide, the noisier windows have one more, as published.

    Args:
        windows: of the student, K.
        parameterisation: of the student.
    """

    def __init__(self, windows: int = 4, parameterisation: Parameterisation = "velocity"):
        self.flow = PiecewiseLinear(windows, parameterisation)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps: the constructor's arguments."""
        return dict(vars(self.flow))

    def takes(self, steps: int) -> bool:
        return steps >= self.flow.windows

    def times(self, schedule: NoiseSchedule, steps: int) -> Time:
        """The ends of the steps, ``(steps + 1,)`` float64, decreasing. Raises ValueError for fewer steps than windows."""
        windows = self.flow.windows
        if not self.takes(steps):
            raise ValueError(f"steps={steps}: the flow has {windows} windows, each takes a step; give at least {windows}.")
        edges, parts = self.flow.edges(schedule), []
        for number in range(windows):
            share = steps // windows + (number < steps % windows)
            s, e = edges[number : number + 2].tolist()
            parts.append(torch.linspace(s, e, share + 1, dtype=torch.float64)[:-1])
        return torch.cat([*parts, edges[-1:]])

    def __call__(
        self, denoiser: Denoiser, noise: Sample, cond: Cond, steps: int, fresh: FreshNoise = torch.randn_like
    ) -> Sample:
        refuse_own_noise(self, denoiser)
        denoiser = denoiser.trajectory(fresh)
        schedule = denoiser.schedule
        self.flow.check(schedule)
        times = self.times(schedule, steps).to(noise)
        x = schedule.prior_scale * noise
        for c, u in zip(times[:-1], times[1:], strict=True):
            x = self.flow.step(denoiser, x, c.repeat(len(x)), u.repeat(len(x)), cond)
        return x
