"""Denoisers: a network, its schedule and what it predicts, behind one call ``(x_t, t, cond) -> x0``.

Whatever the network predicts, ``x0 = skip(t) x_t + out(t) F(scale(t) x_t, t)``: the three numbers of each type of prediction
are in `coefficients`, and everything else follows from them.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.adapters import SECOND_TIME
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, Sample, Time

Prediction = Literal["x0", "eps", "v", "flow", "edm"]

FreshNoise = Callable[[Sample], Sample]
"""``fresh(x)`` is unit noise like ``x``, a whole batch: where what re-noises or draws along a trajectory takes it from."""


def coefficients(prediction: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(scale, skip, out)`` with ``x0 = skip x + out F(scale x)``, each of the shape of ``alpha`` and ``sigma``.

    - ``x0``: F is the clean sample; ``eps``: the noise (Ho et al. 2006.11239).
    - ``v``: ``alpha eps - sigma x0`` (Salimans & Ho 2202.00512), here for any ``alpha^2 + sigma^2``.
    - ``flow``: ``eps - x0`` (Liu et al. 2209.03003; Lipman et al. 2210.02747).
    - ``edm``: EDM's preconditioned F (Karras et al. 2206.00364, table 1), written without dividing by ``alpha``.
    """
    one = torch.ones_like(alpha)
    if prediction == "x0":
        return one, torch.zeros_like(alpha), one
    if prediction == "eps":
        return one, 1 / alpha, -sigma / alpha
    if prediction == "v":
        norm = alpha**2 + sigma**2
        return one, alpha / norm, -sigma / norm
    if prediction == "flow":
        return one, 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "edm":
        variance = sigma**2 + (alpha * sigma_data) ** 2
        return variance.rsqrt(), alpha * sigma_data**2 / variance, sigma * sigma_data * variance.rsqrt()
    raise ValueError(f"prediction={prediction!r}: give one of 'x0', 'eps', 'v', 'flow', 'edm'.")


