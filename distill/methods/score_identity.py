"""Score identity distillation: SiD (Zhou et al. 2404.04057, equation 23), SiD-LSG (2406.01561) and SiDA (2410.14919).

    L = E sum_D (X_phi - X_psi) * [(X_phi - x_g) - a (X_phi - X_psi)] / mean|x_g - X_phi|
    X_phi = X_phi(x_t, t, c), X_psi = X_psi(x_t, t, c), x_t = alpha_t x_g + sigma_t eps,   all (b, *shape), t: (b,)

If X_psi is the generator's own denoiser, the expectation is ``(1 - a) E |X_phi - X_psi|^2`` over the divisor. Its gradient is
that of the Fisher divergence by way of X_psi, though X_psi's parameters are held, plus ``1 - a`` times that of the naive square
by way of x_t: a = 1/2 is the whole Fisher divergence, a = 1 the path by X_psi alone, as in SIM, a > 1 takes off some of the
other, which by itself learns nothing useful. Both frozen networks are differentiated in their input. The divisor has no
gradient, and cancels the level of noise (the paper's sigma^4 is what x0-views differ from scores by).

SiD-LSG is the same with guidance: the rules of teacher (kappa_4), of the fake score here (kappa_2 = kappa_3) and of the fake
score in its own training (kappa_1) are settings of their own.

SiDA adds a discriminator without parameters of its own: logits d are the channel mean of the fake network's last encoder
features, read in the very evaluations that give X_psi. The generator's numerator gains ``gamma D softplus(-d)``; the fake
score's loss gains ``w(t) [softplus(-d(real)) + softplus(d(x_g))] / 2D``, data with the same eps and t as the samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill.adversarial import JointAdversarial
from distill.denoiser import Denoiser
from distill.discriminators import LOGIT_BOUND, Logits, discriminator_loss
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.gradients import evaluate
from distill.guidance import GuidanceRule
from distill.lora import LoRA
from distill.methods.fake_score import FakeScore
from distill.methods.score_distillation import ScoreDistillation, teacher_residual
from distill.optimization import Optimization
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, Losses, PerSample


class ScoreIdentity(ScoreDistillation):
    """SiD.

    Args:
        alpha: a: 1.0 or 1.2 in the paper (the name is the paper's; no relation to the schedule's).
        adversarial: SiDA's discriminator; None for none. It reads data.
        teacher, sampler, times, fake_score, optimization, evaluation, guidance, fake_guidance, student, lora, space: see
            `ScoreDistillation`.
    """

    teacher_gradient = "input"

    def __init__(
        self,
        teacher: Denoiser,
        sampler: FewStepSampler,
        times: TimeDistribution,
        fake_score: FakeScore,
        optimization: Optimization,
        evaluation: Evaluation,
        alpha: float = 1.0,
        adversarial: JointAdversarial | None = None,
        guidance: GuidanceRule | None = None,
        fake_guidance: GuidanceRule | Literal["teacher"] | None = None,
        student: Denoiser | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        if adversarial is not None and (fake_guidance is not None or fake_score.guidance is not None):
            raise ValueError(
                f"adversarial is set with fake_guidance={fake_guidance} and fake_score.guidance={fake_score.guidance}: "
                "a guided pair has no features; set both to null."
            )
        if adversarial is not None and fake_score.null_probability:
            raise ValueError(
                f"fake_score.null_probability={fake_score.null_probability} with adversarial: its discriminator reads the fake "
                "score's features of every condition; set it to 0."
            )
        parts = (teacher, sampler, times, fake_score, optimization, evaluation)
        super().__init__(*parts, guidance, fake_guidance, student, lora, space)
        self.alpha, self.adversarial, self.reads_data = alpha, adversarial, adversarial is not None
        if adversarial is not None:
            self.critic["head"] = adversarial.build_head(self.fake)

    def losses(self, batch: Batch) -> Losses:
        x_g = self.generate(batch, "parameters")
        x_t, t = self.noisy(x_g, self.times)
        adversarial: Tensor | float = 0.0
        if self.adversarial is None or self.student_step < self.adversarial.start_step:
            x_phi, x_psi = self.scores(x_t, t, batch)
        else:
            x_phi, (x_psi, features) = self.scores(x_t, t, batch, self.adversarial.denoise)
            adversarial = self.adversarial.generator_weight * x_g[0].numel() * generator_losses(self.head(features))
        gap = x_phi - x_psi
        identity = (gap * ((x_phi - x_g) - self.alpha * gap)).flatten(1).sum(1)
        loss = ((identity + adversarial) / teacher_residual(x_g, x_phi)).mean()
        return {"loss": loss, "gap": gap.detach().square().mean()}

    def critic_losses(self, batch: Batch) -> Losses:
        if self.adversarial is None:
            return super().critic_losses(batch)
        data = self.real_samples(batch)
        x_g, schedule = self.generate(batch, "none"), self.student.schedule
        t, eps = self.fake_score.times.sample(len(x_g), schedule, x_g.device), torch.randn_like(x_g)
        noisy, noisy_data = schedule.add_noise(x_g, eps, t), schedule.add_noise(data, eps, t)
        x0, generated = evaluate("parameters", self.fake, noisy, t, batch.cond, self.adversarial.denoise)
        real = evaluate("parameters", self.fake, noisy_data, t, batch.cond, self.adversarial.features)
        denoising = self.weighted_error(x0, x_g, t)
        adversarial = discriminator_loss(self.head(real), self.head(generated))
        factor = self.adversarial.critic_weight * self.fake_score.weight(schedule, t, t).mean() / (2 * x_g[0].numel())
        return {"loss": denoising + factor * adversarial, "denoising": denoising, "adversarial": adversarial}


def generator_losses(logits: Logits) -> PerSample:
    """``softplus(-d)``, the generator's non-saturating loss, of logits clipped to +-10: the mean over each sample's places."""
    return softplus(-logits.clamp(-LOGIT_BOUND, LOGIT_BOUND)).flatten(1).mean(1)
