"""Step distillation for guided sampling (SnapFusion, Li et al. 2306.00980, section 4): the student keeps its two predictions.

    L = L_d + g L_o,   L_d = E w(t) |D_k(x_t, t, c) - x*_k|^2 / D,   L_o = E |F(x_s, s, c) - F*|^2 / D
    x_t = alpha_t x0 + sigma_t eps, likewise x_s, and x*_k: (b, *shape), t, s, k: (b,)

x* is the target of progressive distillation, two steps of DDIM as one (`distill.halving`). With probability p a batch is
guided: teacher and student both run classifier-free guidance at the same scales k, drawn for each sample, the student's two
evaluations with gradient; else D and x* are plain. L_o is the usual loss of the student's own network output on data, its
conditions dropped at times; g makes it a given share of L_d, and has no gradient.

Rounds are those of progressive distillation (`distill.methods.halved`), each guided anew: a student is not guided by itself.
The paper goes from 32 steps to 16, and from there to 8.
"""

from __future__ import annotations

import torch

from distill.couplings import noise_for
from distill.denoiser import Denoiser, NetworkDenoiser, refuse_own_noise
from distill.evaluation import Evaluation
from distill.grids import Grid
from distill.guidance import (
    ClassifierFreeGuidance,
    GuidanceRule,
    check_null_share,
    check_range,
    draw_scales,
    drop_conditions,
)
from distill.halving import two_step_target
from distill.lora import LoRA, start_student
from distill.methods.halved import HalvingMethod
from distill.optimization import Optimization
from distill.schedules import NoiseSchedule
from distill.space import ModelSpace
from distill.times import TimeDistribution, UniformTimes
from distill.types import Batch, Cond, Losses
from distill.weights import TruncatedSnrWeight, Weight


class SnapFusion(HalvingMethod):
    """Halves the steps of a teacher whose student keeps classifier-free guidance, at any scale.

    Args:
        teacher: the student starts from it; it must have null conditions, and read no guidance scale.
        start_steps, end_steps, round_steps, grid, schedule: see `HalvingMethod`.
        guidance_range: ``(low, high)`` of the scale (1 is none) drawn for each sample; the paper's is [2, 14].
        guided_share: p, in (0, 1]; the paper tries 0.1 to 1.
        denoising_share: of the denoising loss, to the loss of distillation; 0 for none.
        weight: w; None is `TruncatedSnrWeight`, the paper's.
        times: law of s; None is uniform.
        null_probability: in [0, 1), share of samples without their conditions in the denoising loss.
        guidance: the rule's kind; its own scale is that of the samples that are compared. None is classifier-free guidance, and
            the middle of the range.
        lora: the student is LoRA layers on the teacher's weights; None trains all weights of a copy.
        optimization, evaluation, space: see `HalvingMethod`.

    Raises:
        ValueError: rounds or a grid that do not halve; a share or a range out of bounds; a teacher that reads a guidance scale;
            a rule with a noise of its own.
    """

    student: NetworkDenoiser

    def __init__(
        self,
        teacher: NetworkDenoiser,
        start_steps: int,
        end_steps: int,
        round_steps: int | list[int],
        guidance_range: tuple[float, float],
        optimization: Optimization,
        evaluation: Evaluation,
        guided_share: float = 0.5,
        denoising_share: float = 1.0,
        weight: Weight | None = None,
        times: TimeDistribution | None = None,
        null_probability: float = 0.1,
        guidance: GuidanceRule | None = None,
        grid: Grid | None = None,
        schedule: NoiseSchedule | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        refuse_own_noise(self, guidance)
        check_range(guidance_range, guidance)
        if not 0 < guided_share <= 1 or denoising_share < 0:
            raise ValueError(
                f"guided_share={guided_share}, denoising_share={denoising_share}: give a share in (0, 1] and one of 0 or more; "
                "without guidance in training, take Progressive."
            )
        if "guidance" in teacher.scalar_inputs:
            raise ValueError("teacher reads a guidance scale by itself: no null prediction is needed; take Progressive.")
        check_null_share(null_probability, teacher)
        guidance = guidance or ClassifierFreeGuidance(sum(guidance_range) / 2)
        rounds = (start_steps, end_steps, round_steps)
        student = start_student(teacher, lora)
        super().__init__(student, teacher, *rounds, optimization, evaluation, guidance, grid, schedule, space)
        self.rule, self.scales, self.guided_share = guidance, guidance_range, guided_share
        self.denoising_share, self.null_probability = denoising_share, null_probability
        self.weight, self.times = weight or TruncatedSnrWeight(), times or UniformTimes()

    def losses(self, batch: Batch) -> Losses:
        distillation = self.distillation(batch)
        if self.denoising_share == 0:
            return {"loss": distillation}
        denoising = self.denoising(batch)
        balance = self.denoising_share * (distillation / denoising).detach()
        return {"loss": distillation + balance * denoising, "distillation": distillation, "denoising": denoising}

    def distillation(self, batch: Batch) -> torch.Tensor:
        """L_d, of the whole batch guided or of none of it."""
        assert batch.x0 is not None
        steps = self.halved.draw(batch.x0)
        x_t = self.schedule.add_noise(batch.x0, noise_for(batch, None), steps.t)
        teacher, student = self.round_teacher, self.generator(self.student)
        # Drawn on the CPU, the same on every rank: no rank waits for others that make twice as many evaluations.
        coin = torch.rand((), generator=torch.Generator().manual_seed(self.draw_key("guided")))
        if coin < self.guided_share:
            rule = self.rule.at(draw_scales(self.scales, len(x_t), x_t.device))
            teacher, student = rule(teacher, batch.null), rule(student, batch.null)
        with torch.no_grad():
            target = two_step_target(teacher, x_t, steps, batch.cond)
        errors = (student(x_t, steps.t, batch.cond) - target).square().flatten(1).mean(1)
        return (self.weight(self.schedule, steps.t, steps.end) * errors).mean()

    def denoising(self, batch: Batch) -> torch.Tensor:
        """L_o, in the schedule of the student's network."""
        assert batch.x0 is not None
        schedule = self.student.schedule
        s, eps = self.times.sample(len(batch.x0), schedule, batch.x0.device), torch.randn_like(batch.x0)
        cond = drop_conditions(batch.cond, batch.null, self.null_probability)
        raw = self.student.raw(schedule.add_noise(batch.x0, eps, s), s, cond)
        return (raw - self.student.raw_target(batch.x0, eps, s)).square().mean()

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """The student under the rule, at its scale by default."""
        rule = self.rule if guidance is None else self.rule.at(guidance)
        return rule(generator, null), cond
