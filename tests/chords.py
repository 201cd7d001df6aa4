"""The piecewise linear flow of Gaussian data: a window's flow map is affine, so that a point of a chord tells the chord."""

from __future__ import annotations

import torch
from oracle import Gaussian
from torch import nn

from distill.denoiser import Denoiser
from distill.frozen import Frozen
from distill.piecewise import PiecewiseLinear
from distill.schedules import per_sample
from distill.solvers import Solver
from distill.types import Cond, Sample, Time


class ExactFlow(Solver):
    """The exact flow map of a Gaussian."""

    order = 99

    def step(self, denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
        assert isinstance(denoiser, Gaussian)
        return denoiser.flow(x, t, s)


class Chords(Denoiser):
    """The student whose prediction is that of the chord between the ends of the flow, for each parameterisation.

    Spreads change in a window by their ratio to a power: 1 is the exact student.
    """

    def __init__(self, teacher: Gaussian, flow: PiecewiseLinear, power: float = 1.0):
        super().__init__()
        self.schedule, self.shape, self.teacher, self.flow = teacher.schedule, teacher.shape, Frozen(teacher), flow
        self.power = nn.Parameter(torch.tensor(power, dtype=torch.float64))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        schedule, wide, c = self.schedule, x.double(), t.double()
        s, e = self.flow.window(schedule, c)
        (a_s, b_s, mean, variance), (a_e, b_e, *_) = (self.teacher.module.scales(wide, each) for each in (s, e))
        ratio = ((a_e**2 * variance + b_e**2) / (a_s**2 * variance + b_s**2)).sqrt() ** self.power
        tau = per_sample((c - s) / (e - s), x)
        off = (wide - (1 - tau) * a_s * mean - tau * a_e * mean) / (1 - tau + tau * ratio)
        x_s, x_e = a_s * mean + off, a_e * mean + ratio * off
        alpha, sigma = (per_sample(value, x) for value in (schedule.alpha(c), schedule.sigma(c)))
        if self.flow.parameterisation == "velocity":
            d_alpha, d_sigma = (per_sample(value, x) for value in schedule.derivatives(c))
            velocity = (x_e - x_s) / per_sample(e - s, x)
            return ((velocity - d_sigma / sigma * wide) / (d_alpha - d_sigma / sigma * alpha)).to(x.dtype)
        if self.flow.parameterisation == "ddim_eps":
            noise = (x_e / a_e - x_s / a_s) / (b_e / a_e - b_s / a_s)
        else:
            noise = (x_s - a_s / a_e * x_e) / (b_s**2 - (a_s / a_e * b_e) ** 2).sqrt()
        return ((wide - sigma * noise) / alpha).to(x.dtype)
