"""Weights: the papers' formulas, and errors of predictions as weighted errors of x0."""

from __future__ import annotations

import pytest
import torch
from oracle import SCHEDULES
from torch import nn

from distill.denoiser import NetworkDenoiser
from distill.schedules import RectifiedFlow, VarianceExploding
from distill.weights import (
    ConstantWeight,
    InverseGapWeight,
    KarrasWeight,
    PowerWeight,
    PredictionWeight,
    SnrPlusOneWeight,
    TruncatedSnrWeight,
)

VE, RF = VarianceExploding(), RectifiedFlow()


def test_weights():
    t, u = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0])
    assert ConstantWeight()(VE, t, u).tolist() == [1, 1]
    assert InverseGapWeight()(VE, t, u).tolist() == [4, 1]
    torch.testing.assert_close(KarrasWeight()(VE, t, u), 1 / t**2 + 1 / 0.25)
    torch.testing.assert_close(InverseGapWeight()(RF, t[:1], u[:1]), torch.tensor([1 / (1 - 1 / 3)]))
    flow = torch.tensor([0.25, 0.9])
    torch.testing.assert_close(PowerWeight(alpha=1.0)(RF, flow, flow), 1 - flow)
    torch.testing.assert_close(PowerWeight(alpha=2.0, sigma=-1.0)(RF, flow, flow), (1 - flow) ** 2 / flow)


class Linear(nn.Module):
    """``gain x + time``: some network."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, x, time, cond, r=None):
        return self.gain * x + time[:, None, None, None]


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow", "edm"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_weighted_error_of_x0_is_the_error_of_the_prediction(name, prediction):
    """Of two networks at the same noisy samples; a ``sigma_data`` of its own is that of the denoiser."""
    schedule = SCHEDULES[name]
    t = schedule.t_min + torch.tensor([0.02, 0.3, 0.6, 0.98], dtype=torch.float64) * (schedule.t_max - schedule.t_min)
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    one, other = (NetworkDenoiser(Linear(gain), schedule, prediction, 0.3) for gain in (0.5, 0.7))
    raw = (one.raw(x, t, {}) - other.raw(x, t, {})).square().mean((1, 2, 3))
    clean = (one(x, t, {}) - other(x, t, {})).square().mean((1, 2, 3))
    weight = PredictionWeight(prediction, sigma_data=0.3)
    torch.testing.assert_close(weight(schedule, t, t) * clean, raw, rtol=1e-8, atol=0)
    powered = PredictionWeight(prediction, sigma_data=0.3, alpha_power=2)
    torch.testing.assert_close(powered(schedule, t, t), schedule.alpha(t) ** 2 * weight(schedule, t, t), rtol=1e-12, atol=0)


def test_prediction_weights_by_hand():
    """Rectified flow at 0.25 and 0.8: sigma / alpha is 1/3 and 4, alpha + sigma is 1."""
    t = torch.tensor([0.25, 0.8])
    values = {
        "x0": [1.0, 1.0],
        "eps": [9.0, 0.0625],
        "flow": [16.0, 1.5625],
        "v": [6.25, 0.68**2 / 0.64],  # ((alpha^2 + sigma^2) / sigma)^2, the norms 0.625 and 0.68
        "edm": [(0.0625 + 0.140625) / (0.0625 * 0.25), 0.65 / 0.16],  # (sigma^2 + alpha^2 / 4) / (sigma / 2)^2
    }
    for prediction, exact in values.items():
        torch.testing.assert_close(PredictionWeight(prediction)(RF, t, t), torch.tensor(exact), rtol=1e-5, atol=0)
    assert PredictionWeight("eps", alpha_power=2)(RF, t, t).tolist() == pytest.approx([81 / 16, 0.04 / 16])


def test_prediction_weight_of_edm_is_that_of_karras():
    t = torch.tensor([0.002, 0.5, 80.0])
    torch.testing.assert_close(PredictionWeight("edm", 0.4)(VE, t, t), KarrasWeight(0.4)(VE, t, t))


def test_prediction_weight_is_least_where_there_is_no_signal():
    """At a flow's end ``alpha`` is 0: the noise says nothing of x0 there, the velocity is the noise less x0."""
    t = torch.ones(1)
    assert PredictionWeight("eps")(RF, t, t).item() == 0 and PredictionWeight("flow")(RF, t, t).item() == 1


@pytest.mark.parametrize("make", [KarrasWeight, lambda sigma_data: PredictionWeight("edm", sigma_data)])
def test_spread_of_the_data_is_positive(make):
    with pytest.raises(ValueError, match="sigma_data=0.0"):
        make(sigma_data=0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_truncated_snr_is_the_greater_of_the_errors_of_x0_and_of_the_noise(name):
    """Sample by sample, of two x0 at the same x; SNR + 1 is the error of v where the variance is preserved."""
    schedule = SCHEDULES[name]
    t = schedule.t_min + torch.tensor([0.004, 0.05, 0.6, 0.98], dtype=torch.float64) * (schedule.t_max - schedule.t_min)
    x, one, other = torch.randn(3, 4, 1, 2, 2, dtype=torch.float64).unbind(0)
    of_x0 = (one - other).square().sum((1, 2, 3))
    of_eps = (schedule.eps(x, one, t) - schedule.eps(x, other, t)).square().sum((1, 2, 3))
    torch.testing.assert_close(TruncatedSnrWeight()(schedule, t, t) * of_x0, torch.maximum(of_x0, of_eps), rtol=1e-9, atol=0)
    torch.testing.assert_close(SnrPlusOneWeight()(schedule, t, t) * of_x0, of_x0 + of_eps, rtol=1e-9, atol=0)
    assert of_eps[0] > of_x0[0] and of_eps[3] < of_x0[3]  # either side of the truncation is seen
    if name.startswith("vp"):
        of_v = PredictionWeight("v")(schedule, t, t) * of_x0
        torch.testing.assert_close(SnrPlusOneWeight()(schedule, t, t) * of_x0, of_v, rtol=1e-9, atol=0)


def test_snr_weights_by_hand():
    """Rectified flow at 0.25 and 0.8: alpha / sigma is 3 and 1/4."""
    t = torch.tensor([0.25, 0.8])
    assert TruncatedSnrWeight()(RF, t, t).tolist() == pytest.approx([9.0, 1.0])
    assert SnrPlusOneWeight()(RF, t, t).tolist() == pytest.approx([10.0, 1.0625])