def target_coefficients(prediction: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """``(a, b)`` such that F should be ``a x0 + b eps``: `coefficients` solved for F, finite where ``sigma`` is 0 too."""
    one = torch.ones_like(alpha)
    if prediction == "edm":
        root = (sigma**2 + (alpha * sigma_data) ** 2).sqrt()
        return sigma / (sigma_data * root), -alpha * sigma_data / root
    return {"x0": (one, 0 * one), "eps": (0 * one, one), "v": (-sigma, alpha), "flow": (-one, one)}[prediction]


class Denoiser(nn.Module, ABC):
    """Estimates the clean sample: ``denoiser(x, t, cond) -> x0``.

    Attributes:
        schedule: the schedule in which ``x`` and ``t`` are given.
        shape: shape of one sample, ``(c, h, w)``, with None where any size will do; None if any shape will.
        num_classes: number of classes that ``cond["labels"]`` may name (the null class comes after them), or None.
        widths: the conditions that the network must be given and the size of their last dimension, ``{"prompt_embeds": 768}``.
        null_class: whether ``cond["labels"]`` has a null class; without one there is no guidance away from it.
        scalar_inputs: scalar conditions that the network embeds: one that reads ``guidance`` is guided by that input.
        own_noise: whether the eps of `x0_and_eps` is not what its x0 leaves in x; a solver must then step by both.
    """

    schedule: NoiseSchedule
    shape: tuple[int | None, ...] | None = None
    num_classes: int | None = None
    widths: dict[str, int] = MappingProxyType({})  # type: ignore[assignment]
    null_class: bool = True
    scalar_inputs: tuple[str, ...] = ()
    own_noise: bool = False

    @abstractmethod
    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        """``x0`` in float32 (float64 if ``x`` is), for ``x`` ``(b, *shape)`` at times ``t`` ``(b,)``.

        ``r`` ``(b,)`` is the second time of networks that jump from ``t`` to ``r``, the end of the schedule where it is None;
        others must not be given one.
        """

    def x0_and_eps(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> tuple[Sample, Sample]:
        """``x0`` and the noise to go on with, ``(b, *shape)`` each: the one that ``x0`` leaves in ``x``, but for some rules."""
        x0 = self(x, t, cond, r)
        return x0, self.schedule.eps(x, x0, t)

    def trajectory(self, fresh: FreshNoise) -> Denoiser:
        """The denoiser as it is followed along one trajectory from its start; samplers ask for it once.

        Guidance rules that remember the steps before keep them in what this returns; those that draw, draw by ``fresh``.
        """
        return self

    def describe_as(self, other: Denoiser) -> None:
        """Takes over what ``other``, the denoiser that this one wraps, accepts."""
        self.schedule, self.shape = other.schedule, other.shape
        self.num_classes, self.null_class = other.num_classes, other.null_class
        self.widths, self.scalar_inputs = other.widths, other.scalar_inputs

    def under(self, schedule: NoiseSchedule) -> Denoiser:
        """The same denoiser in another schedule: times and inputs are mapped by equal noise-to-signal ratio.

        Noise levels beyond this denoiser's own schedule are taken to its end points, its inputs keep the scale that it
        expects there.
        """
        return self if schedule.same_as(self.schedule) else ScheduleView(self, schedule)


def refuse_own_noise(user: object, source: Any) -> None:
    """Raises ValueError, in the name of ``user``, which reads x0 alone, for what goes on with a noise of its own.

    ``source`` is a denoiser, a guidance rule, or None.
    """
    if getattr(source, "own_noise", False):
        raise ValueError(
            f"{type(user).__name__}: {type(source).__name__} goes on with a noise of its own (CfgPlusPlus), which is not "
            "followed here; use DDIM in an OdeSampler, or another rule."
        )


class NetworkDenoiser(Denoiser):
    """A raw network with its schedule and prediction type.

    Args:
        network: called as ``network(x, time, cond, r) -> F``, usually a `distill.networks.base.Network`; may carry ``shape``,
            ``num_classes`` and ``widths``. Its own precision may be lower than that of ``x``: it casts, sums are float32.
        schedule: the schedule on which the network is, or will be, trained.
        prediction: what the network predicts: x0, eps, v, flow or edm.
        sigma_data: standard deviation of the data, used by ``edm``.

    Attributes:
        own_precision: whether the network computes in the precision of its weights, also under autocast, which would have a
            float16 teacher compute in bfloat16; `distill.frozen.Frozen` sets it for a teacher with a ``frozen_dtype``.
    """

    own_precision = False

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction = "flow",
        sigma_data: float = 0.5,
    ):
        super().__init__()
        self.network, self.schedule, self.prediction, self.sigma_data = network, schedule, prediction, sigma_data
        self.shape, self.num_classes = getattr(network, "shape", None), getattr(network, "num_classes", None)
        self.null_class, self.widths = getattr(network, "null_class", True), dict(getattr(network, "widths", {}))

    @property
    def scalar_inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the network embeds by itself, was given as an extra input, or reads by an adapter."""
        added = (name for part in getattr(self.network, "adapters", {}).values() for name in part.scalar_inputs)
        own = (*getattr(self.network, "own_scalars", ()), *getattr(self.network, "scalars", ()), *added)
        return tuple(name for name in dict.fromkeys(own) if name != SECOND_TIME)

    @property
    def second_time(self) -> bool:
        """Whether the network reads a second time."""
        return getattr(self.network, "second_time", False)

    def add_second_time(self, stride: bool = False) -> None:
        """The network now reads a second time, at first without effect; nothing changes if it does already.

        Args:
            stride: whether it is given the difference of both times instead of the second.

        Raises:
            ValueError: a network that cannot take one, or has one that is embedded otherwise.
        """
        network: Any = self.network
        if hasattr(network, "add_second_time"):
            ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
            network.add_second_time(*self.schedule.network_time(ends).tolist(), stride)
        elif not self.second_time or stride:
            what = "a stride" if self.second_time else "a second time"
            raise ValueError(f"stride={stride}: {type(network).__name__} cannot be given {what}; use a network that can.")

    def coefficients(self, t: Time) -> tuple[Time, Time, Time]:
        """``(scale, skip, out)`` at ``t``, float64 ``(b,)``."""
        wide = t.double()
        return coefficients(self.prediction, self.schedule.alpha(wide), self.schedule.sigma(wide), self.sigma_data)

    def raw(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        """What the network itself predicts at ``x``, ``(b, *shape)``, in float32 or ``x``'s own wider type."""
        scale = self.coefficients(t)[0]
        if r is None and self.second_time:
            r = torch.full_like(t, self.schedule.t_min)
        r_time = None if r is None else self.schedule.network_time(r)
        with torch.autocast(x.device.type, enabled=False) if self.own_precision else contextlib.nullcontext():
            value = self.network(_times(scale, x), self.schedule.network_time(t), cond, r_time)
        return value.to(torch.promote_types(x.dtype, torch.float32))

    def raw_target(self, x0: Sample, eps: Sample, t: Time) -> Sample:
        """What `raw` should be at ``x_t = alpha x0 + sigma eps``: its squared error is the usual loss of its kind."""
        wide = t.double()
        alpha, sigma = self.schedule.alpha(wide), self.schedule.sigma(wide)
        of_x0, of_eps = target_coefficients(self.prediction, alpha, sigma, self.sigma_data)
        return _times(of_x0, x0) + _times(of_eps, eps)

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        _, skip, out = self.coefficients(t)
        value = self.raw(x, t, cond, r)
        return _times(skip, x.to(value.dtype)) + _times(out, value)


class ScheduleView(Denoiser):
    """A denoiser seen under another schedule; see `Denoiser.under`."""

    def __init__(self, base: Denoiser, schedule: NoiseSchedule):
        super().__init__()
        self.base = base
        self.describe_as(base)
        self.schedule, self.own_noise = schedule, base.own_noise

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        own_x, own_t, own_r = self.mapped(x, t, r)
        return self.base(own_x, own_t, cond, own_r)

    def x0_and_eps(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> tuple[Sample, Sample]:
        """As the base's, whose unit noise is the same in every schedule."""
        if not self.own_noise:
            return super().x0_and_eps(x, t, cond, r)
        own_x, own_t, own_r = self.mapped(x, t, r)
        return self.base.x0_and_eps(own_x, own_t, cond, own_r)

    def mapped(self, x: Sample, t: Time, r: Time | None) -> tuple[Sample, Time, Time | None]:
        """The base's input and times at equal noise-to-signal ratio."""
        own = self.base.schedule
        wide = own.time_of_angle(self.schedule.angle(t))
        ratio = own.scale(wide) / self.schedule.scale(t.double())
        own_r = None if r is None else own.time_of_angle(self.schedule.angle(r)).to(r.dtype)
        return _times(ratio, x), wide.to(t.dtype), own_r

    def trajectory(self, fresh: FreshNoise) -> Denoiser:
        base = self.base.trajectory(fresh)
        return self if base is self.base else ScheduleView(base, self.schedule)

    def under(self, schedule: NoiseSchedule) -> Denoiser:
        return self.base.under(schedule)


def _times(factor: Time, x: Sample) -> Sample:
    """``factor`` ``(b,)``, of any precision, times ``x``, in the precision of ``x``."""
    return per_sample(factor.to(x.dtype), x) * x
