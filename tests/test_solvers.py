"""Solvers: the declared order of convergence against the exact flow map, and agreement with diffusers and EDM's algorithm 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import MLP, SCHEDULES, Gaussian, Mixture

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.grids import DiscreteGrid, Grid, KarrasGrid, UniformGrid
from distill.samplers import OdeSampler
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun, Solver

SOLVERS: list[Solver] = [Euler(), DDIM(), Heun(), DPMSolver2M()]
SHAPE = (1, 2, 2)


def follow(solver: Solver, denoiser: Denoiser, x: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    memory = None
    for t, s in zip(nodes[:-1], nodes[1:], strict=True):
        x, memory = solver.advance(denoiser, x, t.repeat(len(x)), s.repeat(len(x)), {}, memory)
    return x


def measured_order(solver: Solver, name: str) -> float:
    """log2 of the error's ratio between n and 2 n equal steps of time, from noise-to-signal ratio 2 to 0.3.

    A multi-step solver begins with a step of first order, whose share fades later: its n is larger.
    """
    schedule, n = SCHEDULES[name], 64 if isinstance(solver, DPMSolver2M) else 24
    oracle = Gaussian(schedule, torch.tensor([0.4, -0.3]), torch.tensor([0.25, 0.6]))
    t, s = schedule.time_of_nsr(torch.tensor([2.0, 0.3], dtype=torch.float64))
    x = torch.tensor([[1.5, -0.7], [-0.4, 0.9]], dtype=torch.float64) * schedule.scale(t)
    exact = oracle.flow(x, t.repeat(2), s.repeat(2))
    grids = [torch.linspace(float(t), float(s), steps + 1, dtype=torch.float64) for steps in (n, 2 * n)]
    coarse, fine = [(follow(solver, oracle, x, grid) - exact).norm() for grid in grids]
    return math.log2(coarse / fine)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_order_of_convergence(solver, name):
    assert abs(measured_order(solver, name) - solver.order) < 0.2


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_euler_in_the_noise_to_signal_ratio(name):
    schedule = SCHEDULES[name]
    oracle = Gaussian(schedule, torch.tensor([0.4, -0.3]), torch.tensor([0.25, 0.6]))
    t, s = schedule.time_of_nsr(torch.tensor([[2.0, 1.0], [0.7, 0.3]], dtype=torch.float64))
    x = torch.randn(2, 2, dtype=torch.float64)
    scaled = x / schedule.alpha(t)[:, None]
    slope = (scaled - oracle(x, t, {})) / schedule.nsr(t)[:, None]
    euler = schedule.alpha(s)[:, None] * (scaled + (schedule.nsr(s) - schedule.nsr(t))[:, None] * slope)
    torch.testing.assert_close(DDIM().step(oracle, x, t, s, {}), euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_step_to_zero_noise_is_the_denoiser(solver):
    """Also from t = 1, where the flow's noise-to-signal ratio is infinite."""
    oracle = Gaussian(RectifiedFlow(), torch.tensor([0.4, -0.3]), torch.tensor([0.25, 0.6]))
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(solver.step(oracle, x, t, torch.zeros_like(t), {}), oracle(x, t, {}), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_step_is_differentiable(solver):
    oracle = Mixture(RectifiedFlow(), torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 0.3)
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.6, 0.9], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: solver.step(oracle, x, t, t - 0.3, {}), (x,))


# ---------------------------------------------------------------------------------- the same network in diffusers' hands


def network(schedule, prediction, time_scale: float) -> NetworkDenoiser:
    return NetworkDenoiser(MLP(SHAPE, time_scale=time_scale), schedule, prediction).double().requires_grad_(False)


def run_diffusers(scheduler, raw, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(raw(scaled, t.double().repeat(len(x))), t, x).prev_sample
    return x


class TheirGrid(Grid):
    """Times as a diffusers scheduler has them."""

    def __init__(self, values):
        self.values = torch.as_tensor(np.asarray(values), dtype=torch.float64)

    def times(self, schedule, count):
        assert count == len(self.values)
        return self.values


@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_ddim_agrees_with_diffusers(prediction, theirs):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=theirs, clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    student = network(VariancePreserving("scaled_linear", 0.00085, 0.012), prediction, 2e-3)
    noise = torch.randn(4, *SHAPE, dtype=torch.float64)
    their_samples = run_diffusers(scheduler, lambda x, t: student.network(x, t, {}), noise)
    assert DiscreteGrid().times(student.schedule, 10).tolist() == scheduler.timesteps.tolist()
    ours = OdeSampler(DDIM(), DiscreteGrid())(student, noise, {}, 10)
    torch.testing.assert_close(ours, their_samples, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_agrees_with_diffusers_on_a_flow(shift):
    """diffusers steps in sigma: our plain flow on its own sigmas; a shifted schedule makes those sigmas of equal steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.125, 8))
    student = network(RectifiedFlow(), "flow", 2e-3)
    noise = torch.randn(4, *SHAPE, dtype=torch.float64)
    theirs = run_diffusers(scheduler, lambda x, t: student.network(x, t, {}), noise)
    ours = OdeSampler(Euler(), TheirGrid(scheduler.sigmas[:-1]))(student, noise, {}, 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    shifted = RectifiedFlow(shift)
    our_sigmas = shifted.sigma(UniformGrid().times(shifted, 8))
    torch.testing.assert_close(our_sigmas, scheduler.sigmas[:-1].double(), rtol=0, atol=1e-6)


def test_dpm_solver_agrees_with_diffusers():
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler()
    scheduler.set_timesteps(12)
    scheduler.sigmas = scheduler.sigmas.double()
    student = network(VarianceExploding(), "edm", 1.0)
    noise = torch.randn(4, *SHAPE, dtype=torch.float64)
    theirs = run_diffusers(scheduler, lambda x, t: student.network(x, t, {}), 80 * noise)
    ours = OdeSampler(DPMSolver2M(), TheirGrid(scheduler.sigmas[:-1]))(student, noise, {}, 12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(KarrasGrid().times(student.schedule, 12), scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)


def test_heun_is_edms_algorithm_1():
    """Karras et al. 2206.00364, algorithm 1 with sigma(t) = t and s(t) = 1, written out."""
    student = network(VarianceExploding(), "edm", 1.0)
    noise = torch.randn(4, *SHAPE, dtype=torch.float64)
    t = torch.cat([KarrasGrid().times(student.schedule, 6), torch.zeros(1, dtype=torch.float64)])
    x = 80 * noise
    for i in range(6):
        d = (x - student(x, t[i].repeat(4), {})) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (x_next - student(x_next, t[i + 1].repeat(4), {})) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (0.5 * d + 0.5 * d_prime)
        x = x_next
    torch.testing.assert_close(OdeSampler(Heun(), KarrasGrid())(student, noise, {}, 6), x, rtol=0, atol=1e-11)
