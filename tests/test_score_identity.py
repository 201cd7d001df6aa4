"""SiD: the expectation of its loss, and of its gradient, in closed form; its divisor; the three guidance scales of SiD-LSG."""

from __future__ import annotations

import pytest
import torch
from helpers import batch_of, small, two_classes
from scoring import (
    OFF,
    SETTINGS,
    Listed,
    RatioPower,
    drawn,
    every_setting,
    gradient,
    learned,
    off_the_match,
    returning,
    slope,
)
from torch import Tensor

from distill.guidance import ClassifierFreeGuidance, RandomGuidance
from distill.methods import score_identity
from distill.methods.score_distillation import teacher_residual
from distill.methods.score_identity import ScoreIdentity
from distill.types import Batch


@pytest.fixture
def undivided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the divisor the loss is quadratic in the draws."""
    monkeypatch.setattr(score_identity, "teacher_residual", lambda x_g, x_phi: torch.ones(len(x_g)).double())


# ------------------------------------------------------------------------------------------------- the Fisher divergence


@every_setting
@off_the_match
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_gradient_has_two_parts(undivided, setting, law, alpha):
    """That of ``|X_(a,b) - X_phi|^2 / 2`` in the fake score, and 1 - alpha times that of the naive square in the law of x_t.

    The fake score of the loss has no gradient in (a, b): the first part is the identity's doing.
    """
    method = setting.build(ScoreIdentity, law, alpha=alpha)
    of_score = slope(lambda moved: setting.squared_gap(law, moved).mean() / 2, law)
    of_law = slope(lambda moved: setting.squared_gap(moved, law).mean(), law)
    torch.testing.assert_close(gradient(setting.loss(method), method), of_score + (1 - alpha) * of_law, rtol=1e-9, atol=1e-12)
    assert of_score.abs().max() > 0.1 and of_law.abs().max() > 0.05


@every_setting
@off_the_match
def test_at_one_half_it_is_the_fisher_divergence(undivided, setting, law):
    """Value and whole gradient: the loss is then that of two denoisers, ``(|X_phi - x_g|^2 - |X_psi - x_g|^2) / 2``."""
    method = setting.build(ScoreIdentity, law, alpha=0.5)
    loss = setting.loss(method)
    torch.testing.assert_close(loss.detach(), setting.squared_gap(law, law).mean() / 2)
    torch.testing.assert_close(gradient(loss, method), slope(lambda moved: setting.squared_gap(moved, moved).mean() / 2, law))


@every_setting
@off_the_match
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_value_is_that_of_the_naive_loss_times_one_less_alpha(undivided, setting, law, alpha):
    loss = setting.loss(setting.build(ScoreIdentity, law, alpha=alpha))
    naive = setting.squared_gap(law, law).mean()
    torch.testing.assert_close(loss.detach(), (1 - alpha) * naive, rtol=1e-9, atol=1e-12)
    assert naive > 0.05


@every_setting
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_generator_is_drawn_to_the_data_with_the_divisor_too(setting, alpha):
    points = torch.randn(6000, 4, dtype=torch.float64)
    matching = setting.build(ScoreIdentity, setting.match, alpha=alpha)
    assert gradient(setting.loss_on(matching, points), matching).abs().max() < 1e-12
    for law in OFF:
        method = setting.build(ScoreIdentity, law, alpha=alpha)
        found = gradient(setting.loss_on(method, points), method)
        moved = tuple(each - 0.01 * part for each, part in zip(law, found))
        assert setting.squared_gap(moved, moved).mean() < setting.squared_gap(law, law).mean() - 0.002
        assert setting.divergence(moved) < setting.divergence(law) - 0.002


# ------------------------------------------------------------------------------------------------------------ the loss


def by_hand(method: ScoreIdentity, x_g: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each sample in its other form, and its divisor, where the networks are not guided."""
    x_phi, x_psi = (network(x_t, t, {}) for network in (method.teacher, method.fake))
    gap = x_phi - x_psi
    square, cross = (each.flatten(1).sum(1) for each in (gap.square(), gap * (x_psi - x_g)))
    return (1 - method.alpha) * square + cross, (x_g - x_phi).abs().flatten(1).mean(1)


@every_setting
@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_loss_on_networks_that_are_not_linear(setting, alpha):
    """The gradient passes x_t into both networks, the divisor carries none; their weights get none."""
    method = ScoreIdentity(**setting.parts(small(setting.schedule, seed=2).double()), alpha=alpha)
    method.critic["score"] = small(setting.schedule, seed=3).double()
    x_g, eps = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    x_g.requires_grad_()
    t = method.times.sample(6, setting.schedule)
    with returning(method, x_g), drawn(eps):
        loss = method.losses(Batch(None, {}, {}, eps))["loss"]
    values, divisor = by_hand(method, x_g, setting.schedule.add_noise(x_g, eps, t), t)
    torch.testing.assert_close(loss, (values / divisor).mean())
    (found,) = torch.autograd.grad(loss, x_g, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((values / divisor.detach()).mean(), x_g, retain_graph=True)[0])
    assert not torch.allclose(found, torch.autograd.grad((values / divisor).mean(), x_g)[0], rtol=1e-2)
    loss.backward()
    assert all(weight.grad is None for weight in [*method.teacher.parameters(), *method.fake.parameters()])


