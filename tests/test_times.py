"""Times: laws against their densities, grids and curricula at the papers' values, pairs and weights."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from oracle import SCHEDULES
from scipy import stats

from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.times import (
    ConstantPoints,
    ConstantWeight,
    DiscreteGrid,
    DoublingPoints,
    GridPairs,
    InverseGapWeight,
    KarrasGrid,
    KarrasWeight,
    LogitNormalTimes,
    LogNormalTimes,
    RatioPairs,
    SquareRootPoints,
    TimeDistribution,
    UniformGrid,
    UniformTimes,
    UShapedTimes,
)

VE, RF, VP = VarianceExploding(), RectifiedFlow(), VariancePreserving()
DRAWS = 20_000


def fits(draws: torch.Tensor, cumulative) -> bool:
    """Kolmogorov-Smirnov at the level 1e-3 (the draws are seeded: the answer does not change from run to run)."""
    return stats.kstest(draws.double().numpy(), cumulative).pvalue > 1e-3


# ---------------------------------------------------------------------------------------------------- distributions


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_normal_is_in_the_noise_level_of_every_schedule(name):
    schedule = SCHEDULES[name]
    levels = schedule.nsr(LogNormalTimes(-0.4, 0.7).sample(DRAWS, schedule).double()).log()
    assert fits(levels, stats.norm(-0.4, 0.7).cdf)


def test_log_normal_beyond_the_ends_becomes_the_ends():
    t = LogNormalTimes(-1.2, 30.0).sample(2000, VE)
    low, high = float(t.min()), float(t.max())
    assert low == pytest.approx(0.002) and high == pytest.approx(80.0)


# ------------------------------------------------------------------------------------------------------------ grids


def test_ddim_grid_of_latent_consistency():
    assert DiscreteGrid().times(VP, 50).tolist() == list(range(999, 0, -20))
    assert DiscreteGrid().times(VP, 3).tolist() == [999.0, 666.0, 332.0]
    assert DiscreteGrid().nodes(VP, 50).tolist() == [*range(999, 0, -20), 0]


def test_karras_grid_is_the_formula_with_exact_ends():
    grid = KarrasGrid().times(VE, 18)
    exact = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(grid, torch.tensor(exact, dtype=torch.float64), rtol=1e-11, atol=0)
    assert float(grid[0]) == 80.0 and float(grid[-1]) == 0.002
    assert KarrasGrid().nodes(VE, 18).tolist() == grid.tolist()


@pytest.mark.parametrize("name", ["vp-linear", "vp-scaled", "vp-cosine"])
def test_karras_grid_of_another_schedule_starts_and_stops_at_its_ends(name):
    times = KarrasGrid().times(SCHEDULES[name], 10)
    assert float(times[0]) == 999.0 and float(times[-1]) == 0.0 and bool((times.diff() < 0).all())
    roots = SCHEDULES[name].nsr(times) ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().repeat(9), rtol=1e-9, atol=0)


def test_karras_grid_needs_finite_ends():
    with pytest.raises(ValueError, match="set sigma_min and sigma_max"):
        KarrasGrid().times(RF, 4)
    levels = RF.nsr(KarrasGrid(7.0, 0.002, 80.0).times(RF, 4))
    torch.testing.assert_close(levels, KarrasGrid().times(VE, 4), rtol=1e-9, atol=0)


def test_uniform_grid():
    assert UniformGrid().times(RF, 4).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert UniformGrid().nodes(RF, 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


# --------------------------------------------------------------------------------------------------------- curricula


def test_square_root_curriculum_of_consistency_training():
    """N(k) = ceil(sqrt(k/K (151^2 - 2^2) + 2^2) - 1) + 1: sqrt(4) at 0, sqrt(11402.5) = 106.8 at K/2, 151 at K."""
    points = SquareRootPoints(800, 2, 150).points
    assert [points(step) for step in (0, 400, 800, 10_000)] == [2, 107, 151, 151]


def test_doubling_curriculum_of_improved_consistency_training():
    """K' = floor(400000 / (log2(128) + 1)) = 50000: N = 11, 21, 41, ..., 1281."""
    points = DoublingPoints(400_000).points
    assert [points(50_000 * stage) for stage in range(9)] == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert points(49_999) == 11 and points(399_999) == 1281


def test_constant_points():
    assert ConstantPoints(40).points(0) == ConstantPoints(40).points(10**6) == 40


# -------------------------------------------------------------------------------------------------------------- pairs


