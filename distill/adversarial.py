"""The adversarial part of a score distillation: a head on inner features of the fake score's network tells noisy samples from
noisy data (Yin et al. 2405.14867, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.discriminators import (
    ChannelMeanDiscriminator,
    ConvolutionalDiscriminator,
    Discriminator,
    FeatureMap,
    Head,
    discriminator_loss,
    generator_loss,
)
from distill.features import bottleneck_of, denoise_with_features, features_of
from distill.gradients import Gradient, evaluate
from distill.times import TimeDistribution
from distill.types import Cond, Sample, Time


@dataclass(kw_only=True)
class AdversarialPart:
    """What both kinds have: features and a head, and factors of the generator's and of the discriminator's loss.

    Raises:
        ValueError: factors that are not positive.
    """

    discriminator: Discriminator
    generator_weight: float
    critic_weight: float

    def __post_init__(self) -> None:
        if self.generator_weight <= 0 or self.critic_weight <= 0:
            raise ValueError(
                f"generator_weight={self.generator_weight}, critic_weight={self.critic_weight}: give positive factors, or "
                "adversarial: null."
            )

    def build_head(self, fake: Denoiser) -> Head:
        """A new head for the fake score's network. Raises ValueError if that has no inner features."""
        return self.discriminator.build(bottleneck_of(fake, self.discriminator.layer))

    def features(self, fake: Denoiser, x_t: Sample, t: Time, cond: Cond) -> FeatureMap:
        """What the head reads; the network is evaluated no further."""
        return features_of(fake, x_t, t, cond, self.discriminator.layer)

    def denoise(self, fake: Denoiser, x_t: Sample, t: Time, cond: Cond) -> tuple[Sample, FeatureMap]:
        """x0 and what the head reads, by one evaluation."""
        return denoise_with_features(fake, x_t, t, cond, self.discriminator.layer)


@dataclass(kw_only=True)
class Adversarial(AdversarialPart):
    """DMD2's discriminator, which looks at samples and data with noise and at times of their own.

    Attributes:
        times: law of these times.
        discriminator: the features and the head.
        generator_weight: factor of the generator's adversarial loss: 3e-3 on ImageNet-64, 1e-3 for SD 1.5, 5e-3 for SDXL.
        critic_weight: factor of the discriminator's loss beside the fake score's: 1e-2.
    """

    times: TimeDistribution = field(kw_only=False)
    discriminator: Discriminator = field(default_factory=ConvolutionalDiscriminator)
    generator_weight: float = 3e-3
    critic_weight: float = 1e-2

    def generator_loss(self, fake: Denoiser, head: nn.Module, x_g: Sample, cond: Cond) -> Tensor:
        """What samples with gradient should lower, a scalar. The network is differentiated in its input alone; so is the head
        where, as in the generator's turn, its parameters require no gradients."""
        return generator_loss(self.logits("input", fake, head, x_g, cond))

    def critic_loss(self, fake: Denoiser, head: nn.Module, x_g: Sample, x0: Sample, cond: Cond) -> Tensor:
        """What network and head should lower, a scalar: samples ``x_g`` and data ``x0`` of the same conditions in one call."""
        both = {key: torch.cat([value, value]) for key, value in cond.items()}
        generated, real = self.logits("parameters", fake, head, torch.cat([x_g, x0]), both).chunk(2)
        return discriminator_loss(real, generated)

    def logits(self, gradient: Gradient, fake: Denoiser, head: nn.Module, samples: Sample, cond: Cond) -> Tensor:
        """Logits of samples with fresh noise at times of the law."""
        t = self.times.sample(len(samples), fake.schedule, samples.device)
        x_t = fake.schedule.add_noise(samples, torch.randn_like(samples), t)
        return head(evaluate(gradient, fake, x_t, t, cond, self.features))


@dataclass(kw_only=True)
class JointAdversarial(AdversarialPart):
    """SiDA's discriminator (Zhou et al. 2410.14919), which looks where the scores are compared (`ScoreIdentity`).

    Attributes:
        discriminator: the features and the head.
        generator_weight: gamma: 1e-4, the paper's 0.01 beside a loss multiplied by 100.
        critic_weight: factor of the discriminator's loss: 1 for EDM networks, 100 for EDM2's.
        start_step: generator's steps before its adversarial term counts (the paper: 100,000 images).
    """

    discriminator: Discriminator = field(default_factory=ChannelMeanDiscriminator)
    generator_weight: float = 1e-4
    critic_weight: float = 1.0
    start_step: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_step < 0:
            raise ValueError(f"start_step={self.start_step}: give 0 or more.")
