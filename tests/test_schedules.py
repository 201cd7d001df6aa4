"""Schedules: scales, their derivatives, inverses and conversions, against closed forms and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import SCHEDULES, Gaussian

from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving, per_sample

ALL = pytest.mark.parametrize("name", SCHEDULES)
VP = [name for name in SCHEDULES if name.startswith("vp")]
BETAS = {
    "vp-linear": (1e-4, 0.02, "linear"),
    "vp-scaled": (0.00085, 0.012, "scaled_linear"),
    "vp-cosine": (1e-4, 0.02, "squaredcos_cap_v2"),
}


def times(name: str, count: int = 401, inside: float = 0.0) -> torch.Tensor:
    """Float64 times over the schedule, without a fraction ``inside`` at either end (VE: evenly in the logarithm)."""
    schedule = SCHEDULES[name]
    u = torch.linspace(inside, 1 - inside, count, dtype=torch.float64)
    if name == "ve":
        logarithm = math.log(schedule.t_min) + u * math.log(schedule.t_max / schedule.t_min)
        return logarithm.exp().clamp(schedule.t_min, schedule.t_max)
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def closed_form(name: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``alpha, sigma, alpha', sigma'`` written by hand."""
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    if name == "ve":
        return one, t, zero, one
    if name == "trig":
        return t.cos(), 0.5 * t.sin(), -t.sin(), 0.5 * t.cos()
    shift = 3.0 if name == "rf-shift3" else 1.0
    below = 1 + (shift - 1) * t
    return (1 - t) / below, shift * t / below, -shift / below**2, shift / below**2


@pytest.mark.parametrize("name", ["ve", "rf", "rf-shift3", "trig"])
def test_scales_and_derivatives_have_their_closed_forms(name):
    schedule, t = SCHEDULES[name], times(name)
    ours = (schedule.alpha(t), schedule.sigma(t), *schedule.derivatives(t))
    for own, exact in zip(ours, closed_form(name, t), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-13, atol=1e-15)


@ALL
def test_derivatives_are_finite_differences(name):
    schedule, t = SCHEDULES[name], times(name, inside=0.01)
    h = 1e-4 * t if name == "ve" else torch.full_like(t, 1e-6 * (schedule.t_max - schedule.t_min))
    for scale, derivative in zip((schedule.alpha, schedule.sigma), schedule.derivatives(t), strict=True):
        difference = (scale(t + h) - scale(t - h)) / (2 * h)
        torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", VP)
