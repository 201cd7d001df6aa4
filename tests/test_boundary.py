"""Boundary conditions: the published forms, and f(x, t_min) = x."""

from __future__ import annotations

import pytest
import torch
from oracle import MLP, SCHEDULES, GaussianConsistency
from test_schedules import times

from distill.boundary import ConsistencyFunction, KarrasBoundary, NoBoundary, ScaledBoundary
from distill.denoiser import NetworkDenoiser
from distill.schedules import VarianceExploding, per_sample


def columns(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(value[:, None] for value in values)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_karras_boundary_is_the_consistency_models_form(sigma_data):
    """Song et al. 2303.01469, appendix C: f = c_skip x + c_out F(c_in x, ln(t) / 4) with the network's F itself."""
    denoiser = NetworkDenoiser(MLP((3,)), VarianceExploding(), "edm", sigma_data).double()
    t = times("ve", 30)
    x = torch.randn(30, 3, dtype=torch.float64) * (t[:, None] + 1)
    raw = denoiser.network(x / columns((t**2 + sigma_data**2).sqrt())[0], t.log() / 4, {})
    c_skip = sigma_data**2 / ((t - 0.002) ** 2 + sigma_data**2)
    c_out = (t - 0.002) * sigma_data / (t**2 + sigma_data**2).sqrt()
    exact = c_skip[:, None] * x + c_out[:, None] * raw
    torch.testing.assert_close(ConsistencyFunction(denoiser, KarrasBoundary(sigma_data))(x, t, {}), exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SCHEDULES)
def test_karras_boundary_is_the_same_function_under_every_schedule(name):
    """Against its form in the sample x / alpha and the noise-to-signal ratio s."""
    schedule, t = SCHEDULES[name], times(name, 40, inside=0.02)
    base = GaussianConsistency(schedule, torch.tensor([0.3, -0.7]), torch.tensor([0.2, 1.5]))
    x = torch.randn(40, 2, dtype=torch.float64)
    s, least = schedule.nsr(t), schedule.nsr(torch.tensor(schedule.t_min, dtype=torch.float64))
    c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt()
    edm_sample = x / per_sample(schedule.alpha(t), x)
    raw = (base(x, t, {}) - c_skip[:, None] * edm_sample) / c_out[:, None]
    new_skip, new_out = 0.25 / ((s - least) ** 2 + 0.25), 0.5 * (s - least) / (s**2 + 0.25).sqrt()
    exact = new_skip[:, None] * edm_sample + new_out[:, None] * raw
    torch.testing.assert_close(ConsistencyFunction(base, KarrasBoundary())(x, t, {}), exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_karras_boundary_is_finite_at_both_ends(name):
    """At pure noise of a flow there is no x / alpha; at its zero noise nothing to divide by. Both limits exist."""
    schedule = SCHEDULES[name]
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    skip, out = KarrasBoundary().coefficients(schedule, ends)
    near = ends + (schedule.t_max - schedule.t_min) * torch.tensor([1e-9, -1e-9], dtype=torch.float64)
    torch.testing.assert_close((skip, out), KarrasBoundary().coefficients(schedule, near), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ve", "vp-linear", "vp-cosine"])
@pytest.mark.parametrize("boundary", [KarrasBoundary(), ScaledBoundary()], ids=["karras", "scaled"])
def test_least_noise_is_returned_as_it_is(boundary, name):
    schedule = SCHEDULES[name]
    base = NetworkDenoiser(MLP((3,)), schedule, "eps").double()
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.full((5,), schedule.t_min, dtype=torch.float64)
    expected = x / schedule.alpha(t)[:, None] if isinstance(boundary, KarrasBoundary) else x
    torch.testing.assert_close(ConsistencyFunction(base, boundary)(x, t, {}), expected, rtol=0, atol=1e-12)


def test_scaled_boundary_is_that_of_latent_consistency_models():
    """skip = sd^2 / ((10 t)^2 + sd^2), out = 10 t / sqrt((10 t)^2 + sd^2): no sigma_data in the numerator of out."""
    schedule = SCHEDULES["vp-scaled"]
    t = torch.tensor([0.0, 1.0, 19.0, 999.0], dtype=torch.float64)
    skip, out = ScaledBoundary().coefficients(schedule, t)
    torch.testing.assert_close(skip, 0.25 / (100 * t**2 + 0.25), rtol=1e-14, atol=0)
    torch.testing.assert_close(out, 10 * t / (100 * t**2 + 0.25).sqrt(), rtol=1e-14, atol=0)
    assert skip[0] == 1 and out[0] == 0


def test_no_boundary_is_the_denoiser():
    base = GaussianConsistency(SCHEDULES["rf"], torch.zeros(2), torch.ones(2))
    x, t = torch.randn(5, 2), torch.rand(5)
    function = ConsistencyFunction(base, NoBoundary())
    assert torch.equal(function(x, t, {}), base(x, t, {})) and function.shape == (2,) and function.schedule is base.schedule


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: KarrasBoundary(0.0), "sigma_data=0.0"),
        (lambda: ScaledBoundary(0.5, 0.0), "scaling=0.0"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
