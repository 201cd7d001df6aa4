"""Weights ``w(t)`` of a sample's loss, in the space of clean samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from distill.denoiser import Prediction, coefficients
from distill.schedules import NoiseSchedule
from distill.times import check_positive
from distill.types import PerSample, Time


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
        check_positive(sigma_data=sigma_data)
        self.sigma_data = sigma_data

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        level = schedule.nsr(t)
        return (level**2 + self.sigma_data**2) / (level * self.sigma_data) ** 2


class PredictionWeight(Weight):
    """Makes the squared error of x0 that of what a network of a prediction type predicts: ``1 / out(t)^2``.

    ``x0 = skip x + out F``, so that the errors of two x0 at the same ``x`` are ``out`` times those of F
    (`distill.denoiser.coefficients`): ``(alpha / sigma)^2`` for ``eps``, ``((alpha + sigma) / sigma)^2`` for ``flow``,
    `KarrasWeight` for ``edm`` where ``alpha`` is 1, and 1 for ``x0``. Infinite where ``sigma`` is 0, but for ``x0``.

    Args:
        prediction: x0, eps, v, flow or edm.
        sigma_data: standard deviation of the data, > 0, used by ``edm``.
        alpha_power: the weight is multiplied by ``alpha^alpha_power``; SwiftBrush (Nguyen & Tran 2312.05239) weights the
            error of the noise by ``alpha^2``.
    """

    def __init__(self, prediction: Prediction, sigma_data: float = 0.5, alpha_power: int = 0):
        check_positive(sigma_data=sigma_data)
        self.prediction, self.sigma_data, self.alpha_power = prediction, sigma_data, alpha_power

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        alpha = schedule.alpha(t)
        out = coefficients(self.prediction, alpha, schedule.sigma(t), self.sigma_data)[2]
        return alpha**self.alpha_power / out**2


class PowerWeight(Weight):
    """``alpha^a sigma^b``; rf++ weights its premetric on a flow by ``1 - t``, a = 1 (2405.20320, section 4.2).

    Args:
        alpha: a.
        sigma: b; below 0 the weight is infinite where ``sigma`` is 0.
    """

    def __init__(self, alpha: float = 0.0, sigma: float = 0.0):
        self.alpha, self.sigma = alpha, sigma

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        return schedule.alpha(t) ** self.alpha * schedule.sigma(t) ** self.sigma


class TruncatedSnrWeight(Weight):
    """``max(alpha^2 / sigma^2, 1)`` (Salimans & Ho 2202.00512, section 4, "truncated SNR"; Meng et al. 2210.03142).

    It makes the squared error of x0 the greater of that and of the squared error of the noise, sample by sample: two x0 at the
    same ``x`` are ``sigma / alpha`` times as far apart as their noises.
    """

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        return (schedule.alpha(t) / schedule.sigma(t)).square().clamp(min=1)


class SnrPlusOneWeight(Weight):
    """``1 + alpha^2 / sigma^2`` (Salimans & Ho 2202.00512, section 4): where the variance is preserved, the error of v."""

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        return 1 + (schedule.alpha(t) / schedule.sigma(t)).square()


class VariationalScoreWeight(Weight):
    """``alpha sigma`` on x0, which is ``sigma^2`` on the difference of the noises (VSD as in SwiftBrush, 2312.05239)."""

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        return schedule.alpha(t) * schedule.sigma(t)


class SigmoidWeight(Weight):
    """``1/2 sigmoid(b - lambda) (-dlambda/dt) alpha^a / (alpha^2 + sigma^2)``, ``lambda = ln(alpha^2 / sigma^2)``.

    Of inductive moment matching (Zhou et al. 2503.07565, section 4.3), whose sigma multiplies noise of standard deviation
    ``sigma_data``. alpha and sigma are first scaled to ``alpha + sigma / sigma_data = 1``, the paper's flow, so that a schedule
    of the same noise-to-signal ratios has the same weight. Written without the quotients that are infinite at the ends, where
    the weight is finite (for a >= 1).

    Args:
        a: 2 on ImageNet in the paper, 1 on CIFAR-10.
        b: 4 on ImageNet, 5 on CIFAR-10.
        sigma_data: > 0; 1 for data that was divided by its deviation.
    """

    def __init__(self, a: float = 2.0, b: float = 4.0, sigma_data: float = 1.0):
        check_positive(sigma_data=sigma_data)
        self.a, self.b, self.sigma_data = a, b, sigma_data

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> PerSample:
        wide = t.double()
        alpha, sigma = schedule.alpha(wide), schedule.sigma(wide) / self.sigma_data
        d_alpha, d_sigma = schedule.derivatives(wide)
        growth = d_sigma / self.sigma_data * alpha - d_alpha * sigma  # -dlambda/dt is twice this over alpha sigma
        shares = (sigma**2 + math.exp(-self.b) * alpha**2) * (alpha**2 + sigma**2) * (alpha + sigma) ** (self.a - 2)
        return (sigma * growth * alpha ** (self.a - 1) / shares).to(t.dtype)
