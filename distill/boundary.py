"""Boundary conditions of consistency functions: ``f(x, t) = skip(t) x + out(t) D(x, t)`` with ``f(x, t_min) = x``."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from distill.denoiser import Denoiser
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, Sample, Time


class Boundary(ABC):
    """How a consistency function is made of a denoiser."""

    @abstractmethod
    def coefficients(self, schedule: NoiseSchedule, t: Time) -> tuple[Time, Time]:
        """``(skip, out)`` at ``t``, each ``(b,)`` in float64."""


class NoBoundary(Boundary):
    """``f = D``: for networks that are the identity at the end by themselves (a flow at t = 0), and for ECT."""

    def coefficients(self, schedule: NoiseSchedule, t: Time) -> tuple[Time, Time]:
        wide = t.double()
        return torch.zeros_like(wide), torch.ones_like(wide)


class KarrasBoundary(Boundary):
    """Consistency models' change to EDM's preconditioning (Song et al. 2303.01469, appendix C), for any denoiser.

    EDM's ``D = c_skip x + c_out F`` gives F, and ``f = c'_skip x + c'_out F`` with ``c'_skip = sigma_data^2 / ((s - s_min)^2 +
    sigma_data^2)``, ``c'_out = (s - s_min) sigma_data / sqrt(s^2 + sigma_data^2)``, s the noise-to-signal ratio. Eliminating F:
    ``f = (c'_skip - (1 - s_min / s) c_skip) x / alpha + (1 - s_min / s) D``.

    Args:
        sigma_data: standard deviation of the data, > 0.
    """

    def __init__(self, sigma_data: float = 0.5):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data={sigma_data}: give a positive number.")
        self.sigma_data = sigma_data

    def coefficients(self, schedule: NoiseSchedule, t: Time) -> tuple[Time, Time]:
        wide = t.double()
        alpha, sigma, variance = schedule.alpha(wide), schedule.sigma(wide), self.sigma_data**2
        # The formula with numerators and denominators multiplied by alpha, which vanishes at a flow's noise end; where sigma
        # vanishes there is no least noise either, and D alone is the limit.
        above = sigma - schedule.nsr(torch.full_like(wide, schedule.t_min)) * alpha
        out = torch.where(sigma > 0, above / sigma, 1.0)
        signal = variance * alpha**2
        return variance * alpha * (1 / (above**2 + signal) - out / (sigma**2 + signal)), out


class ScaledBoundary(Boundary):
    """Latent consistency models': ``skip = sigma_data^2 / ((a t)^2 + sigma_data^2)``, ``out = a t / sqrt(...)`` of the same.

    t is the DDPM index (Luo et al. 2310.04378, as in diffusers' training script: ``out`` has no factor sigma_data).

    Args:
        sigma_data: 0.5 in the paper.
        scaling: a, the "timestep scaling", 10 in the paper.
    """

    def __init__(self, sigma_data: float = 0.5, scaling: float = 10.0):
        if sigma_data <= 0 or scaling <= 0:
            raise ValueError(f"sigma_data={sigma_data}, scaling={scaling}: give positive numbers.")
        self.sigma_data, self.scaling = sigma_data, scaling

    def coefficients(self, schedule: NoiseSchedule, t: Time) -> tuple[Time, Time]:
        scaled = self.scaling * (t.double() - schedule.t_min)
        total = scaled**2 + self.sigma_data**2
        return self.sigma_data**2 / total, scaled / total.sqrt()


class ConsistencyFunction(Denoiser):
    """A denoiser with a boundary condition; itself a denoiser, so that samplers take it."""

    def __init__(self, base: Denoiser, boundary: Boundary):
        super().__init__()
        self.base, self.boundary = base, boundary
        self.describe_as(base)

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        skip, out = self.boundary.coefficients(self.schedule, t)
        x0 = self.base(x, t, cond, r)
        return per_sample(skip, x).to(x0.dtype) * x + per_sample(out, x).to(x0.dtype) * x0
