"""Noise schedules: ``x_t = alpha(t) x0 + sigma(t) eps``, larger ``t`` is noisier, ``t_max`` is where sampling starts.

Two schedules describe the same noisy sample, up to a scale, when their noise-to-signal ratios ``nsr = sigma / alpha`` are
equal. The *noise angle* ``atan2(sigma, alpha)`` in [0, pi/2] says the same and stays finite where ``alpha`` vanishes, so
the change from one schedule to another goes through it (as FastGen's TrigFlow conversion does).

Derivatives in time are taken by forward-mode automatic differentiation; conversions run in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from distill.types import Sample, Time

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``value`` ``(b,)`` with trailing dimensions of size one: it multiplies ``like`` ``(b, *shape)`` sample by sample."""
    return value.reshape(-1, *[1] * (like.dim() - 1))


class NoiseSchedule(ABC):
    """A signal scale and a noise scale as functions of time. Stateless; all methods are differentiable in ``t``.

    Attributes:
        t_min: least noisy time that networks of this schedule are trained on.
        t_max: noisiest time, where sampling starts.
    """

    t_min: float
    t_max: float

    def settings(self) -> dict[str, float | str]:
        """The constructor's arguments that define this schedule."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def same_as(self, other: NoiseSchedule) -> bool:
        """Whether both are the same schedule: equal kind and equal settings."""
        return type(self) is type(other) and self.settings() == other.settings()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.settings().items())})"

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at times ``t`` of any shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at times ``t`` of any shape."""

    @abstractmethod
    def time_of_angle(self, angle: Tensor) -> Tensor:
        """The time, float64, whose noise angle is ``angle`` (any shape, float64, [0, pi/2]); beyond the ends, the end."""

    def angle(self, t: Tensor) -> Tensor:
        """Noise angle ``atan2(sigma, alpha)`` in [0, pi/2], any shape, float64: in float32 pi/2 would lie beyond pi/2."""
        wide = t.double()
        return torch.atan2(self.sigma(wide), self.alpha(wide)).clamp(0, math.pi / 2)

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio ``sigma / alpha``: the "sigma" of an EDM network at the same noise level."""
        return self.sigma(t) / self.alpha(t)

    def time_of_nsr(self, nsr: Tensor) -> Tensor:
        """The time whose noise-to-signal ratio is ``nsr``; inverse of ``nsr`` between ``t_min`` and ``t_max``."""
        return self.time_of_angle(torch.atan(nsr.double())).to(nsr.dtype)

    def scale(self, t: Tensor) -> Tensor:
        """``sqrt(alpha^2 + sigma^2)``: what ``x_t`` is multiplied by, next to the unit-scale sample of the same noise angle."""
        return torch.hypot(self.alpha(t), self.sigma(t))

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the Gaussian from which sampling starts at ``t_max``."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def network_time(self, t: Tensor) -> Tensor:
        """The number that the published networks of this schedule read as their time input."""
        return t

    def add_noise(self, x0: Sample, eps: Sample, t: Time) -> Sample:
        """``x_t = alpha(t) x0 + sigma(t) eps``."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    def eps(self, x: Sample, x0: Sample, t: Time) -> Sample:
        """The noise that turns ``x0`` into ``x`` at ``t``: ``(x - alpha x0) / sigma``; ``t`` must have ``sigma > 0``."""
        return (x - per_sample(self.alpha(t), x) * x0) / per_sample(self.sigma(t), x)

    def score(self, x: Sample, x0: Sample, t: Time) -> Sample:
        """Score of the noisy marginal if ``x0`` is the posterior mean: ``(alpha x0 - x) / sigma^2`` (Tweedie)."""
        return -self.eps(x, x0, t) / per_sample(self.sigma(t), x)

    def velocity(self, x: Sample, x0: Sample, t: Time) -> Sample:
        """``dx/dt`` of the probability-flow ODE: ``alpha'(t) x0 + sigma'(t) eps`` (Lipman et al. 2210.02747, eq. 10)."""
        d_alpha, d_sigma = self.derivatives(t)
        return per_sample(d_alpha, x) * x0 + per_sample(d_sigma, x) * self.eps(x, x0, t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha'(t), sigma'(t))`` by forward-mode differentiation, same shape as ``t``."""
        ones = torch.ones_like(t)
        return torch.func.jvp(self.alpha, (t,), (ones,))[1], torch.func.jvp(self.sigma, (t,), (ones,))[1]


class VarianceExploding(NoiseSchedule):
    """``alpha = 1, sigma = t``: EDM's schedule (Karras et al. 2206.00364), time is the noise level itself.

    Args:
        sigma_min: least noise level, > 0.
        sigma_max: largest noise level.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max}: give 0 < sigma_min < sigma_max.")
        self.t_min, self.t_max = sigma_min, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def time_of_angle(self, angle: Tensor) -> Tensor:
        return torch.tan(angle).clamp(self.t_min, self.t_max)

    def network_time(self, t: Tensor) -> Tensor:
        """EDM's ``c_noise = ln(sigma) / 4``."""
        return t.log() / 4


