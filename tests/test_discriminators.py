"""Heads: DMD2's layers, how many for which map; SiDA's mean; the losses and the density ratio in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from distill.denoiser import NetworkDenoiser
from distill.discriminators import (
    ChannelMeanDiscriminator,
    ChannelMeanHead,
    ConvolutionalDiscriminator,
    ConvolutionHead,
    Discriminator,
    density_ratio,
    discriminator_loss,
    generator_loss,
    group_norm,
)
from distill.features import bottleneck_of, features_of
from distill.networks.bottleneck import Bottleneck
from distill.networks.families import FAMILIES as WRAPPERS
from distill.schedules import VariancePreserving


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def described(head: ConvolutionHead) -> list[Any]:
    """The layers of a head: kernel, stride, padding and output of a convolution, groups of a normalisation."""
    described: list[Any] = []
    for layer in head.layers:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None and layer.kernel_size[0] == layer.kernel_size[1]
            described.append((layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.out_channels))
        else:
            described.append(layer.num_groups if isinstance(layer, nn.GroupNorm) else type(layer))
    return described


# -------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("channels, size, halvings", [(1280, 32, 3), (1280, 8, 1), (768, 8, 1)], ids=["sdxl", "sd15", "adm"])
def test_the_published_heads(channels, size, halvings):
    """As in DMD2's public code: main/sd_guidance.py and main/edm/edm_guidance.py (commit 8d8fa55)."""
    with torch.device("meta"):
        head = ConvolutionHead(channels, (size, size))
    expected = halvings * [(4, 2, 1, channels), 32, nn.SiLU] + [(4, 4, 0, channels), 32, nn.SiLU, (1, 1, 0, 1)]
    assert described(head) == expected


@pytest.mark.parametrize(
    "size, halvings, kernel",
    [
        ((64, 64), 4, (4, 4)),
        ((12, 12), 1, (4, 4)),
        ((7, 7), 0, (4, 4)),
        ((4, 4), 0, (4, 4)),
        ((3, 3), 0, (3, 3)),
        ((2, 2), 0, (2, 2)),
        ((1, 1), 0, (1, 1)),
        ((8, 16), 1, (4, 4)),
        ((2, 8), 0, (2, 4)),
    ],
)
def test_so_many_halvings_for_a_map_of_this_size(size, halvings, kernel):
    head = ConvolutionHead(16, size)
    assert (head.halvings, head.kernel) == (halvings, kernel)
    assert len(head.layers) == 3 * halvings + 4
    logits = head(maps(3, 16, *size))
    # One logit where the map is as high and wide as the last kernel, or not a whole stride larger.
    assert logits.shape == (3, 1, max(1, (size[1] >> halvings) // 4))


def test_a_larger_map_has_a_map_of_logits():
    """Each is of its own part, by the same weights."""
    head = ConvolutionHead(16, (4, 4))
    features = maps(2, 16, 8, 12)
    logits = head(features)
    assert logits.shape == (2, 2, 3)
    convolved = head.layers[0](features)
    assert torch.allclose(convolved[:, :, 1, 2], head.layers[0](features[:, :, 4:8, 8:12])[:, :, 0, 0], atol=1e-6)
    assert ConvolutionHead(16, (8, 8))(maps(2, 16, 16, 16)).shape == (2, 2, 2)


def test_a_map_that_is_too_small_is_refused():
    head = ConvolutionHead(16, (8, 8))
    with pytest.raises(ValueError, match=r"features of 7x8: this head needs 8x8; .*size=\[7, 8\]"):
        head(maps(2, 16, 7, 8))
    with pytest.raises(ValueError, match="features of 8x6"):
        head(maps(2, 16, 8, 6))
    for channels, size in ((0, (8, 8)), (16, (8, 0))):
        with pytest.raises(ValueError, match=f"channels={channels}"):
            ConvolutionHead(channels, size)


@pytest.mark.parametrize(
    "channels, groups", [(1280, 32), (768, 32), (320, 32), (256, 32), (64, 8), (32, 4), (34, 2), (16, 2), (8, 1), (6, 1)]
)
def test_groups_divide_the_channels_and_are_not_too_small(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


@pytest.mark.parametrize("channels", [8, 16, 32, 64])
def test_a_logit_of_few_channels_depends_on_the_features(channels):
    """With one value a group it would be a constant, with two hardly more than a sign."""
    head, features = ConvolutionHead(channels, (4, 4)), maps(64, channels, 4, 4).requires_grad_()
    logits = head(features)
    assert logits.flatten().unique().numel() == 64
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4
    logits = head(features)
    assert all(value.abs().max() > 0 for value in torch.autograd.grad(logits.square().sum(), list(head.parameters())))


def test_channel_means():
    features = maps(2, 5, 3, 4).requires_grad_()
    head = ChannelMeanHead()
    logits = head(features)
    assert logits.shape == (2, 3, 4) and not list(head.parameters())
    torch.testing.assert_close(logits[1, 2, 3], features[1, :, 2, 3].sum() / 5)
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    torch.testing.assert_close(gradient, torch.full_like(features, 1 / 5))


@pytest.mark.parametrize("head", [ConvolutionHead(16, (4, 4)), ChannelMeanHead()], ids=lambda head: type(head).__name__)
def test_logits_are_in_float32_under_autocast(head):
    with torch.autocast("cpu", torch.bfloat16):
        assert head(maps(2, 16, 4, 4)).dtype == torch.float32
        assert head(maps(2, 16, 4, 4).bfloat16()).dtype == torch.float32


def test_what_a_recipe_names_is_built_for_the_network():
    bottleneck = Bottleneck(nn.Identity(), 16, (16, 16))
    built = ConvolutionalDiscriminator().build(bottleneck)
    assert described(built) == described(ConvolutionHead(16, (16, 16))) and built.halvings == 2
    assert ConvolutionalDiscriminator(size=(4, 4)).build(bottleneck).halvings == 0
    assert isinstance(ChannelMeanDiscriminator().build(bottleneck), ChannelMeanHead)
    assert (ConvolutionalDiscriminator().layer, ChannelMeanDiscriminator().layer) == ("middle", "encoder")


def test_short_names_in_a_recipe():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--discriminator", type=Discriminator)
    for text, expected in (
        ("ConvolutionalDiscriminator", ConvolutionalDiscriminator()),
        ("ChannelMeanDiscriminator", ChannelMeanDiscriminator()),
        (
            "{class_path: ConvolutionalDiscriminator, init_args: {layer: encoder, size: [8, 8]}}",
            ConvolutionalDiscriminator("encoder", (8, 8)),
        ),
    ):
        assert parser.instantiate(parser.parse_args([f"--discriminator={text}"])).discriminator == expected


@pytest.mark.parametrize("name", ["sd15", "dit", "flux", "sana"])
@pytest.mark.parametrize("part", [ConvolutionalDiscriminator(), ChannelMeanDiscriminator()], ids=["convolution", "mean"])
def test_the_adversarial_game_on_a_network(name, part):
    """Both sides' gradients arrive: the discriminator's in head and network, the generator's in the sample."""
    tiny = FAMILIES[name]
    network = WRAPPERS[tiny.model_class].of(tiny.model())
    fake, cond = NetworkDenoiser(network, VariancePreserving(), "eps").eval(), tiny.cond(2)[0]
    shape, t = (2, tiny.channels, tiny.size, tiny.size), torch.tensor([200.0, 700.0])
    # Flux' native size is far from that of these samples.
    size = (4, 4) if name == "flux" and isinstance(part, ConvolutionalDiscriminator) else None
    part = part if size is None else ConvolutionalDiscriminator(part.layer, size)
    head = part.build(bottleneck_of(fake, part.layer))
    real, sample = maps(*shape, seed=1), maps(*shape, seed=2).requires_grad_()
    logits = [head(features_of(fake, x, t, cond, part.layer)) for x in (real, sample.detach())]
    discriminator_loss(*logits).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in head.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in fake.parameters())
    generator_loss(head(features_of(fake, sample, t, cond, part.layer))).backward()
    assert sample.grad.abs().amax((1, 2, 3)).min() > 0


# ------------------------------------------------------------------------------------------------------------- losses


def test_losses_at_zero_and_their_slopes():
    real, fake = torch.zeros(4, 2, 2, requires_grad=True), torch.zeros(3, 2, 2, requires_grad=True)
    loss = discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    of_real, of_fake = torch.autograd.grad(loss, [real, fake])
    torch.testing.assert_close(of_real, torch.full_like(real, -0.5 / 16))
    torch.testing.assert_close(of_fake, torch.full_like(fake, 0.5 / 12))
    loss = generator_loss(fake)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, fake)[0], torch.full_like(fake, -0.5 / 12))