def test_the_divisor_is_bounded_below():
    x = torch.tensor([[1.0, -2.0], [0.5, 0.5]]).requires_grad_()
    residual = teacher_residual(x, torch.tensor([[1.0, -2.0], [0.0, 2.0]]))
    assert residual.tolist() == pytest.approx([1e-5, 1.0]) and not residual.requires_grad


# ------------------------------------------------------------------------------------------------------------ guidance


def test_each_network_is_guided_by_its_own_scale():
    """SiD-LSG: the teacher, the fake score in the generator's loss, and the fake score in its own."""
    setting, batch = SETTINGS["rf"], batch_of(0, 6)
    teacher, fake, schedule = two_classes(setting.schedule), two_classes(setting.schedule), setting.schedule
    fake.means = 0.5 * fake.means + 0.2
    rules = {"guidance": ClassifierFreeGuidance(2.0), "fake_guidance": ClassifierFreeGuidance(3.0)}
    method = ScoreIdentity(**setting.parts(teacher, guidance=ClassifierFreeGuidance(4.0)), **rules)
    method.critic["score"] = fake
    x_g, eps = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)

    def x0(network, x, t, scale):
        own, null = (network(x, t, cond) for cond in (batch.cond, batch.null))
        return null + scale * (own - null)

    t = Listed(*setting.times).sample(6, schedule)
    x_t = schedule.add_noise(x_g, eps, t)
    x_phi, x_psi = x0(teacher, x_t, t, 2.0), x0(fake, x_t, t, 3.0)
    with returning(method, x_g), drawn(eps):
        loss = method.losses(batch)["loss"]
    expected = ((x_phi - x_psi) * (x_psi - x_g)).flatten(1).sum(1) / (x_g - x_phi).abs().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected.mean())

    t = Listed(*setting.fake_times).sample(6, schedule)
    with returning(method, x_g), drawn(eps):
        loss = method.critic_losses(batch)["loss"]
    errors = (x0(fake, schedule.add_noise(x_g, eps, t), t, 4.0) - x_g).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, (RatioPower(1.0)(schedule, t, t) * errors).mean())


def test_a_drawn_scale_is_shared_with_the_fake_score():
    """Where both networks are the same, they then agree; each on its own, they do not."""
    teacher, batch = two_classes(), batch_of(0, 6)
    x_t, t = torch.randn(6, 2, 1, 1), torch.full((6,), 0.5)
    gaps, scales = {}, []
    for fake_guidance in ("teacher", None, RandomGuidance(2.0, 5.0)):
        settings = {"guidance": RandomGuidance(2.0, 5.0), "fake_guidance": fake_guidance}
        method = ScoreIdentity(**SETTINGS["rf"].parts(teacher), **settings)
        x_phi, x_psi = method.scores(x_t, t, batch)
        own, null = (teacher(x_t, t, cond) for cond in (batch.cond, batch.null))
        scale = ((x_phi - null) * (own - null)).sum() / (own - null).square().sum()
        torch.testing.assert_close(x_phi, null + scale * (own - null))
        gaps[str(fake_guidance)] = float((x_phi - x_psi).abs().max())
        scales.append(float(scale))
    assert gaps.pop("teacher") == 0 and min(gaps.values()) > 0.01
    assert len(set(scales)) == 3 and 2 <= min(scales) and max(scales) <= 5


def test_scales_are_drawn_for_each_batch_wherever_a_rule_draws_them():
    """The fake score's in the generator's loss, and in its own training, on the same noisy samples."""
    teacher, batch = two_classes(), batch_of(0, 6)
    method = ScoreIdentity(
        **SETTINGS["rf"].parts(teacher, guidance=RandomGuidance(2.0, 5.0)), fake_guidance=RandomGuidance(2.0, 5.0)
    )
    x_t, t = torch.randn(6, 2, 1, 1), torch.full((6,), 0.5)
    first, second = (method.scores(x_t, t, batch)[1] for _ in range(2))
    assert (first - second).abs().max() > 0.01
    x_g, eps, losses = torch.randn(6, 2, 1, 1), torch.randn(6, 2, 1, 1), []
    for _ in range(2):
        with drawn(eps):
            losses.append(float(method.denoising_loss(x_g, batch)))
    assert abs(losses[0] - losses[1]) > 1e-3


# ------------------------------------------------------------------------------------------------------------ learning


def test_one_step_samples_reach_the_data_law():
    before, after = learned(ScoreIdentity, 200, alpha=1.2)
    assert after < before / 30
