"""Consistency distillation and training (Song et al. 2303.01469, algorithms 2 and 3) and what differs from them by parts.

    L = E w(t, u) d( f(x_t, t), sg f^-(x_u, u) ),   x_t = alpha_t x0 + sigma_t eps,   u < t
    x0, x_t, x_u: (b, *shape), t, u: (b,)

x_u is one step of an ODE solver from x_t along the teacher (distillation) or ``alpha_u x0 + sigma_u eps`` with the same eps
(training, the limit of that step when the teacher is exact). f^- is the student itself without gradient, or an average of it.
f and f^- draw the same dropout masks. Where u is the end of the schedule the target is x_u itself: f's boundary condition.
A coupling chooses which eps goes with which x0 (`distill.couplings`); the loss stays as it is.

By parts: CD; CT; improved CT (2310.14189: doubling curriculum, log-normal pairs, pseudo-Huber, inverse-gap weight); ECT
(2406.14548: `RatioPairs` from a diffusion checkpoint); latent consistency (2310.04378: skipped steps, a guidance scale drawn
for each sample, followed by the teacher and read by the student through an extra time input).
"""

from __future__ import annotations

import torch

from distill.boundary import Boundary, ConsistencyFunction, NoBoundary
from distill.couplings import Coupling, noise_for, refuse_pairs
from distill.denoiser import Denoiser
from distill.distances import Distance
from distill.ema import EMA, Averaging
from distill.evaluation import Evaluation
from distill.guidance import ClassifierFreeGuidance, GuidanceRule, check_range, draw_scales
from distill.lora import LoRA, read_guidance, start_student
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.pairs import TimePairs
from distill.schedules import NoiseSchedule, per_sample
from distill.solvers import Solver
from distill.space import ModelSpace
from distill.types import Batch, Cond, DataSpec, Losses, Sample, Time
from distill.weights import ConstantWeight, Weight


