"""Distributions over times: laws against their densities, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import SCHEDULES
from scipy import stats

from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.times import IndexTimes, KarrasTimes, LogitNormalTimes, LogNormalTimes, UniformTimes, UShapedTimes

VE, RF, VP = VarianceExploding(), RectifiedFlow(), VariancePreserving()
DRAWS = 20_000


def fits(draws: torch.Tensor, cumulative) -> bool:
    """Kolmogorov-Smirnov at the level 1e-3 (the draws are seeded: the answer does not change from run to run)."""
    return stats.kstest(draws.double().numpy(), cumulative).pvalue > 1e-3


@pytest.mark.parametrize(
    ("law", "cumulative"),
    [
        (UniformTimes(), stats.uniform().cdf),
        (UniformTimes(0.25, 0.75), stats.uniform(0.25, 0.5).cdf),
        (LogitNormalTimes(-0.5, 1.5), lambda u: stats.norm(-0.5, 1.5).cdf(torch.logit(torch.tensor(u)).numpy())),
        # The integral of e^(4u) + e^(4(1-u)), normalised.
        (UShapedTimes(4.0), lambda u: stats.truncexpon(4, 0, 0.25).cdf(u) / 2 + stats.truncexpon(4, 0, 0.25).sf(1 - u) / 2),
    ],
    ids=["uniform", "part", "logit-normal", "u-shaped"],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_laws_over_the_unit_interval(law, cumulative, name):
    schedule = SCHEDULES[name]
    u = (law.sample(DRAWS, schedule) - schedule.t_min) / (schedule.t_max - schedule.t_min)
    assert u.dtype == torch.float32 and fits(u, cumulative)


def test_u_shape_is_symmetric_and_dense_at_both_ends():
    u = UShapedTimes(4.0).sample(DRAWS, RF)
    share = lambda low, high: float(((u >= low) & (u < high)).float().mean())  # noqa: E731
    # By hand: the mass of [0, 0.1] is (e^0.4 - 1 + e^4 - e^3.6) / (2 (e^4 - 1)).
    exact = (math.exp(0.4) - 1 + math.exp(4) - math.exp(3.6)) / (2 * math.expm1(4))
    assert share(0, 0.1) == pytest.approx(exact, abs=0.01) and share(0.9, 1.01) == pytest.approx(exact, abs=0.01)


def test_u_shape_keeps_its_margin_from_both_ends(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, device=None: torch.tensor([0.0, 1.0])[:count])
    assert UShapedTimes(margin=0.01).sample(2, RF).tolist() == pytest.approx([0.01, 0.01])
    monkeypatch.setattr(torch, "rand", lambda count, device=None: torch.ones(count))
    assert UShapedTimes(margin=0.01).sample(1, RF).tolist() == pytest.approx([0.01])
    u = UShapedTimes(margin=0.01).sample(1, VE)
    assert float(u) == pytest.approx(0.002 + 0.01 * (80 - 0.002))


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_normal_is_in_the_noise_level_of_every_schedule(name):
    schedule = SCHEDULES[name]
    levels = schedule.nsr(LogNormalTimes(-0.4, 0.7).sample(DRAWS, schedule).double()).log()
    assert fits(levels, stats.norm(-0.4, 0.7).cdf)


def test_log_normal_beyond_the_ends_becomes_the_ends():
    t = LogNormalTimes(-1.2, 30.0).sample(2000, VE)
    low, high = float(t.min()), float(t.max())
    assert low == pytest.approx(0.002) and high == pytest.approx(80.0)


# By hand: (0.002^(1/7) + u (80^(1/7) - 0.002^(1/7)))^7 at u = 0, 0.2, ..., 1.
KARRAS_LEVELS = torch.tensor([0.002, 0.0850872, 0.9654169, 5.8389476, 24.4083418, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_karras_law_has_the_published_quantiles_on_every_schedule(name, monkeypatch):
    """Levels that the schedule does not reach are its ends: 0.029 and 14.6 of Stable Diffusion's."""
    schedule = SCHEDULES[name]
    monkeypatch.setattr(torch, "rand", lambda count, device=None: torch.linspace(0, 1, count))
    t = KarrasTimes().sample(6, schedule)
    ends = schedule.nsr(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    assert t.dtype == torch.float32
    torch.testing.assert_close(schedule.nsr(t.double()), KARRAS_LEVELS.clamp(*ends.tolist()), rtol=3e-5, atol=0)


@pytest.mark.parametrize("name", ["vp-linear", "ve", "rf", "trig"])
def test_karras_law_is_uniform_in_the_root_of_the_noise_level(name):
    levels = SCHEDULES[name].nsr(KarrasTimes(0.3, 0.8, 5.0, 0.02, 50.0).sample(DRAWS, SCHEDULES[name]).double())
    least, most = 0.02**0.2, 50.0**0.2
    assert fits((levels**0.2 - least) / (most - least), stats.uniform(0.3, 0.5).cdf)


def test_indices_are_uniform_and_include_both_ends():
    t = IndexTimes(20, 29).sample(DRAWS, VP)
    assert t.dtype == torch.float32
    counts = torch.bincount(t.long())
    assert bool((t == t.round()).all()) and len(counts) == 30 and counts[:20].sum() == 0
    assert stats.chisquare(counts[20:]).pvalue > 1e-3


def test_the_last_index_of_a_schedule_is_an_index():
    assert IndexTimes(999, 999).sample(3, VP).tolist() == [999.0] * 3
    with pytest.raises(ValueError, match="high=1000: the schedule's last index is 999; give that or less"):
        IndexTimes(20, 1000).sample(3, VP)
    with pytest.raises(ValueError, match="high=8: the schedule's last index is 7"):
        IndexTimes(2, 8).sample(3, VariancePreserving(num_steps=8))


@pytest.mark.parametrize("name", ["ve", "rf", "trig"])
def test_a_schedule_without_indices_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"IndexTimes on {type(SCHEDULES[name]).__name__}.*give KarrasTimes"):
        IndexTimes(0, 1).sample(3, SCHEDULES[name])


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: UniformTimes(0.5, 0.5), "low=0.5"),
        (lambda: LogNormalTimes(0.0, 0.0), "std=0.0"),
        (lambda: UShapedTimes(-1.0), "a=-1.0"),
        (lambda: UShapedTimes(margin=0.5), "margin=0.5"),
        (lambda: KarrasTimes(0.8, 0.2), "low=0.8"),
        (lambda: KarrasTimes(high=1.1), "high=1.1"),
        (lambda: KarrasTimes(rho=0.0), "rho=0.0"),
        (lambda: KarrasTimes(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: KarrasTimes(sigma_max=0.001), "sigma_max=0.001"),
        (lambda: KarrasTimes(sigma_max=math.inf), "sigma_max=inf"),
        (lambda: IndexTimes(-1, 5), "low=-1"),
        (lambda: IndexTimes(6, 5), "high=5"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
