"""The ODE run upwards: noise of given data against the exact flow map, and back again."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import SCHEDULES, Gaussian
from torch import Tensor

from distill.grids import DiscreteGrid, Grid, KarrasGrid, UniformGrid
from distill.inversion import LEAST_LEVEL, invert
from distill.samplers import OdeSampler
from distill.solvers import DDIM, Euler, Heun, Solver

MEAN, VARIANCE = torch.tensor([0.4, -0.2]), torch.tensor([0.25, 0.04])
GRIDS: dict[str, Grid] = {
    "ve": KarrasGrid(), "vp-linear": DiscreteGrid(), "rf": UniformGrid(), "rf-shift3": UniformGrid(), "trig": UniformGrid()
}  # fmt: skip


def exact(oracle: Gaussian, x0: Tensor) -> Tensor:
    """The noise of data at the start that `invert` documents."""
    schedule = oracle.schedule
    start = max(float(schedule.time_of_nsr(torch.tensor(LEAST_LEVEL, dtype=torch.float64))), schedule.t_min)
    t, s = (torch.full((len(x0),), time, dtype=torch.float64) for time in (start, schedule.t_max))
    return oracle.flow(oracle.scales(x0, t)[0] * x0, t, s) / schedule.prior_scale


def error(name: str, solver: Solver, steps: int) -> float:
    oracle = Gaussian(SCHEDULES[name], MEAN, VARIANCE)
    x0 = oracle.data(64, torch.Generator().manual_seed(0))
    return float((invert(oracle, x0, {}, solver, GRIDS[name], steps) - exact(oracle, x0)).abs().max())


@pytest.mark.parametrize("solver", [Euler(), DDIM(), Heun()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("name", GRIDS)
def test_noise_is_the_flow_maps_in_the_limit(name, solver):
    coarse, fine = error(name, solver, 40), error(name, solver, 160)
    print(f"{name} {type(solver).__name__}: {coarse:.1e} in 40 steps, {fine:.1e} in 160")
    # A quarter and a sixteenth, give or take what the coarse steps still lack of their order.
    assert fine < {1: 0.33, 2: 0.12}[solver.order] * coarse and fine < {1: 0.12, 2: 0.02}[solver.order]


@pytest.mark.parametrize("name", GRIDS)
def test_data_comes_back(name):
    oracle = Gaussian(SCHEDULES[name], MEAN, VARIANCE)
    x0 = oracle.data(64, torch.Generator().manual_seed(0))
    noise = invert(oracle, x0, {}, Heun(), GRIDS[name], 160)
    assert (OdeSampler(Heun(), GRIDS[name])(oracle, noise, {}, 160) - x0).abs().max() < 0.02


def test_noise_of_data_is_unit():
    oracle = Gaussian(SCHEDULES["rf"], MEAN, VARIANCE)
    noise = invert(oracle, oracle.data(20_000, torch.Generator().manual_seed(0)), {}, Heun(), UniformGrid(), 40)
    assert (noise.mean(0).abs() < 4 / math.sqrt(20_000)).all() and ((noise.std(0) - 1).abs() < 0.02).all()


def test_steps_are_named():
    oracle = Gaussian(SCHEDULES["rf"], MEAN, VARIANCE)
    with pytest.raises(ValueError, match="steps=0: give at least one"):
        invert(oracle, torch.zeros(1, 2), {}, Heun(), UniformGrid(), 0)
    with pytest.raises(ValueError, match="steps=1000: the grid's least times .* give fewer"):
        invert(oracle, torch.zeros(1, 2), {}, Heun(), UniformGrid(), 1000)