class Consistency(Method):
    """Teaches a student to map every point of a trajectory to its origin.

    Args:
        pairs: law of the pairs ``(t, u)``.
        distance: d.
        student: the denoiser inside f; None starts from the teacher.
        teacher: needed if ``solver`` is given.
        solver: the teacher's step from t to u; None is consistency training.
        schedule: in which the method works; None is the student's own.
        boundary: how f is made of the student.
        weight: w(t, u).
        target: averaging of f^-; None for the student's present weights.
        guidance: the teacher's rule.
        guidance_range: ``(low, high)`` of a guidance scale (1 is none) drawn for each sample instead.
        embed_guidance: whether the student reads the drawn scale; LCM-LoRA does not (Luo et al. 2311.05556).
        lora: the student is LoRA layers on the teacher's weights; None trains all weights of a copy.
        coupling: of data and noise; None draws noise freely.
        optimization, evaluation, space: see `Method`.
    """

    def __init__(
        self,
        pairs: TimePairs,
        distance: Distance,
        optimization: Optimization,
        evaluation: Evaluation,
        student: Denoiser | None = None,
        teacher: Denoiser | None = None,
        solver: Solver | None = None,
        schedule: NoiseSchedule | None = None,
        boundary: Boundary | None = None,
        weight: Weight | None = None,
        target: Averaging | None = None,
        guidance: GuidanceRule | None = None,
        guidance_range: tuple[float, float] | None = None,
        embed_guidance: bool = True,
        lora: LoRA | None = None,
        coupling: Coupling | None = None,
        space: ModelSpace | None = None,
    ):
        if teacher is None and (solver is not None or student is None):
            raise ValueError("model.teacher is missing: give it, or set model.solver to null and give model.student.")
        if student is not None and lora is not None:
            raise ValueError(f"model.student and model.lora={lora} are both set: LoRA stands on the teacher; set one only.")
        if student is None:
            assert teacher is not None
            student = start_student(teacher, lora)
        if guidance_range is not None:
            _check_range(guidance_range, guidance, solver)
            if embed_guidance:
                read_guidance(student, f"guidance_range={guidance_range}, embed_guidance=true")
            elif "guidance" in student.scalar_inputs:
                raise ValueError("embed_guidance=false: the student reads a guidance scale by itself; set it to true.")
        super().__init__(student, teacher, guidance, optimization, evaluation, space)
        self.embed_guidance = embed_guidance
        self.pairs, self.distance, self.solver = pairs, distance, solver
        self.schedule = self.student.schedule if schedule is None else schedule
        self.boundary, self.weight = boundary or NoBoundary(), weight or ConstantWeight()
        self.guidance_range, self.coupling = guidance_range, coupling
        self.target = None if target is None else EMA(self.student, target)
        if self.target is not None:
            self.target.module.train()

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        refuse_pairs(self.coupling, spec)

    def generator(self, student: Denoiser) -> Denoiser:
        view = student.under(self.schedule)
        return view if isinstance(self.boundary, NoBoundary) else ConsistencyFunction(view, self.boundary)

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        schedule, x0 = self.schedule, batch.x0
        t, u = self.pairs.sample(len(x0), self.student_step, schedule, x0.device)
        end = u <= schedule.t_min
        eps = noise_for(batch, self.coupling)
        x_t = schedule.add_noise(x0, eps, t)
        cond, teacher_cond, rule = self.draw_guidance(batch.cond)
        with torch.no_grad():
            if self.solver is None:
                x_u = schedule.add_noise(x0, eps, u)
            else:
                x_u = self.teacher_step(self.solver, rule, x_t, t, u, teacher_cond, batch.null)
            self.seed_draws("network")
            follower: Denoiser = self.student if self.target is None else self.target.module
            target = self.generator(follower)(x_u, u, cond)
            target = torch.where(per_sample(end, x0), x_u, target)
        # Weights that autocast has cast without a graph would be taken again, without one (pytorch #112583).
        torch.clear_autocast_cache()
        self.seed_draws("network")
        prediction = self.generator(self.student)(x_t, t, cond)
        distances = self.distance(prediction, target)
        return {"loss": (self.weight(schedule, t, u) * distances).mean(), "distance": distances.mean()}

    def draw_guidance(self, cond: Cond) -> tuple[Cond, Cond, GuidanceRule | None]:
        """The student's and the teacher's conditions, and the teacher's rule, with a scale for each sample if one is drawn.

        A teacher that reads a guidance scale itself, such as Flux dev, is given the scale and no rule besides.
        """
        if self.guidance_range is None:
            return cond, cond, self.drawn(self.guidance)
        if not cond:
            raise ValueError(f"guidance_range={self.guidance_range}: the data carries no condition; set it to null.")
        rows = next(iter(cond.values()))
        scale = draw_scales(self.guidance_range, len(rows), rows.device)
        scaled = {**cond, "guidance": scale}
        own = scaled if self.embed_guidance else cond
        if "guidance" in self.teacher.scalar_inputs:
            return own, scaled, None
        return own, cond, ClassifierFreeGuidance(scale)

    def teacher_step(
        self, solver: Solver, rule: GuidanceRule | None, x_t: Sample, t: Time, u: Time, cond: Cond, null: Cond
    ) -> Sample:
        """The teacher's estimate of ``x_u`` on the trajectory through ``x_t``."""
        teacher = self.teacher.under(self.schedule)
        teacher = teacher if rule is None else rule(teacher, null)
        return solver.step(teacher, x_t, t, u, cond)

    def guided_generator(
        self, generator: Denoiser, cond: Cond, null: Cond, guidance: float | None
    ) -> tuple[Denoiser, Cond]:
        """A student that reads the guidance scale is given it (the middle of its range by default), in one evaluation."""
        if guidance is None and self.embed_guidance:
            guidance = self.teacher_scale
        return super().guided_generator(generator, cond, null, guidance)

    def after_student_step(self, step: int, images: int, skipped: torch.Tensor) -> None:
        super().after_student_step(step, images, skipped)
        if self.target is not None:
            self.target.update(self.student, step, images, skipped)


def _check_range(scales: tuple[float, float], guidance: GuidanceRule | None, solver: Solver | None) -> None:
    """Refuses settings that contradict a drawn guidance scale."""
    check_range(scales)
    if guidance is not None:
        raise ValueError("guidance and guidance_range are both set: leave one of them null.")
    if solver is None:
        raise ValueError(f"guidance_range={scales} guides the teacher's step, but solver is null: set solver, e.g. DDIM.")