def test_vp_keeps_the_variance_and_is_monotone_and_smooth(name):
    schedule, t = SCHEDULES[name], times(name, 20 * 999 + 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    assert bool((schedule.log_nsr(t).diff() > 0).all())
    # alpha alpha' + sigma sigma' = 0, and the slope does not jump at the whole numbers.
    d_alpha, d_sigma = schedule.derivatives(t)
    torch.testing.assert_close(alpha * d_alpha, -sigma * d_sigma, rtol=1e-9, atol=1e-14)
    knots = torch.arange(1, 999, dtype=torch.float64)
    slopes = [torch.func.jvp(schedule.log_nsr, (knots + side,), (torch.ones_like(knots),))[1] for side in (-1e-9, 1e-9)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", VP)
def test_vp_at_whole_numbers_is_diffusers(name):
    from diffusers import DDPMScheduler

    start, end, kind = BETAS[name]
    theirs = DDPMScheduler(beta_start=start, beta_end=end, beta_schedule=kind)
    n = torch.arange(1000, dtype=torch.float64)
    ours = SCHEDULES[name].alpha(n) ** 2
    # diffusers rounds its betas and products to float32.
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=1e-4 if kind != "linear" else 2e-5, atol=1e-9)
    if kind == "linear":
        exact = np.cumprod(1 - np.linspace(start, end, 1000))
        torch.testing.assert_close(ours, torch.from_numpy(exact), rtol=1e-12, atol=0)


@ALL
def test_times_invert(name):
    schedule, t = SCHEDULES[name], times(name)
    assert (schedule.time_of_angle(schedule.angle(t)) - t).abs().max() < 1e-10
    below = t[:-1] if name.startswith("rf") else t  # a flow's ratio at t = 1 is infinite
    assert (schedule.time_of_nsr(schedule.nsr(below)) - below).abs().max() < 1e-10


@pytest.mark.parametrize("name", VP)
def test_vp_times_invert_between_the_whole_numbers(name):
    schedule = SCHEDULES[name]
    t = torch.rand(5000, dtype=torch.float64) * 999
    assert (schedule.time_of_angle(schedule.angle(t)) - t).abs().max() < 1e-10


@ALL
def test_inverse_carries_its_derivative(name):
    """d time / d angle by forward mode is the reciprocal of d angle / d time, by the chain rule."""
    schedule, t = SCHEDULES[name], times(name, inside=0.02)
    back, slope = torch.func.jvp(lambda t: schedule.time_of_angle(schedule.angle(t)), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, torch.ones_like(t), rtol=1e-7, atol=0)


@ALL
def test_levels_beyond_the_schedule_become_its_ends(name):
    schedule = SCHEDULES[name]
    ends = schedule.time_of_angle(torch.tensor([0.0, math.pi / 2], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([schedule.t_min, schedule.t_max], rel=1e-12, abs=1e-12)


@ALL
def test_float32_times_keep_seven_digits(name):
    schedule, t = SCHEDULES[name], times(name).float()
    torch.testing.assert_close(schedule.alpha(t).double(), schedule.alpha(t.double()), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(schedule.sigma(t).double(), schedule.sigma(t.double()), rtol=2e-6, atol=1e-7)
    assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == torch.float32


@ALL
def test_sample_noise_score_and_velocity_are_one_thing(name):
    schedule, t = SCHEDULES[name], times(name, 50, inside=0.02)
    x0, eps = torch.randn(2, 50, 3, dtype=torch.float64)
    x = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(schedule.eps(x, x0, t), eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.score(x, x0, t) * per_sample(schedule.sigma(t), x), -eps, rtol=0, atol=1e-10)
    # The path through x0 and eps has the velocity of its own time derivative.
    along = torch.func.jvp(lambda t: schedule.add_noise(x0, eps, t), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(schedule.velocity(x, x0, t), along, rtol=0, atol=1e-10)


@ALL
def test_score_and_velocity_of_the_exact_denoiser(name):
    """Tweedie's formula against the density, and dx/dt = f x - g^2 score / 2 against a difference of the exact flow map."""
    schedule, t = SCHEDULES[name], times(name, 50, inside=0.02)
    oracle = Gaussian(schedule, torch.tensor([0.3, -0.7]), torch.tensor([0.2, 1.5]))
    x = torch.randn(50, 2, dtype=torch.float64) * per_sample(schedule.scale(t), torch.empty(50, 2))
    x0, score = oracle(x, t, {}), oracle.score_of(x, t)
    torch.testing.assert_close(schedule.score(x, x0, t), score, rtol=1e-9, atol=1e-9)
    scales = schedule.alpha(t), schedule.sigma(t), *schedule.derivatives(t)
    alpha, sigma, d_alpha, d_sigma = (per_sample(scale, x) for scale in scales)
    half_squared_diffusion = sigma * d_sigma - sigma**2 * d_alpha / alpha
    velocity = schedule.velocity(x, x0, t)
    torch.testing.assert_close(velocity, d_alpha / alpha * x - half_squared_diffusion * score, rtol=1e-9, atol=1e-9)
    h = 1e-4 * t if name == "ve" else torch.full_like(t, 1e-5 * (schedule.t_max - schedule.t_min))
    difference = (oracle.flow(x, t, t + h) - oracle.flow(x, t, t - h)) / per_sample(2 * h, x)
    torch.testing.assert_close(velocity, difference, rtol=1e-5, atol=1e-7)


def test_network_times_are_what_published_networks_read():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert SCHEDULES["vp-linear"].network_time(t) is t
    torch.testing.assert_close(SCHEDULES["ve"].network_time(t), 0.25 * torch.log(t))
    torch.testing.assert_close(SCHEDULES["rf-shift3"].network_time(t), torch.tensor([500.0, 750.0]).double())


def test_prior_scales():
    expected = dict.fromkeys(VP, 1.0) | {"ve": 80.0, "rf": 1.0, "rf-shift3": 1.0, "trig": 0.5}
    assert {name: schedule.prior_scale for name, schedule in SCHEDULES.items()} == pytest.approx(expected, rel=1e-12)


def test_same_schedules_are_recognised():
    assert RectifiedFlow(3.0).same_as(RectifiedFlow(3.0)) and not RectifiedFlow(3.0).same_as(RectifiedFlow())
    used = VariancePreserving()
    used.alpha(torch.zeros(1))
    assert used.same_as(VariancePreserving()) and not used.same_as(VariancePreserving("cosine"))
    assert not TrigFlow().same_as(RectifiedFlow()) and not VarianceExploding().same_as(VarianceExploding(0.01))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: VarianceExploding(0.0), "sigma_min=0.0"),
        (lambda: VarianceExploding(2.0, 1.0), "sigma_max=1.0"),
        (lambda: RectifiedFlow(0.0), "shift=0.0"),
        (lambda: TrigFlow(-1.0), "sigma_data=-1.0"),
        (lambda: VariancePreserving(num_steps=2), "num_steps=2"),
        (lambda: VariancePreserving(beta_start=0.5, beta_end=0.1), "beta_start=0.5"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_noisiest_time_stays_the_noisiest_in_float32(name):
    """float32's pi/2 lies beyond pi/2: TrigFlow's end would be taken for the least noise of every other schedule."""
    own = SCHEDULES[name]
    t_max = torch.tensor([own.t_max], dtype=torch.float32)
    assert float(own.alpha(t_max)) >= 0 and float(own.nsr(t_max)) > 10
    for other in SCHEDULES.values():
        reached = float(other.time_of_angle(own.angle(t_max)))
        level = min(float(own.nsr(t_max)), float(other.nsr(torch.tensor(other.t_max))))
        assert float(other.nsr(torch.tensor(reached, dtype=torch.float64))) >= 0.99 * level