class RectifiedFlow(NoiseSchedule):
    """``alpha = 1 - w, sigma = w`` with ``w = shift t / (1 + (shift - 1) t)``, t in [0, 1], 1 is noise.

    Liu et al. 2209.03003 (there time runs the other way); the shift is that of SD3 (Esser et al. 2403.03206, eq. 23):
    equal steps of ``t`` then spend more of the path at high noise.

    Args:
        shift: > 0; 1 is the plain flow.
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, shift: float = 1.0):
        if shift <= 0:
            raise ValueError(f"shift={shift}: give a positive number (1 is the plain rectified flow).")
        self.shift = shift

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def time_of_angle(self, angle: Tensor) -> Tensor:
        noise = torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))
        return noise / (self.shift - (self.shift - 1) * noise)

    def network_time(self, t: Tensor) -> Tensor:
        """``1000 sigma(t)``, as SD3, Flux and Sana read it."""
        return 1000 * self.sigma(t)


class TrigFlow(NoiseSchedule):
    """``alpha = cos t, sigma = sigma_data sin t``, t in [0, pi/2] (Lu & Song 2410.11081).

    Args:
        sigma_data: standard deviation of the data, > 0.
    """

    # The largest float32 below pi/2: rounded up instead, the signal would change its sign.
    t_min, t_max = 0.0, float(torch.nextafter(torch.tensor(math.pi / 2), torch.tensor(0.0)))

    def __init__(self, sigma_data: float = 0.5):
        if sigma_data <= 0:
            raise ValueError(f"sigma_data={sigma_data}: give the standard deviation of the data, a positive number.")
        self.sigma_data = sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def time_of_angle(self, angle: Tensor) -> Tensor:
        return torch.atan2(torch.sin(angle), self.sigma_data * torch.cos(angle)).clamp(max=self.t_max)


class VariancePreserving(NoiseSchedule):
    """DDPM's discrete schedule, ``alpha_n = sqrt(prod_{i<=n} (1 - beta_i))`` (Ho et al. 2006.11239), made continuous in ``n``.

    Time is the index that DDPM networks read, ``t`` in [0, num_steps - 1]. At whole numbers ``alpha`` and ``sigma`` are the
    published ones to float64; in between the logarithm of the noise-to-signal ratio is a natural cubic spline, so that the
    schedule is twice differentiable and ``alpha^2 + sigma^2 = 1`` everywhere.

    Args:
        betas: ``linear``; ``scaled_linear`` (linear in the root, Stable Diffusion); ``cosine`` (Nichol & Dhariwal
            2102.09672, betas clipped at 0.999; ``beta_start`` and ``beta_end`` are not read).
        beta_start: first beta.
        beta_end: last beta.
        num_steps: number of discrete times, at least 3.
    """

    def __init__(
        self, betas: BetaSchedule = "linear", beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000
    ):
        if num_steps < 3:
            raise ValueError(f"num_steps={num_steps}: give at least 3 discrete times.")
        if betas != "cosine" and not 0 < beta_start < beta_end < 1:
            raise ValueError(f"beta_start={beta_start} and beta_end={beta_end}: give 0 < beta_start < beta_end < 1.")
        self.betas, self.beta_start, self.beta_end, self.num_steps = betas, beta_start, beta_end, num_steps
        self.t_min, self.t_max = 0.0, float(num_steps - 1)
        # Built here and not at the first call, which may be inside a functorch transform, where tensors have no storage.
        self._placed = {torch.device("cpu"): self._fit_spline()}

    def _make_betas(self) -> Tensor:
        """The discrete betas ``(num_steps,)`` in float64."""
        if self.betas == "linear":
            return torch.linspace(self.beta_start, self.beta_end, self.num_steps, dtype=torch.float64)
        if self.betas == "scaled_linear":
            roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_steps, dtype=torch.float64)
            return roots**2
        if self.betas == "cosine":
            n = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
            alpha_bar = torch.cos((n + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        raise ValueError(f"betas={self.betas!r}: give one of 'linear', 'scaled_linear', 'cosine'.")

    def _fit_spline(self) -> tuple[Tensor, Tensor]:
        """``ln(sigma / alpha)`` at whole numbers ``(num_steps,)``; the cubics ``(4, num_steps - 1)``, highest power first."""
        from scipy.interpolate import CubicSpline

        log_alpha_bar = torch.log1p(-self._make_betas()).cumsum(0)
        knots = 0.5 * (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar)
        spline = CubicSpline(range(self.num_steps), knots.numpy(), bc_type="natural")
        return knots, torch.from_numpy(spline.c)

    def _spline(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Knots and cubics on a device, moved there once."""
        if device not in self._placed:
            knots, cubics = self._placed[torch.device("cpu")]
            self._placed[device] = (knots.to(device), cubics.to(device))
        return self._placed[device]

    def log_nsr(self, t: Tensor) -> Tensor:
        """``ln(sigma / alpha)`` in float64; times outside of the schedule follow its first and last piece."""
        piece = t.detach().floor().clamp(0, self.num_steps - 2).long()
        return self._cubic(piece, t.double() - piece)[0]

    def _cubic(self, piece: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope of the spline at ``offset`` in [0, 1] of the pieces with these numbers."""
        c3, c2, c1, c0 = self._spline(piece.device)[1][:, piece]
        return c0 + offset * (c1 + offset * (c2 + offset * c3)), c1 + offset * (2 * c2 + offset * 3 * c3)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self.log_nsr(t)).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self.log_nsr(t)).sqrt().to(t.dtype)

    def time_of_angle(self, angle: Tensor) -> Tensor:
        knots, _ = self._spline(angle.device)
        target = torch.log(torch.tan(angle)).clamp(knots[0], knots[-1])
        goal = target.detach().contiguous()
        piece = (torch.searchsorted(knots, goal) - 1).clamp(0, self.num_steps - 2)
        low, high = torch.zeros_like(goal), torch.ones_like(goal)
        offset = (goal - knots[piece]) / (knots[piece + 1] - knots[piece])
        # A piece is monotone: Newton's steps, each kept inside the bracket that the values so far have shown.
        for _ in range(8):
            value, slope = self._cubic(piece, offset)
            low, high = torch.where(value < goal, offset, low), torch.where(value < goal, high, offset)
            newton = offset - (value - goal) / slope
            offset = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        # One more step from the solution, this one seen by automatic differentiation: it carries the inverse's derivative.
        value, slope = self._cubic(piece, offset)
        return piece + offset - (value - target) / slope

    @property
    def prior_scale(self) -> float:
        """1: DDPM samplers start from unit noise, although ``sigma(t_max)`` is slightly below."""
        return 1.0
