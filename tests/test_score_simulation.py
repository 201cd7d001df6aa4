"""Backward simulation: at which of its times a batch trains the generator, from which draws, and what is differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from score_methods import BATCHES, KINDS, ROWS, SHAPE, method
from torch import nn

from distill.few_step import FewStepSampler
from distill.methods.base import Method
from distill.methods.score_distillation import ScoreDistillation


def exits(trained: ScoreDistillation, count: int) -> list[int]:
    """The generator's times, by index, that the first batches train."""
    found = []
    for trained.batches_seen in range(count):
        found.append(trained.exit_index())
    return found


def test_exits_are_uniform_and_the_same_on_every_rank(monkeypatch):
    """They depend on (seed, batch) alone: not on the rank, nor on what was drawn before."""
    trained = method(times=(1.0, 0.75, 0.5, 0.25))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    first = exits(trained, 4000)
    counts = torch.bincount(torch.tensor(first))
    assert counts.shape == (4,) and float((counts - 1000).abs().max()) < 4 * (4000 * 3 / 16) ** 0.5
    # Nor does one batch's say anything of the next one's: all 16 pairs are as frequent.
    pairs = torch.bincount(4 * torch.tensor(first[:-1]) + torch.tensor(first[1:]))
    assert pairs.shape == (16,) and float((pairs - 250).abs().max()) < 4 * 250**0.5
    torch.manual_seed(77)
    monkeypatch.setattr(Method, "global_rank", 1)
    assert exits(trained, 200) == first[:200]
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert exits(trained, 200) != first[:200]


def test_ranks_draw_samples_of_their_own_at_the_same_exit(monkeypatch):
    trained = method(times=(1.0, 0.5)).eval()
    samples = {}
    for rank in (0, 1):
        monkeypatch.setattr(Method, "global_rank", rank)
        trained.seed_draws()
        samples[rank] = trained.generate(BATCHES[0], "none")
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)


@pytest.mark.parametrize("start", ["marginal", "prior"])
def test_training_sees_what_sampling_gives(start: Any):
    """The generator's sample in a batch is the sampler's of the same noises, after as many steps, at every exit."""
    trained = method(sampler=FewStepSampler(times=[0.9, 0.6, 0.3], start=start)).eval()
    seen = set()
    for trained.batches_seen in range(12):
        trained.seed_draws()
        x_g = trained.generate(BATCHES[0], "parameters")
        trained.seed_draws()
        noise, steps = torch.randn(ROWS, *SHAPE), trained.exit_index() + 1
        with torch.no_grad():
            assert torch.equal(x_g.detach(), trained.sampler(trained.student, noise, BATCHES[0].cond, steps))
        seen.add(steps)
    assert seen == {1, 2, 3}


def test_only_the_last_step_of_the_generator_is_differentiated():
    trained = method(times=(0.9, 0.6)).eval()
    trained.batches_seen = exits(trained, 20).index(1)
    trained.seed_draws()
    found = torch.autograd.grad(trained.generate(BATCHES[0], "parameters").sum(), list(trained.student.parameters()))
    trained.seed_draws()
    with torch.no_grad():
        noise = torch.randn(ROWS, *SHAPE)
        x, t = trained.sampler.simulate(trained.student, noise, BATCHES[0].cond, 1)
    expected = torch.autograd.grad(trained.student(x, t, BATCHES[0].cond).sum(), list(trained.student.parameters()))
    assert float(t[0]) == pytest.approx(0.6) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_reach_all_weights_after_a_simulation_under_autocast():
    """Weights that autocast has cast for the simulation, without a graph, are cast again for the step that is trained."""
    trained = method("vsd", times=(0.9, 0.5))
    trained.batches_seen = exits(trained, 20).index(1)
    with torch.autocast("cpu", torch.bfloat16):
        trained.losses(BATCHES[0])["loss"].backward()
    without = [name for name, weight in trained.student.named_parameters() if weight.grad is None]
    assert not without


def test_steps_before_the_trained_one_are_taken_as_in_sampling():
    """Without dropout, though the student is in training mode for its own step."""
    trained, modes = method("vsd", times=(0.9, 0.6, 0.3)), []
    trained.batches_seen = exits(trained, 20).index(2)
    trained.student.network.register_forward_hook(lambda module, *_: modes.append(module.training))  # type: ignore[union-attr]
    trained.losses(BATCHES[0])
    assert modes == [False, False, True]
    assert all(part.training for part in trained.student.modules() if isinstance(part, nn.Dropout))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_replayed_alone(kind: str):
    """Seed and number of a batch give its losses, dropout included, whoever's; another number gives others."""
    trained = method(kind, (1.0, 0.5))

    def losses(number: int) -> list[float]:
        trained.batches_seen, found = number, []
        for each in (trained.losses, trained.critic_losses):
            trained.seed_draws()
            found.append(float(each(BATCHES[0])["loss"].detach()))
        return found

    first = losses(3)
    torch.randn(5)
    assert losses(4) != first and losses(3) == first