def test_losses_are_cross_entropies():
    real, fake = 3 * maps(5, 4, seed=1).double(), 3 * maps(7, 4, seed=2).double()
    expected = -torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -torch.sigmoid(fake).log().mean())


def test_the_best_logit_is_the_log_density_ratio():
    """Of N(1, 1) against N(0, 1): x - 1/2. The loss there is below that of any shifted or scaled logit."""
    generator = torch.Generator().manual_seed(0)
    fake = torch.randn(200_000, dtype=torch.float64, generator=generator)
    real = 1 + torch.randn(200_000, dtype=torch.float64, generator=generator)

    def loss(scale: float, shift: float) -> float:
        return float(discriminator_loss(scale * real + shift, scale * fake + shift))

    best = loss(1, -0.5)
    assert all(loss(1 + a, -0.5 + b) > best for a in (-0.2, 0, 0.2) for b in (-0.2, 0, 0.2) if a or b)


def test_losses_are_in_float32():
    logits = torch.full((2,), 0.3, dtype=torch.bfloat16)
    for value in (discriminator_loss(logits, logits), generator_loss(logits), density_ratio(logits)):
        assert value.dtype == torch.float32
    assert generator_loss(logits.double()).dtype == torch.float64


def test_density_ratios():
    """``exp`` of the mean logit over the map, within [0.1, 20]; no gradient."""
    logits = torch.tensor([[[0.5, 1.5], [0.0, 2.0]], [[-1.0, -1.0], [-1.0, -1.0]], [[9.0, 0.0], [0.0, 0.0]]])
    ratio = density_ratio(logits.requires_grad_())
    torch.testing.assert_close(ratio, torch.tensor([1.0, -1.0, 2.25]).exp())
    assert not ratio.requires_grad
    bounds = density_ratio(torch.tensor([-3.0, 5.0, -math.inf, math.inf, math.log(19.0)]))
    torch.testing.assert_close(bounds, torch.tensor([0.1, 20.0, 0.1, 20.0, 19.0]))
