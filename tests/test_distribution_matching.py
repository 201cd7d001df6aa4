"""The distribution-matching gradient is that of the KL divergence; its weights; the parts of DMD, DMD2 and f-distill."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import batch_of, small, two_classes
from scoring import (
    OFF,
    SETTINGS,
    Affine,
    Listed,
    RatioPower,
    Tapped,
    drawn,
    every_setting,
    gradient,
    learned,
    off_the_match,
    returning,
    slope,
)
from torch import Tensor

from distill.adversarial import Adversarial
from distill.discriminators import density_ratio
from distill.distances import PseudoHuber, SquaredDistance
from distill.divergences import FDivergence
from distill.features import features_of
from distill.guidance import ClassifierFreeGuidance
from distill.methods import distribution_matching
from distill.methods.distribution_matching import DistributionMatching
from distill.times import UniformTimes
from distill.types import Batch
from distill.weights import VariationalScoreWeight

UNIT_KL: dict[str, Any] = {"weight": RatioPower(2.0), "normalize": False}
"""The weight alpha^2 / sigma^2 in x0, with which the gradient is that of the divergence itself."""

VARIANTS: dict[str, dict[str, Any]] = {
    "dmd": {},
    "kl": UNIT_KL,
    "vsd": {"weight": VariationalScoreWeight(), "normalize": False},
    "diff-instruct": {"normalize": False},
}


# ---------------------------------------------------------------------------------------------------- the KL divergence


@every_setting
@off_the_match
def test_gradient_is_that_of_the_divergence(setting, law):
    """Divided by the size of a sample, of which the loss takes the mean."""
    method = setting.build(DistributionMatching, law, **UNIT_KL)
    expected = slope(setting.divergence, law) / 2
    torch.testing.assert_close(gradient(setting.loss(method), method), expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 0.4


@every_setting
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_generator_is_drawn_to_the_data(setting, settings):
    points = torch.randn(6000, 4, dtype=torch.float64)
    matching = setting.build(DistributionMatching, setting.match, **settings)
    assert gradient(setting.loss_on(matching, points), matching).abs().max() < 1e-12
    for law in OFF:
        method = setting.build(DistributionMatching, law, **settings)
        found = gradient(setting.loss_on(method, points), method)
        moved = tuple(each - 0.01 * part for each, part in zip(law, found))
        assert setting.divergence(moved) < setting.divergence(law) - 1e-4


@every_setting
@off_the_match
def test_an_exact_fake_score_loses_the_posterior_variance(setting, law):
    """At its own times and with its own weight, on samples of the generator: ``a^2 sigma^2 / (alpha^2 a^2 + sigma^2)``."""
    method = setting.build(DistributionMatching, law)
    alpha, sigma = setting.scales(setting.fake_times)
    variance = law[0] ** 2 * sigma**2 / (alpha**2 * law[0] ** 2 + sigma**2)
    torch.testing.assert_close(setting.loss(method, "critic_losses"), (alpha / sigma * variance).mean())
    method.fake.mean = method.fake.mean + 0.1
    assert setting.loss(method, "critic_losses") > (alpha / sigma * variance).mean() + 1e-4


# ----------------------------------------------------------------------------------------- what a sample's gradient is


def networks(name: str, **settings: Any) -> DistributionMatching:
    """A method between two random networks that are not linear, float64."""
    setting = SETTINGS[name]
    method = DistributionMatching(**setting.parts(small(setting.schedule, seed=2).double()), **settings)
    method.critic["score"] = small(setting.schedule, seed=3).double()
    return method


def pulls(method: DistributionMatching, x_g: Tensor, eps: Tensor, batch: Batch | None = None) -> Tensor:
    """``b D`` times the gradient of the loss in each generated sample: g of the method."""
    x_g = x_g.clone().requires_grad_()
    with returning(method, x_g), drawn(eps):
        loss = method.losses(batch or Batch(None, {}, {}, eps))["loss"]
    return x_g.numel() * torch.autograd.grad(loss, x_g)[0]


def compared(method: DistributionMatching, name: str, x_g: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times and what the networks say at the noisy samples."""
    t = Listed(*SETTINGS[name].times).sample(len(x_g), SETTINGS[name].schedule)
    x_t = SETTINGS[name].schedule.add_noise(x_g, eps, t)
    return t, method.teacher(x_t, t, {}), method.fake(x_t, t, {})