def index_of(t: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    index = (t[:, None] - nodes.float()[None]).abs().argmin(1)
    assert bool((nodes.float()[index] == t).all())
    return index


@pytest.mark.parametrize(
    ("grid", "schedule", "count", "skip"),
    [(KarrasGrid(), VE, 18, 1), (DiscreteGrid(), VP, 50, 1), (UniformGrid(), RF, 8, 3)],
)
def test_pairs_are_uniform_and_skip_nodes(grid, schedule, count, skip):
    nodes = grid.nodes(schedule, count)
    t, u = GridPairs(grid, ConstantPoints(count), skip).sample(DRAWS, 0, schedule)
    start, end = index_of(t, nodes), index_of(u, nodes)
    assert bool((end == (start + skip).clamp(max=len(nodes) - 1)).all())
    seen = Counter(start.tolist())
    assert set(seen) == set(range(len(nodes) - 1))
    assert stats.chisquare([seen[i] for i in range(len(nodes) - 1)]).pvalue > 1e-3


def test_pairs_follow_the_curriculum():
    pairs = GridPairs(KarrasGrid(), DoublingPoints(80, 10, 1280))
    early, late = pairs.sample(500, 0, VE)[0], pairs.sample(500, 79, VE)[0]
    assert len(early.unique()) == 10 and len(late.unique()) > 200


def test_log_normal_pairs_have_the_masses_of_improved_consistency_training():
    """Probability of [s_i, s_i+1] proportional to erf((ln s_i+1 + 1.1) / (2 sqrt 2)) - erf((ln s_i + 1.1) / (2 sqrt 2))."""
    nodes = KarrasGrid().nodes(VE, 11)
    erf = [math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in nodes.tolist()]
    exact = torch.tensor([high - low for high, low in zip(erf[:-1], erf[1:], strict=True)], dtype=torch.float64)
    pairs = GridPairs(KarrasGrid(), ConstantPoints(11), log_normal=(-1.1, 2.0))
    torch.testing.assert_close(pairs.interval_masses(nodes, VE), exact, rtol=1e-12, atol=1e-15)
    seen = torch.bincount(index_of(pairs.sample(DRAWS, 0, VE)[0], nodes), minlength=10)
    expected = exact / exact.sum() * DRAWS
    enough = expected > 5
    ratio = expected[enough].sum() / seen[enough].sum()
    assert stats.chisquare(seen[enough].double() * ratio, expected[enough]).pvalue > 1e-3


class FixedLevels(TimeDistribution):
    """The same times at every call."""

    def __init__(self, values: list[float]):
        self.values = values

    def sample(self, count, schedule, device=None):
        return torch.tensor(self.values)


@pytest.mark.parametrize(
    ("stage", "q", "exact"),
    [
        # n(s) = 1 + 8 sigmoid(-s): 4.5026 at 0.25, 3.1515 at 1, 1.1439 at 4, 1 at 80; u = s max(0, 1 - n / q^(a+1)).
        (0, 2.0, [0.0, 0.0, 1.7122, 40.0]),
        (2, 2.0, [0.10929, 0.6061, 3.4281, 70.0]),
        (0, 4.0, [0.0, 0.2121, 2.8561, 60.0]),
        (0, 256.0, [0.245603, 0.98769, 3.98213, 79.6875]),
    ],
)
def test_ratio_pairs_of_easy_consistency_tuning(stage, q, exact):
    """Geng et al. 2406.14548: r/t = 1 - n(t) / q^(a+1); what falls below the schedule is t_min, the data."""
    pairs = RatioPairs(FixedLevels([0.25, 1.0, 4.0, 80.0]), stage_steps=100, q=q)
    for step in (100 * stage, 100 * stage + 99):
        t, u = pairs.sample(4, step, VE)
        torch.testing.assert_close(u, torch.tensor(exact).clamp(min=0.002), rtol=1e-4, atol=1e-7)
    assert bool((u[torch.tensor(exact) == 0] <= VE.t_min).all())


def test_ratio_pairs_are_in_noise_level_on_other_schedules():
    flow = RatioPairs(FixedLevels([0.2, 0.5, 0.8]), stage_steps=1, q=4.0)
    t, u = flow.sample(3, 0, RF)
    levels = RatioPairs(FixedLevels([0.25, 1.0, 4.0]), stage_steps=1, q=4.0).sample(3, 0, VE)[1]
    torch.testing.assert_close(RF.nsr(u)[1:], levels[1:], rtol=1e-5, atol=0)
    assert float(u[0]) == 0.0


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights():
    t, u = torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0])
    assert ConstantWeight()(VE, t, u).tolist() == [1, 1]
    assert InverseGapWeight()(VE, t, u).tolist() == [4, 1]
    torch.testing.assert_close(KarrasWeight()(VE, t, u), 1 / t**2 + 1 / 0.25)
    torch.testing.assert_close(InverseGapWeight()(RF, t[:1], u[:1]), torch.tensor([1 / (1 - 1 / 3)]))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: UniformTimes(0.5, 0.5), "low=0.5"),
        (lambda: LogNormalTimes(0.0, 0.0), "std=0.0"),
        (lambda: UShapedTimes(-1.0), "a=-1.0"),
        (lambda: KarrasGrid(0.0), "rho=0.0"),
        (lambda: ConstantPoints(1), "count=1"),
        (lambda: DoublingPoints(0), "total_steps=0"),
        (lambda: SquareRootPoints(10, 5, 4), "end=4"),
        (lambda: GridPairs(UniformGrid(), ConstantPoints(), 0), "skip=0"),
        (lambda: RatioPairs(UniformTimes(), 1, 1.0), "q=1.0"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
