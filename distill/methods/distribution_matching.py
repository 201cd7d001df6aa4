"""Distribution matching: the gradient of the integral KL divergence, which no network is differentiated for.

    g = w (X_psi(x_t, t, c) - X_phi(x_t, t, c)),   x_t = alpha_t x_g + sigma_t eps,   all (b, *shape), t: (b,)
    L = E |x_g - sg(x_g - g)|^2 / 2 D,  so that dL/dx_g is g / (b D)

(Poole et al. 2209.14988 with the fake score of Wang et al. 2305.16213.) By parts and settings:

- Diff-Instruct (Luo et al. 2305.18455): w = 1; the two networks share dropout masks.
- VSD as in SwiftBrush (Nguyen & Tran 2312.05239): w = alpha sigma, the fake score is LoRA layers, both are guided alike; with a
  scale drawn for each batch it is SNOOPI's PG-SB (2412.02687).
- DMD (Yin et al. 2311.18828): w = 1 / mean|x_g - X_phi|, and a distance to the teacher's samples of paired noise.
- DMD2 (Yin et al. 2405.14867): the same w, more turns of the fake score than of the generator, several times, and a
  discriminator on features of the fake score's network, which sees noisy samples of the generator and noisy data.
- f-distill (Xu et al. 2502.15681): g times a weight of the density ratio, which the discriminator estimates at the same x_t.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.adversarial import Adversarial
from distill.denoiser import Denoiser
from distill.discriminators import density_ratio
from distill.distances import Distance
from distill.divergences import FDivergence
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.gradients import Call, denoise
from distill.guidance import GuidanceRule
from distill.lora import LoRA
from distill.methods.fake_score import FakeScore, check_laws
from distill.methods.score_distillation import ScoreDistillation, teacher_residual
from distill.optimization import Optimization
from distill.schedules import per_sample
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, Cond, Losses, Sample, Time
from distill.weights import ConstantWeight, Weight


class DistributionMatching(ScoreDistillation):
    """Diff-Instruct, VSD, DMD, DMD2, f-distill.

    Args:
        weight: w(t) in x0, None for 1.
        normalize: whether g is divided by ``mean|x_g - X_phi|`` of its sample.
        shared_dropout: whether teacher and fake score are compared with dropout on, under the same masks.
        adversarial: the discriminator; None for none. It reads data.
        divergence: weights of the density ratio; needs ``adversarial``.
        regression: distance between the generator's and the teacher's samples of the noise in the batch (DMD: LPIPS); None for
            none. Data must deliver such pairs.
        regression_weight: its factor, 0.25 in DMD.
        teacher, sampler, times, fake_score, optimization, evaluation, guidance, fake_guidance, student, lora, space: see
            `ScoreDistillation`.
    """

    def __init__(
        self,
        teacher: Denoiser,
        sampler: FewStepSampler,
        times: TimeDistribution,
        fake_score: FakeScore,
        optimization: Optimization,
        evaluation: Evaluation,
        weight: Weight | None = None,
        normalize: bool = True,
        shared_dropout: bool = False,
        adversarial: Adversarial | None = None,
        divergence: FDivergence | None = None,
        regression: Distance | None = None,
        regression_weight: float = 0.25,
        guidance: GuidanceRule | None = None,
        fake_guidance: GuidanceRule | Literal["teacher"] | None = None,
        student: Denoiser | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        if divergence is not None and adversarial is None:
            raise ValueError("divergence is set: a discriminator estimates its density ratio; set adversarial too.")
        if divergence is not None and fake_guidance is not None:
            raise ValueError(f"fake_guidance={fake_guidance} and divergence are set: a guided pair has no features; unset one.")
        if regression is not None and len(sampler) > 1:
            raise ValueError(f"regression is set with {len(sampler)} times of sampler: pairs are of one step; give one time.")
        if shared_dropout and (fake_guidance != "teacher" and (guidance is not None or fake_guidance is not None)):
            raise ValueError("shared_dropout=true: masks are of calls alike; set fake_guidance to teacher, or no guidance.")
        if shared_dropout and fake_score.lora is not None and fake_score.lora.dropout > 0:
            raise ValueError(f"shared_dropout=true with fake_score.lora.dropout={fake_score.lora.dropout}: set that to 0.")
        parts = (teacher, sampler, times, fake_score, optimization, evaluation)
        super().__init__(*parts, guidance, fake_guidance, student, lora, space)
        self.weight, self.normalize, self.shared_dropout = weight or ConstantWeight(), normalize, shared_dropout
        self.divergence, self.regression, self.regression_weight = divergence, regression, regression_weight
        self.adversarial, self.reads_data = adversarial, adversarial is not None or regression is not None
        if adversarial is not None:
            check_laws(teacher.schedule, {"adversarial.times": adversarial.times})
            self.critic["head"] = adversarial.build_head(self.fake)

    def prepare(self, batch: Batch) -> Batch:
        if self.training and self.regression is not None:
            self.pairs(batch)  # refused at once: the fake score's turns, which come first, read no pairs
        return super().prepare(batch)

    @staticmethod
    def pairs(batch: Batch) -> tuple[Sample, Sample]:
        """The batch's noise and the teacher's samples of it. Raises ValueError if it has not both."""
        if batch.noise is None or batch.x0 is None:
            raise ValueError("model.regression is set, but data delivers no pairs of noise and samples: set it to null.")
        return batch.noise, batch.x0

    def losses(self, batch: Batch) -> Losses:
        x_g, paired = self.samples(batch)
        matching = (x_g - (x_g - self.direction(x_g, batch)).detach()).square().mean() / 2
        losses = {"loss": matching, "matching": matching}
        if self.adversarial is not None:
            losses["adversarial"] = self.adversarial.generator_loss(self.fake, self.head, x_g, batch.cond)
            losses["loss"] = losses["loss"] + self.adversarial.generator_weight * losses["adversarial"]
        if self.regression is not None:
            losses["regression"] = self.regression(paired, batch.x0).mean()
            losses["loss"] = losses["loss"] + self.regression_weight * losses["regression"]
        return losses

    def samples(self, batch: Batch) -> tuple[Sample, Sample | None]:
        """The generator's samples of fresh noise and, with a regression, of the batch's noise, in one evaluation."""
        if self.regression is None:
            return self.generate(batch, "parameters"), None
        noise, _ = self.pairs(batch)
        both = {key: torch.cat([value, value]) for key, value in batch.cond.items()}
        x_g, paired = self.generate_from(torch.cat([torch.randn_like(noise), noise]), both, "parameters").chunk(2)
        return x_g, paired

    @torch.no_grad()
    def direction(self, x_g: Sample, batch: Batch) -> Sample:
        """g: where the generator's samples are to move away from, ``(b, *shape)``, without gradient."""
        (x_t, t), schedule = self.noisy(x_g, self.times), self.student.schedule
        ratio_weight: Tensor | float = 1.0
        if self.divergence is None:
            x_phi, x_psi = self.scores(x_t, t, batch)
        else:
            assert self.adversarial is not None
            x_phi, (x_psi, features) = self.scores(x_t, t, batch, self.adversarial.denoise)
            ratio = density_ratio(self.head(features))
            ratio_weight = self.divergence(ratio, schedule.angle(t).to(ratio.dtype) * (2 / torch.pi))
        weight = self.weight(schedule, t, t)
        if self.normalize:
            weight = weight / teacher_residual(x_g, x_phi)
        return per_sample(weight * ratio_weight, x_g) * (x_psi - x_phi)

    def view(self, denoiser: Denoiser, x_t: Sample, t: Time, cond: Cond, call: Call = denoise) -> Any:
        if not self.shared_dropout:
            return super().view(denoiser, x_t, t, cond, call)
        self.seed_draws("network")
        with training_mode(denoiser):
            return super().view(denoiser, x_t, t, cond, call)

    def critic_losses(self, batch: Batch) -> Losses:
        x_g = self.generate(batch, "none")
        denoising = self.denoising_loss(x_g, batch)
        if self.adversarial is None:
            return {"loss": denoising}
        x0 = self.real_samples(batch)
        adversarial = self.adversarial.critic_loss(self.fake, self.head, x_g, x0, batch.cond)
        loss = denoising + self.adversarial.critic_weight * adversarial
        return {"loss": loss, "denoising": denoising, "adversarial": adversarial}


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Within the block a module that is in evaluation mode is in training mode: its dropout is on."""
    module.train()
    try:
        yield
    finally:
        module.eval()