@pytest.mark.parametrize("name", SETTINGS)
def test_each_sample_is_pulled_by_the_bracket_over_the_teachers_residual(name):
    """DMD: the three divisors differ, and it is neither the fake score's residual nor the gap; no other gradient is there."""
    method, (x_g, eps) = networks(name), torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    _, x_phi, x_psi = compared(method, name, x_g, eps)
    residual = (x_g - x_phi).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(pulls(method, x_g, eps), (x_psi - x_phi) / residual)
    own, gap = (x_g - x_psi).abs().mean((1, 2, 3)), (x_psi - x_phi).square().sum((1, 2, 3)).sqrt()
    for other in (own.reshape(-1, 1, 1, 1), gap.reshape(-1, 1, 1, 1)):
        assert ((other / residual).log().abs() > 0.01).all()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_variational_weight_is_that_of_the_noises(name, normalize):
    """VSD: ``sigma^2 (eps_phi - eps_psi)``; a weight and the divisor go together."""
    method = networks(name, weight=VariationalScoreWeight(), normalize=normalize)
    x_g, eps = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    t, x_phi, x_psi = compared(method, name, x_g, eps)
    schedule = method.student.schedule
    x_t = schedule.add_noise(x_g, eps, t)
    noises = schedule.eps(x_t, x_phi, t) - schedule.eps(x_t, x_psi, t)
    divisor = (x_g - x_phi).abs().mean((1, 2, 3), keepdim=True) if normalize else 1.0
    expected = schedule.sigma(t).reshape(-1, 1, 1, 1) ** 2 * noises / divisor
    torch.testing.assert_close(pulls(method, x_g, eps), expected)


def test_fake_score_may_be_guided_too():
    """SwiftBrush guides both, DMD2 the teacher alone."""
    teacher, batch = two_classes(SETTINGS["rf"].schedule), batch_of(0, 6)
    x_g, eps = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    t = Listed(*SETTINGS["rf"].times).sample(6, teacher.schedule)
    own, null = (teacher(teacher.schedule.add_noise(x_g, eps, t), t, cond) for cond in (batch.cond, batch.null))
    for fake_guidance, fake_scale in ((None, 1.0), ("teacher", 4.5), (ClassifierFreeGuidance(2.0), 2.0)):
        rules = {"guidance": ClassifierFreeGuidance(4.5), "fake_guidance": fake_guidance}
        method = DistributionMatching(**SETTINGS["rf"].parts(teacher), normalize=False, **rules)
        torch.testing.assert_close(pulls(method, x_g, eps, batch), (fake_scale - 4.5) * (own - null))


