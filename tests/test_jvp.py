"""Jacobian-vector products: closed forms on Gaussian data, and on networks of diffusers against differentiation in reverse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import SHAPE, PowerMap, batch_of, gaussian, small
from jsonargparse import ArgumentParser
from oracle import SCHEDULES, GaussianConsistency
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.frozen import Frozen
from distill.jvp import FiniteDifference, ForwardMode, JacobianVectorProduct
from distill.networks.families import FAMILIES as WRAPPERS
from distill.schedules import NoiseSchedule, TrigFlow, VariancePreserving, per_sample


def points(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Samples at noise-to-signal ratios 0.3, 1 and 3, float64."""
    t = schedule.time_of_nsr(torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64))
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return per_sample(schedule.scale(t), x) * x, t


def along_trajectory(
    product: JacobianVectorProduct, function: Denoiser, teacher: Denoiser, x: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and total derivative of a function along the teacher's trajectories."""
    return product(function, x, t, {}, teacher.schedule.velocity(x, teacher(x, t, {}), t), torch.ones_like(t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_derivative_along_trajectories_of_gaussian_data(name):
    """``x - alpha m`` grows as the spread ``s``, so that ``x0 = m + v (alpha / s) c`` with a constant ``c``."""
    schedule = SCHEDULES[name]
    teacher, (x, t) = gaussian(schedule), points(schedule)
    alpha, sigma, mean, variance = teacher.scales(x, t)
    d_alpha, d_sigma = (per_sample(value, x) for value in schedule.derivatives(t))
    spread = (alpha**2 * variance + sigma**2).sqrt()
    d_ratio = (d_alpha * spread**2 - alpha * (alpha * d_alpha * variance + sigma * d_sigma)) / spread**3
    expected = variance * d_ratio * (x - alpha * mean) / spread
    for product, tolerance in ((ForwardMode(), 1e-9), (FiniteDifference(1e-6 * schedule.t_max), 1e-5)):
        value, derivative = along_trajectory(product, teacher, teacher, x, t)
        assert torch.equal(value, teacher(x, t, {}))
        assert (derivative - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("name", ["vp-linear", "rf-shift3", "trig"])
@pytest.mark.parametrize("product", [ForwardMode(), FiniteDifference(1e-5)], ids=["forward", "difference"])
def test_the_consistency_functions_derivative_vanishes_in_any_view(product, name):
    """sCM's fixed point, seen under TrigFlow: the change of schedule is differentiated with the function."""
    teacher, trig = gaussian(SCHEDULES[name]), TrigFlow()
    exact = GaussianConsistency(teacher.schedule, teacher.mean, teacher.variance).under(trig)
    x, t = points(trig)
    assert along_trajectory(product, exact, teacher.under(trig), x, t)[1].abs().max() < 1e-6
    wrong = PowerMap(teacher, 0.9).double().under(trig)
    assert along_trajectory(product, wrong, teacher.under(trig), x, t)[1].abs().max() > 1e-2


def test_the_difference_is_of_second_order():
    teacher, (x, t) = gaussian(TrigFlow()), points(TrigFlow())
    exact = along_trajectory(ForwardMode(), teacher, teacher, x, t)[1]
    errors = [(along_trajectory(FiniteDifference(h), teacher, teacher, x, t)[1] - exact).abs().max() for h in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


# ------------------------------------------------------------------------------------------------ networks of diffusers


def network(name: str, **changes: Any) -> tuple[NetworkDenoiser, Tensor, Tensor, Any]:
    """A tiny model whose weights are all non-zero, with two samples, their times and conditions."""
    family = FAMILIES[name]
    made = NetworkDenoiser(WRAPPERS[family.model_class].of(family.model(**changes)), VariancePreserving(), "v").eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(2, family.channels, family.size, family.size, generator=generator)
    return made, x, torch.tensor([0.5, 1.1]), family.cond(2)[0]


def direction(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), torch.tensor([1.0, 0.7])


@pytest.mark.parametrize("name", ["dit", "sd15", "flux"])
def test_a_networks_derivative_is_that_of_two_reverse_passes(name):
    """Through attention, the embedding of time and the view under TrigFlow; the difference only as far as float32 goes."""
    made, x, t, cond = network(name)
    view, (dx, dt) = made.under(TrigFlow()), direction(x)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.jvp(lambda x, t: view(x, t, cond), (x, t), (dx, dt))
    value, derivative = ForwardMode()(view, x, t, cond, dx, dt)
    torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-5)
    size = expected[1].abs().max()
    assert (derivative - expected[1]).abs().max() < 1e-4 * size
    value, difference = FiniteDifference(1e-4)(view, x, t, cond, dx, dt)
    with torch.no_grad():
        assert torch.equal(value, view(x, t, cond))
    assert (difference - expected[1]).abs().max() < 2e-2 * size
    without_time = ForwardMode()(view, x, t, cond, dx, torch.zeros_like(dt))[1]
    assert (without_time - expected[1]).abs().max() > 0.05 * size, "the time's part is seen"


@pytest.mark.parametrize("state", ["checkpointing", "compiled", "frozen"])
def test_forward_mode_passes_through_what_training_makes_of_a_network(state):
    made, x, t, cond = network("dit")
    dx, dt = direction(x)
    expected = ForwardMode()(made, x, 500 * t, cond, dx, dt)
    compiled: list[Any] = []
    if state == "checkpointing":
        made.network.model.enable_gradient_checkpointing()
        made.train()
    elif state == "compiled":
        made.network.model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
        with torch.no_grad():
            made(x, 500 * t, cond)
    graphs = len(compiled)
    used = Frozen(made).module if state == "frozen" else made
    found = ForwardMode()(used, x, 500 * t, cond, dx, dt)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(compiled) == graphs and (graphs > 0) == (state == "compiled")


@pytest.mark.parametrize("product", [ForwardMode(), FiniteDifference(1e-3)], ids=["forward", "difference"])
def test_dropout_is_the_same_in_every_evaluation_and_in_the_callers_next(product):
    made, batch = small(dropout=0.5, num_classes=2).train(), batch_of(0)
    x, t = batch.x0, torch.full((8,), 0.4)
    torch.manual_seed(5)
    value, derivative = product(made, x, t, batch.cond, torch.ones_like(x), torch.ones_like(t))
    after = made(x, t, batch.cond)
    assert torch.equal(value, after) and not value.requires_grad and not derivative.requires_grad and after.requires_grad
    made.eval()
    assert (made(x, t, batch.cond) - value).abs().max() > 0.01, "dropout was at work"
    assert derivative.abs().max() < 20, "two masks would differ by 500 times as much"


def test_autocast_is_off_and_precision_kept():
    made, x, t, cond = network("dit")
    dx, dt = direction(x)
    expected = ForwardMode()(made, x, 500 * t, cond, dx, dt)
    with torch.autocast("cpu", torch.bfloat16):
        found = ForwardMode()(made, x, 500 * t, cond, dx, dt)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_an_operation_without_forward_mode_is_refused_with_what_to_use():
    made, x, t, cond = network("dit")

    def fused(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return denoiser(x, t, cond)

    with pytest.raises(ValueError, match="ForwardMode: .* without forward mode .*use FiniteDifference"):
        ForwardMode()(made, x, 500 * t, cond, *direction(x), fused)
    FiniteDifference()(made, x, 500 * t, cond, *direction(x), fused)


def test_differences_in_half_precision_are_refused():
    made, x, t, cond = network("dit")
    made.to(torch.bfloat16)
    with pytest.raises(ValueError, match="FiniteDifference: the network computes in torch.bfloat16.*use ForwardMode"):
        FiniteDifference().check(made)
    with pytest.raises(ValueError, match="use ForwardMode"):
        FiniteDifference()(made, x, 500 * t, cond, *direction(x))
    ForwardMode().check(made)


@pytest.mark.parametrize("step", [0.0, -1e-3, float("nan"), float("inf")])
def test_a_step_that_is_none_is_refused(step):
    with pytest.raises(ValueError, match=f"step={step}: give a positive number"):
        FiniteDifference(step)


def test_a_recipe_names_it_by_its_class():
    parser = ArgumentParser()
    parser.add_argument("--jvp", type=JacobianVectorProduct)
    made = parser.instantiate(parser.parse_args(["--jvp=FiniteDifference", "--jvp.step=0.01"])).jvp
    assert type(made) is FiniteDifference and made.step == 0.01
