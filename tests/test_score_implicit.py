"""SIM: the gradient of its loss is that of the divergence in the fake score, for any distance; with the square it is SiD."""

from __future__ import annotations

import pytest
import torch
from helpers import small
from oracle import MLP
from scoring import (
    OFF,
    Pair,
    RatioPower,
    Setting,
    drawn,
    every_setting,
    gradient,
    hermite,
    learned,
    off_the_match,
    returning,
    slope,
)
from torch import Tensor

from distill.denoiser import NetworkDenoiser
from distill.distances import Distance, PseudoHuber, SquaredDistance, derivative
from distill.methods import score_identity, score_implicit
from distill.methods.score_identity import ScoreIdentity
from distill.methods.score_implicit import ScoreImplicit
from distill.schedules import NoiseSchedule
from distill.types import Batch


class HalfSquare(Distance):
    """``|a - b|^2 / 2`` of whole samples."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).sum(1) / 2


# --------------------------------------------------------------------------------------------------------- the theorem


@every_setting
@off_the_match
def test_gradient_for_the_square(setting, law):
    """That of ``w |X_(a,b) - X_phi|^2 / 2`` in (a, b) of the fake score, the law of x_t held, although the loss's has none."""
    weight = RatioPower(1.0, 0.5)
    method = setting.build(ScoreImplicit, law, distance=HalfSquare(), weight=weight)
    alpha, sigma = (each.flatten() for each in setting.scales(setting.times))
    weights = 0.5 * alpha / sigma
    expected = slope(lambda moved: (weights * setting.squared_gap(law, moved)).mean() / 2, law)
    torch.testing.assert_close(gradient(setting.loss(method), method), expected, rtol=1e-9, atol=1e-12)


def expected_huber(setting: Setting, law: Pair, c: float) -> Tensor:
    """Gradient of ``E sqrt(|X_(a,b) - X_phi|^2 + c^2)``, as above, by quadrature over the two elements of the gap."""
    points, masses = hermite(2, 40)

    def divergence(moved: Pair) -> Tensor:
        middle, spread = (each[:, None] for each in setting.gap(law, moved))
        squares = (middle + spread * points.reshape(1, -1, 2, 1, 1)).square().flatten(2).sum(2)
        return ((squares + c**2).sqrt() * masses).sum(1).mean()

    return slope(divergence, law)


def found_huber(setting: Setting, law: Pair, c: float) -> Tensor:
    """Gradient of the method's loss, by quadrature over (z, eps)."""
    points, masses = hermite(4, 14)
    times = len(setting.times)
    weight = RatioPower(0.0, masses.repeat(times) * len(masses))
    method = setting.build(ScoreImplicit, law, distance=PseudoHuber(c), weight=weight)
    return gradient(setting.loss_on(method, points.repeat(times, 1)), method)


@every_setting
@off_the_match
def test_gradient_for_pseudo_huber(setting, law):
    torch.testing.assert_close(found_huber(setting, law, 0.5), expected_huber(setting, law, 0.5), rtol=1e-4, atol=1e-5)


@every_setting
@off_the_match
def test_without_the_gradient_of_the_distances_derivative_it_is_another_one(monkeypatch, setting, law):
    monkeypatch.setattr(score_implicit, "derivative", lambda distance, y: derivative(distance, y).detach())
    assert (found_huber(setting, law, 0.5) - expected_huber(setting, law, 0.5)).abs().max() > 0.02


@every_setting
@pytest.mark.parametrize("distance", [SquaredDistance(), PseudoHuber(0.05)], ids=["square", "huber"])
def test_generator_is_drawn_to_the_data(setting, distance):
    points = torch.randn(6000, 4, dtype=torch.float64)
    matching = setting.build(ScoreImplicit, setting.match, distance=distance)
    assert gradient(setting.loss_on(matching, points), matching).abs().max() < 1e-12
    for law in OFF:
        method = setting.build(ScoreImplicit, law, distance=distance)
        found = gradient(setting.loss_on(method, points), method)
        moved = tuple(each - 0.01 * part for each, part in zip(law, found))
        assert setting.squared_gap(moved, moved).mean() < setting.squared_gap(law, law).mean() - 5e-4
        assert setting.divergence(moved) < setting.divergence(law) - 5e-4


# --------------------------------------------------------------------------------------------------- the loss, and SiD's


def three(schedule: NoiseSchedule, seed: int) -> NetworkDenoiser:
    """A random network for samples of three elements, float64."""
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP((3, 1, 1)), schedule, "flow").double()


@every_setting
def test_with_the_square_it_is_score_identity_up_to_the_weight(monkeypatch, setting):
    """At alpha = 1 and without SiD's divisor; the mean over D elements makes it 2 / D of the half square."""
    monkeypatch.setattr(score_identity, "teacher_residual", lambda x_g, x_phi: torch.ones(len(x_g)).double())
    parts, losses, gradients = setting.parts(three(setting.schedule, 2)), [], []
    z, eps = torch.randn(2, 6, 3, 1, 1, dtype=torch.float64)
    for kind, settings in ((ScoreIdentity, {"alpha": 1.0}), (ScoreImplicit, {"distance": SquaredDistance()})):
        method = kind(**parts, **settings, student=three(setting.schedule, 1))
        method.critic["score"] = three(setting.schedule, 3)
        with drawn(z, eps):
            losses.append(method.losses(Batch(None, {}, {}, z))["loss"])
        weights = list(method.student.parameters())
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(losses[-1], weights)]))
    torch.testing.assert_close(losses[1], 2 / 3 * losses[0])
    torch.testing.assert_close(gradients[1], 2 / 3 * gradients[0])
    assert losses[0].abs() > 1e-3 and gradients[0].abs().max() > 1e-3


@every_setting
def test_loss_on_networks_that_are_not_linear(setting):
    """Pseudo-Huber's own divisor is ``sqrt(|X_psi - X_phi|^2 + c^2)`` of the sample, c with the square root of its size."""
    weight = RatioPower(1.0)
    method = ScoreImplicit(
        **setting.parts(small(setting.schedule, seed=2).double()), distance=PseudoHuber(relative=0.1), weight=weight
    )
    method.critic["score"] = small(setting.schedule, seed=3).double()
    x_g, eps = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    x_g.requires_grad_()
    t = method.times.sample(6, setting.schedule)
    with returning(method, x_g), drawn(eps):
        losses = method.losses(Batch(None, {}, {}, eps))
    x_t = setting.schedule.add_noise(x_g, eps, t)
    x_phi, x_psi = (network(x_t, t, {}) for network in (method.teacher, method.fake))
    divisor = ((x_psi - x_phi).square().sum((1, 2, 3)) + 0.1**2 * 2).sqrt()
    expected = ((x_phi - x_psi) * (x_psi - x_g)).sum((1, 2, 3)) / divisor * weight(setting.schedule, t, t)
    torch.testing.assert_close(losses["loss"], expected.mean())
    torch.testing.assert_close(losses["gap"], (x_psi - x_phi).detach().square().mean())
    found, wanted = (torch.autograd.grad(loss, x_g, retain_graph=True)[0] for loss in (losses["loss"], expected.mean()))
    torch.testing.assert_close(found, wanted)
    losses["loss"].backward()
    assert all(each.grad is None for each in [*method.teacher.parameters(), *method.fake.parameters()])


# ------------------------------------------------------------------------------------------------------------ learning


def test_one_step_samples_reach_the_data_law():
    before, after = learned(ScoreImplicit, 200, distance=PseudoHuber(0.1))
    assert after < before / 8
