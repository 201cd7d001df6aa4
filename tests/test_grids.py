"""Grids and curricula at the papers' values."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from oracle import SCHEDULES
from scipy import stats

from distill.grids import (
    ConstantPoints,
    DiscreteGrid,
    DoublingPoints,
    GridTimes,
    KarrasGrid,
    LeadingGrid,
    SquareRootPoints,
    UniformGrid,
)
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving

VE, RF, VP = VarianceExploding(), RectifiedFlow(), VariancePreserving()

# ------------------------------------------------------------------------------------------------------------ grids


def test_ddim_grid_of_latent_consistency():
    assert DiscreteGrid().times(VP, 50).tolist() == list(range(999, 0, -20))
    assert DiscreteGrid().times(VP, 3).tolist() == [999.0, 666.0, 332.0]
    assert DiscreteGrid().nodes(VP, 50).tolist() == [*range(999, 0, -20), 0]


@pytest.mark.parametrize("count", [2, 3, 5, 50, 1000])
def test_leading_grid_is_the_leading_spacing_of_diffusers(count):
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="leading")
    scheduler.set_timesteps(count)
    assert LeadingGrid().times(VP, count).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("schedule, count, match", [(VP, 1001, "2 to 1000"), (VP, 1, "DiscreteGrid"), (RF, 2, "no DDPM")])
def test_leading_grid_refuses_what_it_cannot_count(schedule, count, match):
    with pytest.raises(ValueError, match=match):
        LeadingGrid().times(schedule, count)


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


@pytest.mark.parametrize(
    ("grid", "schedule", "expected"),
    [
        (None, RF, [0.25, 0.5, 0.75, 1.0]),
        (DiscreteGrid(), VP, [249.0, 499.0, 749.0, 999.0]),
        # Karras's grid ends in t_min, at which no sampler calls its network.
        (KarrasGrid(), VE, KarrasGrid().times(VE, 5).flip(0)[1:].tolist()),
    ],
)
def test_distillation_times_are_those_of_the_sampler(grid, schedule, expected):
    t = GridTimes(4, grid).sample(4000, schedule)
    values, counts = t.unique(return_counts=True)
    assert t.dtype == torch.float32 and values.tolist() == pytest.approx(expected)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert GridTimes(1, grid).sample(3, schedule).tolist() == [schedule.t_max] * 3
    with pytest.raises(ValueError, match="steps=0"):
        GridTimes(0)


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


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: KarrasGrid(0.0), "rho=0.0"),
        (lambda: ConstantPoints(1), "count=1"),
        (lambda: DoublingPoints(0), "total_steps=0"),
        (lambda: SquareRootPoints(10, 5, 4), "end=4"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()
