"""Jumps of a student with a second time, ``f(x_t, t -> s) = alpha_s x0 + sigma_s eps``: one DDIM step that knows where it ends.

``x0 = D(x_t, t, s)`` and eps is the noise that it leaves in ``x_t``. With ``x0 = skip x + out F`` (`distill.denoiser`) this is
``f = c_skip x_t + c_out F``, and every type of prediction is a parameterisation of f: the three of inductive moment matching
(Zhou et al. 2503.07565, section 5) are ``edm`` (simple-EDM), ``flow`` (Euler-FM) and ``x0`` (identity).
"""

from __future__ import annotations

import torch

from distill.denoiser import Denoiser, NetworkDenoiser, target_coefficients
from distill.schedules import NoiseSchedule, per_sample
from distill.types import Cond, Sample, Time


def jump_coefficients(denoiser: Denoiser, t: Time, s: Time) -> tuple[Time, Time]:
    """``(c_skip, c_out)`` of the jump, float64 ``(b,)``; for what is no network, of its x0. Exactly (1, 0) where ``s == t``.

    A prediction is ``F = a x0 + b eps`` (`distill.denoiser.target_coefficients`). Of two unknowns, ``x_s`` has to be
    ``alpha_s x0 + sigma_s eps`` when ``x_t`` and F are those of the same x0 and eps:

        c_skip = (alpha_s b - sigma_s a) / d,   c_out = (alpha_t sigma_s - sigma_t alpha_s) / d,   d = alpha_t b - sigma_t a

    With noise of standard deviation ``sigma_d`` the paper has ``alpha x0 + sigma sigma_d z``: this package's x on a schedule of
    equal noise-to-signal ratio (for the flow, `RectifiedFlow` of shift ``sigma_d``), or, with data divided by ``sigma_d``, on
    the paper's own schedule with ``sigma_data = 1``. In the latter, simple-EDM is ``(alpha_t alpha_s + sigma_t sigma_s) / n``
    and ``-(alpha_s sigma_t - alpha_t sigma_s) / sqrt(n)``, ``n = alpha_t^2 + sigma_t^2``, up to the sign of F, and Euler-FM
    ``1`` and ``-(t - s)``, as there.

    Finite wherever d is not 0, which ``eps`` has at ``alpha_t = 0``, ``x0`` at ``sigma_t = 0``, and the others nowhere.
    """
    schedule: NoiseSchedule = denoiser.schedule
    alpha_t, sigma_t = schedule.alpha(t.double()), schedule.sigma(t.double())
    alpha_s, sigma_s = schedule.alpha(s.double()), schedule.sigma(s.double())
    if isinstance(denoiser, NetworkDenoiser):
        a, b = target_coefficients(denoiser.prediction, alpha_t, sigma_t, denoiser.sigma_data)
    else:
        a, b = torch.ones_like(alpha_t), torch.zeros_like(alpha_t)
    determinant = alpha_t * b - sigma_t * a
    return (alpha_s * b - sigma_s * a) / determinant, (alpha_t * sigma_s - sigma_t * alpha_s) / determinant


def jump(denoiser: Denoiser, x: Sample, t: Time, s: Time, cond: Cond) -> Sample:
    """``f(x_t, t -> s)`` ``(b, *shape)``, ``s <= t``; x itself, to the bit, where ``s == t``."""
    c_skip, c_out = jump_coefficients(denoiser, t, s)
    value = denoiser.raw(x, t, cond, s) if isinstance(denoiser, NetworkDenoiser) else denoiser(x, t, cond, s)
    dtype = value.dtype
    return per_sample(c_skip.to(dtype), x) * x.to(dtype) + per_sample(c_out.to(dtype), value) * value
