"""Discriminators on a network's inner features: heads, the adversarial losses, and the density ratio that a logit stands for.

A logit is large where the features look like those of data: at the optimum it is ``log p_data / p_generated`` (Goodfellow et
al. 1406.2661). A recipe names a `Discriminator`; the head is built when the network, and so the channels, are known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.networks.bottleneck import Bottleneck, Layer
from distill.types import PerSample

FeatureMap = Float[Tensor, "b c h w"]
Logits = Float[Tensor, "b *map"]

LOGIT_BOUND = 10.0
"""SiDA clips the logits of generated samples to this on both sides."""

RATIO_BOUNDS = (0.1, 20.0)
"""Of the density ratio in f-distill (2502.15681, by FastGen's code, where the logit's own bounds of +-10 lie beyond these)."""

LEAST_GROUP = 8
"""Channels that a group holds at least: one or two values would be normalised to constants or signs where the map is 1x1."""


class Head(nn.Module, ABC):
    """Logits of feature maps: one a sample, or a map of them."""

    @abstractmethod
    def forward(self, features: FeatureMap) -> Logits:
        """Logits ``(b, *map)`` in float32 (or wider) of features ``(b, c, h, w)``."""


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or the largest power of two below that divides ``channels`` into groups of at least `LEAST_GROUP`."""
    fitting = [groups for groups in (32, 16, 8, 4, 2) if channels % groups == 0 and channels // groups >= LEAST_GROUP]
    return nn.GroupNorm(max(fitting, default=1), channels)


class ConvolutionHead(Head):
    """DMD2's head (Yin et al. 2405.14867, public code): one logit for a map of ``size``, a map of logits for a larger one.

    ``[Conv 4x4 / 2, GroupNorm, SiLU] x n, Conv 4x4 / 4, GroupNorm, SiLU, Conv 1x1``, all with biases and as wide as the
    features. The n halvings bring ``size`` as close to 4x4 as it comes from above: 3 for SDXL's 32x32, 1 for 8x8, none below.
    Where less than 4 is there at all, the second kind of convolution has a kernel of what is there.

    Args:
        channels: of the features.
        size: height and width of the map that gives one logit.
    """

    def __init__(self, channels: int, size: tuple[int, int]):
        super().__init__()
        if channels < 1 or min(size) < 1:
            raise ValueError(f"channels={channels}, size={size}: give positive numbers.")
        self.halvings = 0
        while min(size) >> (self.halvings + 1) >= 4:
            self.halvings += 1
        self.kernel = (min(4, size[0] >> self.halvings), min(4, size[1] >> self.halvings))
        layers: list[nn.Module] = []
        for _ in range(self.halvings):
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
        layers += [nn.Conv2d(channels, channels, self.kernel, stride=4), group_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: FeatureMap) -> Logits:
        """Logits ``(b, h', w')``. Raises ValueError for a map that is smaller than the convolutions."""
        height, width = features.shape[2:]
        if height >> self.halvings < self.kernel[0] or width >> self.halvings < self.kernel[1]:
            least = (self.kernel[0] << self.halvings, self.kernel[1] << self.halvings)
            raise ValueError(
                f"features of {height}x{width}: this head needs {least[0]}x{least[1]}; samples are smaller than the network's "
                f"native size: set size=[{height}, {width}] of the ConvolutionalDiscriminator."
            )
        return _wide(self.layers(features)[:, 0])


class ChannelMeanHead(Head):
    """SiDA's head (Zhou et al. 2410.14919), which has no parameters: the mean over channels, a logit for each place."""

    def forward(self, features: FeatureMap) -> Logits:
        """Logits ``(b, h, w)``."""
        return _wide(features).mean(1)


class Discriminator(ABC):
    """What a recipe names: the layer that is read, and the head on it.

    Attributes:
        layer: see `distill.networks.bottleneck.Layer`; for `distill.features`.
    """

    layer: Layer

    @abstractmethod
    def build(self, bottleneck: Bottleneck) -> Head:
        """A new head for the features of ``bottleneck``."""


@dataclass(frozen=True)
class ConvolutionalDiscriminator(Discriminator):
    """A `ConvolutionHead` (DMD2).

    Attributes:
        layer: ``middle`` as in DMD2 of Stable Diffusion; that of ImageNet-64 reads the end of the ``encoder``.
        size: height and width of the maps; None for those of the network's native samples.
    """

    layer: Layer = "middle"
    size: tuple[int, int] | None = None

    def build(self, bottleneck: Bottleneck) -> ConvolutionHead:
        return ConvolutionHead(bottleneck.channels, self.size or bottleneck.size)


@dataclass(frozen=True)
class ChannelMeanDiscriminator(Discriminator):
    """A `ChannelMeanHead` (SiDA).

    Attributes:
        layer: where the features are read.
    """

    layer: Layer = "encoder"

    def build(self, bottleneck: Bottleneck) -> ChannelMeanHead:
        return ChannelMeanHead()


def discriminator_loss(real_logits: Float[Tensor, "..."], fake_logits: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """``E softplus(-D(real)) + E softplus(D(fake))``: binary cross-entropy, the sum of both classes; ``2 ln 2`` at logits 0.

    The means are over samples and places; the two batches may differ in size.
    """
    return softplus(-_wide(real_logits)).mean() + softplus(_wide(fake_logits)).mean()


def generator_loss(fake_logits: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """``E softplus(-D(fake))``: the non-saturating loss (Goodfellow et al. 1406.2661, section 3); ``ln 2`` at logits 0."""
    return softplus(-_wide(fake_logits)).mean()


def density_ratio(logits: Logits) -> PerSample:
    """``p_data / p_generated`` ``(b,)``, without gradient, from each sample's mean logit, clipped as f-distill does."""
    mean = _wide(logits.detach()).reshape(len(logits), -1).mean(1)
    return mean.exp().clamp(*RATIO_BOUNDS)


def _wide(values: Tensor) -> Tensor:
    """In float32, or in their own wider type."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
