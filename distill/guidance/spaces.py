"""Predictions of other types than x0, for the rules whose result depends on the type: they are not linear."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill.denoiser import coefficients, target_coefficients
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Sample, Time

Space = Literal["x0", "eps", "v", "flow"]
"""Types of prediction that ``x0``, ``x`` and ``t`` alone determine; see `distill.denoiser.coefficients`."""

LEAST_SIGNAL = 1e-6
"""An alpha below it is none: there the noise does not say what x0 is."""


def check_space(key: str, space: Space, schedule: NoiseSchedule) -> None:
    """Raises ValueError, naming ``key``, for noise on a schedule that starts without signal."""
    signal = float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)))
    if space == "eps" and signal < LEAST_SIGNAL:
        raise ValueError(
            f"{key}={space!r}: {schedule!r} starts without signal (alpha={signal:.1g}), where the noise is the sample itself "
            "whatever the condition; give 'v', 'flow' or 'x0'."
        )


def to_space(space: Space, schedule: NoiseSchedule, x: Sample, x0: Sample, t: Time) -> Sample:
    """The prediction of a type that says ``x0`` at ``x``, ``(b, *shape)``; ``sigma(t) > 0``."""
    of_x0, of_eps = (_like(value, x0) for value in target_coefficients(space, *_scales(schedule, t), 1.0))
    return x0 if space == "x0" else of_x0 * x0 + of_eps * schedule.eps(x, x0, t)


def from_space(space: Space, schedule: NoiseSchedule, x: Sample, prediction: Sample, t: Time) -> Sample:
    """The ``x0`` that a prediction says: the inverse of `to_space`."""
    _, skip, out = (_like(value, prediction) for value in coefficients(space, *_scales(schedule, t), 1.0))
    return skip * x + out * prediction


def _scales(schedule: NoiseSchedule, t: Time) -> tuple[Tensor, Tensor]:
    wide = t.double()
    return schedule.alpha(wide), schedule.sigma(wide)


def _like(factor: Tensor, x: Sample) -> Tensor:
    return per_sample(factor.to(x.dtype), x)
