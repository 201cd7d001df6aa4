"""SiDA: what the joint discriminator adds to both players' losses, where it looks, and when it begins to count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FixedTimes, batch_of, fit, two_classes
from scoring import Tapped, drawn
from torch import Tensor
from torch.nn.functional import softplus

from distill.adversarial import JointAdversarial
from distill.evaluation import Evaluation
from distill.features import features_of
from distill.few_step import FewStepSampler
from distill.guidance import ClassifierFreeGuidance
from distill.methods.fake_score import FakeScore
from distill.methods.score_distillation import teacher_residual
from distill.methods.score_identity import ScoreIdentity
from distill.optimization import Optimization
from distill.weights import PredictionWeight

T, FAKE_T, ELEMENTS = 0.4, 0.7, 2
BATCH = batch_of(0)


def method(adversarial: JointAdversarial | None, **settings: Any) -> ScoreIdentity:
    """Small networks with a bottleneck; the exact teacher is put in afterwards, since the fake score starts as its copy."""
    fake_score = settings.pop("fake_score", FakeScore(FixedTimes(FAKE_T), PredictionWeight("flow")))
    parts: dict[str, Any] = {"sampler": FewStepSampler(times=[0.9]), "times": FixedTimes(T), "fake_score": fake_score}
    parts |= {"optimization": Optimization(), "evaluation": Evaluation(steps=[1]), "student": Tapped.denoiser(1)}
    made = ScoreIdentity(Tapped.denoiser(2), alpha=1.2, adversarial=adversarial, **parts, **settings)
    made._teacher.module = two_classes()  # type: ignore[union-attr]
    return made


def both(**settings: Any) -> tuple[ScoreIdentity, ScoreIdentity]:
    """With the discriminator, and without."""
    return method(JointAdversarial(**settings)), method(None)


def draws() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 2, 1, 1, generator=generator), torch.randn(8, 2, 1, 1, generator=generator)


def samples_of(made: ScoreIdentity, z: Tensor) -> Tensor:
    with drawn(z):
        return made.generate(BATCH, "none")


def logits(made: ScoreIdentity, x: Tensor, t: float) -> Tensor:
    """The channel mean of the last features of the encoder, read by a plain evaluation."""
    return features_of(made.fake, x, torch.full((len(x),), t), BATCH.cond, "encoder").mean((1, 2, 3))


@pytest.mark.parametrize("shift", [0.0, -30.0], ids=["within the bound", "beyond it"])
def test_the_generators_numerator_gains_the_adversarial_loss_of_the_same_evaluation(shift: float):
    (sida, sid), (z, eps) = both(generator_weight=0.3), draws()
    with torch.no_grad():
        for made in (sida, sid):
            made.fake.network.hidden[-2].bias.add_(shift)  # type: ignore[union-attr]
    with drawn(z, eps):
        own = sida.losses(BATCH)["loss"]
    with drawn(z, eps):
        plain = sid.losses(BATCH)["loss"]
    x_g = samples_of(sida, z)
    x_t = (1 - T) * x_g + T * eps
    bounded = logits(sida, x_t, T).clamp(-10, 10)
    assert bool(bounded.abs().max() == 10) is (shift < 0)
    x_phi = sida.teacher(x_t, torch.full((8,), T), BATCH.cond)
    expected = (0.3 * ELEMENTS * softplus(-bounded) / teacher_residual(x_g, x_phi)).mean()
    torch.testing.assert_close(own - plain, expected, rtol=1e-4, atol=1e-5)


def test_the_generator_is_moved_to_larger_logits():
    sida, (z, eps) = method(JointAdversarial(generator_weight=1e6)), draws()
    with drawn(z, eps):
        sida.losses(BATCH)["loss"].backward()
    before = logits(sida, (1 - T) * samples_of(sida, z) + T * eps, T)
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in sida.student.parameters() if p.grad is not None]).norm()
        for parameter in (p for p in sida.student.parameters() if p.grad is not None):
            parameter -= 1e-3 * parameter.grad / norm
    after = logits(sida, (1 - T) * samples_of(sida, z) + T * eps, T)
    assert softplus(-after).mean() < softplus(-before).mean()


def test_the_fake_scores_loss_gains_the_weighted_cross_entropy_on_equal_noise():
    (sida, sid), (z, eps) = both(critic_weight=3.0), draws()
    with drawn(z, eps):
        losses = sida.critic_losses(BATCH)
    with drawn(z, eps):
        plain = sid.critic_losses(BATCH)["loss"]
    torch.testing.assert_close(losses["denoising"], plain)
    x_g = samples_of(sida, z)
    generated = logits(sida, (1 - FAKE_T) * x_g + FAKE_T * eps, FAKE_T)
    assert BATCH.x0 is not None
    real = logits(sida, (1 - FAKE_T) * BATCH.x0 + FAKE_T * eps, FAKE_T)
    entropy = softplus(-real).mean() + softplus(generated).mean()
    torch.testing.assert_close(losses["adversarial"], entropy)
    torch.testing.assert_close(losses["loss"] - plain, 3.0 * entropy / FAKE_T**2 / (2 * ELEMENTS), rtol=1e-4, atol=1e-6)
    losses["adversarial"].backward()
    assert all(parameter.grad is None for parameter in sida.student.parameters())


def test_it_counts_from_its_start_on():
    """With one turn of the fake score for each of the generator's, batches 1, 3 and 5 are the generator's steps 0, 1 and 2."""
    (sida, sid), (z, eps) = both(generator_weight=1.0, start_step=2), draws()
    values = []
    for made in (sida, sid):
        for number in (1, 3, 5):
            made.batches_seen = number
            with drawn(z, eps):
                values.append(float(made.losses(BATCH)["loss"].detach()))
    assert values[:2] == values[3:5] and values[2] > values[5]


def test_two_turns_move_both_players_and_count_one_evaluation_of_the_fake_network():
    sida = method(JointAdversarial())
    calls: list[int] = []
    sida.fake.network.first.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in sida.named_parameters()}
    fit(sida, [batch_of(number, tied=False) for number in range(2)], 2)
    moved = {name.split(".")[0] for name, value in sida.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"student", "critic", "ema"}
    # Samples once, and data up to the features, in the fake score's turn; once, for both purposes, in the generator's.
    assert len(calls) == 3 and sida.skipped.total == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"fake_guidance": ClassifierFreeGuidance(2.0)},
        {"fake_score": FakeScore(FixedTimes(), PredictionWeight("flow"), guidance=ClassifierFreeGuidance(2.0))},
    ],
)
def test_guided_fake_scores_have_no_features(settings: Any):
    with pytest.raises(ValueError, match="a guided pair has no features; set both to null"):
        method(JointAdversarial(), **settings)


def test_conditions_that_a_discriminator_reads_are_not_dropped():
    with pytest.raises(ValueError, match="null_probability=0.1 with adversarial.*set it to 0"):
        method(JointAdversarial(), fake_score=FakeScore(FixedTimes(), PredictionWeight("flow"), null_probability=0.1))
