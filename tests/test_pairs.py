"""Pairs of times: which intervals are drawn, how often, and how far apart the two times lie."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy import stats

from distill.grids import ConstantPoints, DiscreteGrid, DoublingPoints, KarrasGrid, UniformGrid
from distill.pairs import GridPairs, RatioPairs
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.times import TimeDistribution, UniformTimes

VE, RF, VP = VarianceExploding(), RectifiedFlow(), VariancePreserving()
DRAWS = 20_000


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


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: GridPairs(UniformGrid(), ConstantPoints(), 0), "skip=0"),
        (lambda: RatioPairs(UniformTimes(), 1, 1.0), "q=1.0"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
