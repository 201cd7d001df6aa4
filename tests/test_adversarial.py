"""The adversarial part: what the discriminator is shown, both players' losses in closed form, and who is differentiated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from scoring import SETTINGS, Listed, drawn, every_setting
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.adversarial import Adversarial
from distill.denoiser import NetworkDenoiser
from distill.discriminators import ChannelMeanDiscriminator
from distill.networks.bottleneck import Bottleneck
from distill.networks.families import FAMILIES as WRAPPERS
from distill.schedules import NoiseSchedule, VariancePreserving
from distill.times import UniformTimes
from distill.types import Cond, label_conditions


class Slope(nn.Module):
    """Features ``slope x``; keeps what it was given."""

    shape, num_classes, widths = (2, 1, 1), 2, {}

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7).double())
        self.tap, self.calls = nn.Identity(), []  # type: ignore[var-annotated]

    def bottleneck(self, layer: str) -> Bottleneck:
        assert layer == "encoder"
        return Bottleneck(self.tap, 2, (1, 1))

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Any = None) -> Tensor:
        self.calls.append((x, time, cond))
        return self.tap(self.slope * x) + 1.0


def linear(schedule: NoiseSchedule, *times: float) -> tuple[Adversarial, NetworkDenoiser, nn.Module]:
    """A discriminator whose logit is ``slope mean(x_t)``, the network under it, and its head."""
    adversarial = Adversarial(Listed(*times), discriminator=ChannelMeanDiscriminator())
    fake = NetworkDenoiser(Slope(), schedule, "x0")
    return adversarial, fake, adversarial.build_head(fake)


def draws(number: int) -> list[Tensor]:
    return [torch.randn(6, 2, 1, 1, dtype=torch.float64) for _ in range(number)]


# ------------------------------------------------------------------------------------------------------- in closed form


@every_setting
def test_generator_raises_the_logits_of_its_noisy_samples(setting):
    """``E softplus(-D(alpha x_g + sigma eps))`` at times of its own; its gradient is in the samples alone."""
    adversarial, fake, head = linear(setting.schedule, *setting.times)
    cond, _ = label_conditions(torch.arange(6) % 2, 2)
    x_g, eps = draws(2)
    x_g.requires_grad_()
    with drawn(eps):
        loss = adversarial.generator_loss(fake, head, x_g, cond)
    alpha, sigma = (each.repeat_interleave(2, 0) for each in setting.scales(setting.times))
    logits = 0.7 * (alpha * x_g + sigma * eps).mean((1, 2, 3))
    torch.testing.assert_close(loss, softplus(-logits).mean())
    (expected,) = torch.autograd.grad(softplus(-logits).mean(), x_g)
    loss.backward()
    torch.testing.assert_close(x_g.grad, expected)
    assert (x_g.grad < 0).all() and fake.network.slope.grad is None and fake.network.slope.requires_grad


@every_setting
def test_critic_tells_noisy_data_from_noisy_samples(setting):
    """``E softplus(-D(real)) + E softplus(D(generated))``, in one evaluation; its gradient is in the weights alone."""
    both = (*setting.times, *setting.fake_times)
    adversarial, fake, head = linear(setting.schedule, *both)
    cond, _ = label_conditions(torch.tensor([0, 1, 1, 0, 1, 0]), 2)
    x_g, x0, eps, again = draws(4)
    x_g.requires_grad_()
    x0.requires_grad_()
    with drawn(torch.cat([eps, again])):
        loss = adversarial.critic_loss(fake, head, x_g, x0, cond)
    alpha, sigma = (each.repeat_interleave(2, 0) for each in setting.scales(both))
    x_t = alpha * torch.cat([x_g, x0]).detach() + sigma * torch.cat([eps, again])

    def loss_at(slope: Tensor) -> Tensor:
        generated, real = (slope * x_t.mean((1, 2, 3))).chunk(2)
        return softplus(-real).mean() + softplus(generated).mean()

    slope = torch.tensor(0.7).double().requires_grad_()
    torch.testing.assert_close(loss, loss_at(slope))
    loss.backward()
    torch.testing.assert_close(fake.network.slope.grad, torch.autograd.grad(loss_at(slope), slope)[0])
    assert x_g.grad is None and x0.grad is None
    ((seen, _, labels),) = fake.network.calls
    torch.testing.assert_close(seen, x_t)
    assert torch.equal(labels["labels"], cond["labels"].repeat(2))


def test_samples_and_data_are_shown_at_times_of_their_own():
    adversarial, fake, head = linear(SETTINGS["rf"].schedule, 0.5)
    adversarial.times = UniformTimes(0.3, 0.7)
    adversarial.critic_loss(fake, head, *draws(2), label_conditions(torch.arange(6) % 2, 2)[0])
    ((_, time, _),) = fake.network.calls
    assert len(set(time.tolist())) == 12 and 300 <= time.min() and time.max() <= 700


def test_a_network_without_a_bottleneck_is_refused():
    with pytest.raises(ValueError, match="features of a .* are not defined"):
        Adversarial(UniformTimes()).build_head(SETTINGS["rf"].teacher)


# ---------------------------------------------------------------------------------------------------- on a real network


@pytest.mark.parametrize("name", ["ddpm", "sd15", "dit"])
def test_steps_of_both_players_lower_their_losses(name):
    """DMD2's head on a network of diffusers, for the same draws."""
    tiny = FAMILIES[name]
    fake = NetworkDenoiser(WRAPPERS[tiny.model_class].of(tiny.model()), VariancePreserving(), "eps").train()
    adversarial = Adversarial(UniformTimes(0.2, 0.4))
    head, cond = adversarial.build_head(fake), tiny.cond(4)[0]
    x_g, x0 = (torch.randn(4, tiny.channels, tiny.size, tiny.size) for _ in range(2))

    def critic_loss() -> Tensor:
        torch.manual_seed(1)
        return adversarial.critic_loss(fake, head, x_g, x0, cond)

    def generator_loss(samples: Tensor) -> Tensor:
        torch.manual_seed(2)
        return adversarial.generator_loss(fake, head, samples, cond)

    x_g.requires_grad_()
    before = generator_loss(x_g)
    before.backward()
    assert all(weight.grad is None and weight.requires_grad for weight in fake.parameters())
    with torch.no_grad():
        assert generator_loss(x_g - 0.1 * x_g.grad / x_g.grad.norm()) < before

    x_g.grad = None
    head.zero_grad()
    before = critic_loss()
    before.backward()
    assert x_g.grad is None and all(weight.grad.abs().max() > 0 for weight in head.parameters())
    reached = [weight for weight in [*head.parameters(), *fake.parameters()] if weight.grad is not None]
    assert len(reached) > len(list(head.parameters()))
    with torch.no_grad():
        norm = torch.stack([weight.grad.norm() for weight in reached]).norm()
        for weight in reached:
            weight -= 0.01 * weight.grad / norm
        assert critic_loss() < before