def test_dropout_of_both_networks_is_the_same():
    """Diff-Instruct: it is on, cancels between equal networks, and is off afterwards."""
    setting, x_g = SETTINGS["rf"], torch.randn(6, 2, 1, 1)
    parts = setting.parts(small(dropout=0.5, seed=2)) | {"times": UniformTimes(0.2, 0.8)}
    seen = []
    for shared in (True, False):
        method = DistributionMatching(**parts, shared_dropout=shared, normalize=False)
        method.critic.eval()
        torch.manual_seed(0)
        assert (method.direction(x_g, Batch(None, {}, {}, x_g)) == 0).all()
        assert not method.teacher.training and not method.fake.training
        with torch.no_grad():
            method.fake.network.last[-1].weight.mul_(2)
        torch.manual_seed(0)
        seen.append(method.direction(x_g, Batch(None, {}, {}, x_g)))
    assert not torch.allclose(*seen, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ regression


def test_regression_is_the_distance_of_paired_samples():
    """DMD: the generator's sample of the batch's noise to the teacher's; the bracket is on fresh noise."""
    setting, (a, b) = SETTINGS["rf"], OFF[0]
    paired, x0, fresh, eps = torch.randn(4, 6, 2, 1, 1, dtype=torch.float64)
    method = setting.build(DistributionMatching, OFF[0], regression=PseudoHuber(0.3), regression_weight=0.7)
    with drawn(fresh, eps):
        losses = method.losses(Batch(x0, {}, {}, paired))
    plain = setting.build(DistributionMatching, OFF[0])
    expected = PseudoHuber(0.3)(b + a * paired, x0).mean()
    torch.testing.assert_close(losses["regression"].detach(), expected)
    pull = gradient(setting.loss_on(plain, torch.cat([fresh, eps], 1).flatten(1)), plain)
    push = slope(lambda law: PseudoHuber(0.3)(law[1] + law[0] * paired, x0).mean(), (a, b))
    torch.testing.assert_close(gradient(losses["loss"], method), pull + 0.7 * push)
    assert DistributionMatching(**setting.parts(), student=Affine(setting.schedule, a, b)).regression_weight == 0.25


@pytest.mark.parametrize("missing", ["x0", "noise"])
def test_regression_needs_pairs(missing):
    method = SETTINGS["rf"].build(DistributionMatching, OFF[0], regression=SquaredDistance())
    batch = Batch(torch.zeros(3, 2, 1, 1), {}, {}, torch.zeros(3, 2, 1, 1))
    setattr(batch, missing, None)
    with pytest.raises(ValueError, match="model.regression is set, but data delivers no pairs.*null"):
        method.losses(batch)


# -------------------------------------------------------------------------------------------- the discriminator's parts


def game(**settings: Any) -> DistributionMatching:
    """With a discriminator, between two random networks for two classes."""
    adversarial = Adversarial(UniformTimes(0.4, 0.6), generator_weight=0.3, critic_weight=0.7)
    parts = SETTINGS["rf"].parts(Tapped.denoiser(2)) | {"times": Listed(0.2, 0.5, 0.8)}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        method = DistributionMatching(**parts, adversarial=adversarial, **settings)
    method.critic["score"] = Tapped.denoiser(3)
    return method.double()


def test_adversarial_terms_have_their_factors():
    """DMD2, in both players' losses, on the samples of the generator and on data, with the batch's conditions."""
    method, batch = game(), batch_of(0, 6)
    batch.x0 = batch.x0.double()  # type: ignore[union-attr]
    x_g, eps, again = torch.randn(3, 6, 2, 1, 1, dtype=torch.float64)
    with returning(method, x_g), drawn(eps, again):
        torch.manual_seed(1)
        losses = method.losses(batch)
    with drawn(again):
        torch.manual_seed(1)
        expected = method.adversarial.generator_loss(method.fake, method.head, x_g, batch.cond)
    torch.testing.assert_close(losses["adversarial"], expected)
    torch.testing.assert_close(losses["loss"], losses["matching"] + 0.3 * expected)
    both = torch.randn(12, 2, 1, 1, dtype=torch.float64)
    with returning(method, x_g), drawn(eps, both):
        torch.manual_seed(1)
        losses = method.critic_losses(batch)
    with drawn(both):
        torch.manual_seed(1)
        expected = method.adversarial.critic_loss(method.fake, method.head, x_g, batch.x0, batch.cond)
    with drawn(eps):
        denoising = method.denoising_loss(x_g, batch)
    torch.testing.assert_close(losses["adversarial"], expected)
    torch.testing.assert_close(losses["loss"], denoising + 0.7 * expected)


class Weighed(FDivergence):
    """Keeps what it was given."""

    def forward(self, ratio: Tensor, position: Tensor) -> Tensor:
        self.given = ratio, position
        return super().forward(ratio, position)


@pytest.mark.parametrize("normalize", [False, True])
def test_each_sample_is_weighed_by_its_density_ratio(monkeypatch, normalize):
    """f-distill: ``h(r) / mean h`` on the bracket, here of Jensen and Shannon: h = r / (1 + r)."""
    batch, (x_g, eps) = batch_of(0, 6), torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    plain, weighed = game(normalize=normalize), game(normalize=normalize, divergence=Weighed("jensen_shannon"))
    directions = []
    for method in (plain, weighed):
        with drawn(eps):
            directions.append(method.direction(x_g, batch))
    t = weighed.times.sample(6, weighed.student.schedule)
    x_t = weighed.student.schedule.add_noise(x_g, eps, t)
    ratio, position = weighed.divergence.given
    torch.testing.assert_close(ratio, density_ratio(weighed.head(features_of(weighed.fake, x_t, t, batch.cond))))
    torch.testing.assert_close(position, torch.atan2(t, 1 - t) / (math.pi / 2))

    ratio = torch.tensor([0.1, 0.4, 1.0, 2.0, 5.0, 20.0]).double()
    monkeypatch.setattr(distribution_matching, "density_ratio", lambda logits: ratio)
    with drawn(eps):
        found = weighed.direction(x_g, batch)
    h = ratio / (1 + ratio)
    torch.testing.assert_close(found, (h / h.mean()).reshape(-1, 1, 1, 1) * directions[0])
    assert not found.requires_grad


# ------------------------------------------------------------------------------------------------------------ learning


ADVERSARIAL = Adversarial(UniformTimes(0.02, 0.9), generator_weight=0.01, critic_weight=0.1)


@pytest.mark.parametrize(
    "settings", [{}, {"adversarial": ADVERSARIAL, "divergence": FDivergence("jensen_shannon")}], ids=["dmd", "f-distill"]
)
def test_one_step_samples_reach_the_data_law(settings):
    before, after = learned(DistributionMatching, 200, **settings)
    assert after < before / 20
