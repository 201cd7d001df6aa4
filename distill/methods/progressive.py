"""Progressive distillation (Salimans & Ho 2202.00512, algorithm 2), also of guided teachers (Meng et al. 2210.03142, stage 2).

    L = E w(t) |D(x_t, t, c) - x*|^2 / D,   x_t = alpha_t x0 + sigma_t eps,   t one of the N times of the student's grid
    x0, eps, x_t, x*: (b, *shape), t: (b,)

D is the student's x0. x* is the x0 with which one step of DDIM over the student's grid lands where two steps of the teacher
over its own of 2 N times do, or at the last time the teacher's second estimate (`distill.halving`). Then N is halved and the
student is the teacher (`distill.methods.halved`).

Guidance belongs to the first round's teacher alone: what it teaches, later teachers do by themselves. With a range, a scale is
drawn for each sample, and every student reads it as an input (Meng et al.; their first stage, which gives that input to a
teacher of as many steps, is `GuidanceDistillation`, and a teacher that it made is given the scale in the first round too).

Of the paper: optimiser and averages begin anew each round, the average is off, the learning rate falls linearly to 0.
"""

from __future__ import annotations

import torch

from distill.adapters import Adapter
from distill.couplings import noise_for
from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.grids import Grid
from distill.guidance import GuidanceRule, check_null_share, check_range, draw_scales, drop_conditions, guided
from distill.halving import two_step_target
from distill.lora import LoRA, read_guidance, start_student
from distill.methods.halved import HalvingMethod
from distill.negatives import reads_negatives
from distill.optimization import Optimization
from distill.schedules import NoiseSchedule
from distill.space import ModelSpace
from distill.types import Batch, Cond, Losses
from distill.weights import TruncatedSnrWeight, Weight


class Progressive(HalvingMethod):
    """Halves the number of steps of a teacher's sampling, again and again.

    Args:
        teacher: the student starts from it.
        start_steps, end_steps, round_steps, grid, schedule: see `HalvingMethod`.
        weight: w; None is `TruncatedSnrWeight`, the paper's.
        guidance: the rule of the first round's teacher; with a range, its kind. None is none, or classifier-free with a range.
        guidance_range: ``(low, high)`` of a guidance scale (1 is none) drawn for each sample.
        null_probability: in [0, 1), share of samples without their conditions, so that a student can be guided in sampling.
        lora, adapter: what the student adds to the teacher's weights; neither trains all weights of a copy.
        optimization, evaluation, space: see `HalvingMethod`.

    Raises:
        ValueError: rounds or a grid that do not halve; guidance that contradicts itself, or that the network cannot read; a
            share out of its range.
    """

    def __init__(
        self,
        teacher: Denoiser,
        start_steps: int,
        end_steps: int,
        round_steps: int | list[int],
        optimization: Optimization,
        evaluation: Evaluation,
        weight: Weight | None = None,
        guidance: GuidanceRule | None = None,
        guidance_range: tuple[float, float] | None = None,
        null_probability: float = 0.0,
        grid: Grid | None = None,
        schedule: NoiseSchedule | None = None,
        lora: LoRA | None = None,
        adapter: Adapter | None = None,
        space: ModelSpace | None = None,
    ):
        check_null_share(null_probability, teacher)
        _check_guidance(teacher, guidance, guidance_range)
        student = start_student(teacher, lora, adapter)
        if guidance_range is not None:
            read_guidance(student, f"guidance_range={guidance_range}")
        elif "guidance" in student.scalar_inputs:
            raise ValueError("guidance_range=null: the adapter reads a guidance scale; give the range, or another adapter.")
        if reads_negatives(student):
            raise ValueError("adapter: Progressive gives no negative prompts; give another adapter.")
        rounds = (start_steps, end_steps, round_steps)
        super().__init__(student, teacher, *rounds, optimization, evaluation, guidance, grid, schedule, space)
        self.weight, self.guidance_range = weight or TruncatedSnrWeight(), guidance_range
        self.null_probability = null_probability

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        steps = self.halved.draw(batch.x0)
        x_t = self.schedule.add_noise(batch.x0, noise_for(batch, None), steps.t)
        cond = drop_conditions(batch.cond, batch.null, self.null_probability)
        teacher, teacher_cond, cond = self.guided_round(cond, batch.null)
        with torch.no_grad():
            target = two_step_target(teacher, x_t, steps, teacher_cond)
        errors = (self.generator(self.student)(x_t, steps.t, cond) - target).square().flatten(1).mean(1)
        return {"loss": (self.weight(self.schedule, steps.t, steps.end) * errors).mean(), "error": errors.mean()}

    def guided_round(self, cond: Cond, null: Cond) -> tuple[Denoiser, Cond, Cond]:
        """This round's teacher, guided as it is to be, its conditions and the student's."""
        teacher, first = self.round_teacher, self.previous is None
        if self.guidance_range is None:
            rule = self.drawn(self.guidance) if first else None
            return (teacher if rule is None else rule(teacher, null)), cond, cond
        if not cond:
            raise ValueError(f"guidance_range={self.guidance_range}: the data carries no condition; set it to null.")
        rows = next(iter(cond.values()))
        scale = draw_scales(self.guidance_range, len(rows), rows.device)
        teacher, teacher_cond = guided(teacher, cond, null, scale, self.guidance)
        return teacher, teacher_cond, {**cond, "guidance": scale}

    # -------------------------------------------------------------------------------------------------------- sampling

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """A student that reads the guidance scale is given it: the middle of its range by default."""
        return super().guided_generator(generator, cond, null, self.teacher_scale if guidance is None else guidance)


def _check_guidance(teacher: Denoiser, rule: GuidanceRule | None, scales: tuple[float, float] | None) -> None:
    """Raises ValueError for guidance that the teacher has by itself, or needs and is not given."""
    if scales is not None:
        check_range(scales, rule)
    if "guidance" not in teacher.scalar_inputs:
        return
    if rule is not None:
        raise ValueError(f"guidance={rule}: the teacher reads a guidance scale by itself; set it to null, and guidance_range.")
    if scales is None:
        raise ValueError("guidance_range=null: the teacher reads a guidance scale; give the range that it was trained on.")
