"""Score implicit matching: SIM (Luo et al. 2410.16794, theorem 3.1), here in x0-views.

    L = -E w(t) <d'(Y), X_psi(x_t, t, c) - x_g>,   Y = X_psi - X_phi,   x_t = alpha_t x_g + sigma_t eps,   all (b, *shape)

has the gradient that ``E w(t) d(X_psi - X_phi)`` has by way of X_psi, the law of x_t held (the paper's p_sg(theta)), for any
smooth distance d, if X_psi is the generator's own denoiser: how it depends on the generator's parameters, which nobody knows,
is traded for the residual. All of it stays in automatic differentiation: d' and both frozen networks are differentiated in the
generator's sample. The paper's scores are ``alpha / sigma^2`` times these views, a factor of t that belongs to w and to d.

With d = |Y|^2 / 2 this is SiD (2404.04057) at alpha = 1 without its divisor; pseudo-Huber's d' = Y / sqrt(|Y|^2 + c^2) brings
its own. c goes with the square root of the sample's size, since the norm is that of the whole sample.
"""

from __future__ import annotations

from typing import Literal

from distill.denoiser import Denoiser
from distill.distances import Distance, derivative
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.guidance import GuidanceRule
from distill.lora import LoRA
from distill.methods.fake_score import FakeScore
from distill.methods.score_distillation import ScoreDistillation
from distill.optimization import Optimization
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, Losses
from distill.weights import ConstantWeight, Weight


class ScoreImplicit(ScoreDistillation):
    """SIM.

    Args:
        distance: d, of which the derivative is taken.
        weight: w(t), None for 1.
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
        distance: Distance,
        optimization: Optimization,
        evaluation: Evaluation,
        weight: Weight | None = None,
        guidance: GuidanceRule | None = None,
        fake_guidance: GuidanceRule | Literal["teacher"] | None = None,
        student: Denoiser | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        parts = (teacher, sampler, times, fake_score, optimization, evaluation)
        super().__init__(*parts, guidance, fake_guidance, student, lora, space)
        self.distance, self.weight = distance, weight or ConstantWeight()

    def losses(self, batch: Batch) -> Losses:
        x_g = self.generate(batch, "parameters")
        x_t, t = self.noisy(x_g, self.times)
        x_phi, x_psi = self.scores(x_t, t, batch)
        gap = x_psi - x_phi
        implicit = -(derivative(self.distance, gap) * (x_psi - x_g)).flatten(1).sum(1)
        loss = (self.weight(self.student.schedule, t, t) * implicit).mean()
        return {"loss": loss, "gap": gap.detach().square().mean()}
