"""Guidance distillation: one evaluation of the student for the two of a guided teacher (Meng et al. 2210.03142, stage 1).

    L = E w(t) |D(x_t, t, c, k) - D*_k(x_t, t, c)|^2 / D,   x_t = alpha_t x0 + sigma_t eps
    x0, eps, x_t: (b, *shape), t, k: (b,)

D* is the frozen teacher under a guidance rule at scale k, D the student, both as x0. k is drawn for each sample and read by the
student (the paper's w is k - 1); or the rule keeps its one scale and the student has no further input.

By parts: Meng's student (a copy, all weights trained), LoRA-enhanced distillation (2312.06899: LoRA layers on the teacher's
own weights), adapter guidance distillation (AGD, 2503.07274: `AttentionGuidance`), plug-and-play distillation (2406.01954:
`GuideNetwork`) and SpeedUpNet (2312.08887: `NegativePrompt`, which reads what the teacher is guided away from).

On batches that carry times (AGD's stored trajectories of the guided teacher, tools/make_trajectories.py) x_t and D* are the
batch's, points of the teacher's own sampling, and the teacher is not called.
"""

from __future__ import annotations

import torch

from distill.adapters import Adapter
from distill.denoiser import Denoiser, refuse_own_noise
from distill.evaluation import Evaluation
from distill.guidance import GuidanceRule, check_range, draw_scales, guided
from distill.lora import LoRA, read_guidance, start_student
from distill.methods.base import Method
from distill.negatives import Negatives, reads_negatives
from distill.optimization import Optimization
from distill.space import ModelSpace
from distill.times import TimeDistribution, UniformTimes
from distill.types import Batch, Cond, DataSpec, Losses, PerSample, Sample, Time
from distill.weights import ConstantWeight, Weight


class GuidanceDistillation(Method):
    """Teaches a student to be guided as its teacher is.

    Args:
        teacher: the student starts from it, and equals it, unguided, at first.
        guidance: the rule that is distilled; None is classifier-free guidance, at a drawn scale.
        guidance_range: ``(low, high)`` of the scale (1 is none) drawn for each sample; None for the rule's own. Meng et al.
            have w in [0, 4] for pixels, in [2, 14] for Stable Diffusion, AGD in [1, 6] for DiT, in [1, 12] for Stable
            Diffusion. With stored trajectories the range must be theirs.
        times: law of t; None is uniform. Not used with stored trajectories.
        weight: w(t); None is 1.
        lora: LoRA layers on the teacher's weights.
        adapter: what else is added to the teacher's weights; neither trains all weights of a copy.
        negatives: which prompts the teacher is guided away from, for a student that reads them; None for the null prompt.
        optimization, evaluation, space: see `Method`.

    Raises:
        ValueError: neither a rule nor a range, or a rule that is followed by two predictions; a teacher that reads a scale, a
            network that cannot; an adapter that reads a scale without a range; negatives and a student that reads none.
    """

    reads_trajectories = True

    def __init__(
        self,
        teacher: Denoiser,
        optimization: Optimization,
        evaluation: Evaluation,
        guidance: GuidanceRule | None = None,
        guidance_range: tuple[float, float] | None = None,
        times: TimeDistribution | None = None,
        weight: Weight | None = None,
        lora: LoRA | None = None,
        adapter: Adapter | None = None,
        negatives: Negatives | None = None,
        space: ModelSpace | None = None,
    ):
        if guidance is None and guidance_range is None:
            raise ValueError("guidance and guidance_range are both null: there is nothing to distil; set one of them.")
        if "guidance" in teacher.scalar_inputs:
            raise ValueError("teacher reads a guidance scale by itself: there is nothing to distil; take Progressive.")
        refuse_own_noise(self, guidance)
        student = start_student(teacher, lora, adapter)
        if guidance_range is not None:
            check_range(guidance_range, guidance)
            read_guidance(student, f"guidance_range={guidance_range}")
        elif "guidance" in student.scalar_inputs:
            raise ValueError("guidance_range=null: the adapter reads a guidance scale; give the range, or another adapter.")
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        reads = reads_negatives(student)
        if negatives is not None and not reads:
            raise ValueError(f"negatives={negatives}: the student reads no negative prompt; set adapter to NegativePrompt.")
        self.guidance_range, self.negatives = guidance_range, negatives or (Negatives(1.0) if reads else None)
        self.times, self.weight = times or UniformTimes(), weight or ConstantWeight()

    def losses(self, batch: Batch) -> Losses:
        x_t, t, cond, target = self.stored(batch) if batch.time is not None else self.fresh(batch)
        errors = (self.student(x_t, t, cond) - target).square().flatten(1).mean(1)
        return {"loss": (self.weight(self.student.schedule, t, t) * errors).mean(), "error": errors.mean().detach()}

    def stored(self, batch: Batch) -> tuple[Sample, Time, Cond, Sample]:
        """A point of a guided trajectory, its time, its conditions with the scale, and the teacher's x0 there."""
        assert batch.x0 is not None and batch.noise is not None and batch.time is not None
        cond = batch.cond if self.negatives is None else self.negatives.of_null(batch.cond, batch.null)
        return self.student.schedule.add_noise(batch.x0, batch.noise, batch.time), batch.time, cond, batch.x0

    def fresh(self, batch: Batch) -> tuple[Sample, Time, Cond, Sample]:
        """The same for noised data, by the teacher."""
        assert batch.x0 is not None
        schedule, cond, null = self.student.schedule, batch.cond, batch.null
        t = self.times.sample(len(batch.x0), schedule, batch.x0.device)
        x_t = schedule.add_noise(batch.x0, torch.randn_like(batch.x0), t)
        if self.negatives is not None:
            cond, null = self.negatives.draw(cond, null)
        scales = None if self.guidance_range is None else draw_scales(self.guidance_range, len(t), t.device)
        with torch.no_grad():
            target = self.target(x_t, t, cond, null, scales)
        return x_t, t, cond if scales is None else {**cond, "guidance": scales}, target

    def target(self, x_t: Sample, t: Time, cond: Cond, null: Cond, scales: PerSample | None) -> Sample:
        """The teacher's guided x0 ``(b, *shape)`` at scales ``(b,)``, or by the rule's own."""
        if scales is None:
            return self.guided_teacher(null)(x_t, t, cond)
        teacher, cond = guided(self.teacher, cond, null, scales, self.guidance)
        return teacher(x_t, t, cond)

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        if not spec.trajectories:
            return
        if self.negatives is not None and self.negatives.null_probability < 1:
            raise ValueError("negatives: stored trajectories were guided away from the null prompt; set it to null.")
        if spec.guidance_range != (own := self.guidance_range and tuple(self.guidance_range)):
            raise ValueError(f"guidance_range={own}: the trajectories' scales are of {spec.guidance_range}; give the same.")

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """A student that reads the scale is given it (the middle of its range by default), in one evaluation."""
        if self.negatives is not None:
            cond = self.negatives.of_null(cond, null)
        if self.guidance_range is None:
            if guidance is not None:
                raise ValueError(f"guidance={guidance}: the student is guided at one scale and reads none; leave it out.")
            return generator, cond
        return super().guided_generator(generator, cond, null, self.teacher_scale if guidance is None else guidance)
