"""Reflow, and distillation of a flow, on noise-sample pairs (rectified flow, Liu et al. 2209.03003, algorithm 1).

    L = E w(t) d( u(x_t, t), z - x ) + v(t) e( x_t - t u(x_t, t), x ),   x_t = (1 - t) x + t z
    x, z, x_t: (b, *shape), t: (b,), at least the student's least noise level

A pair's x is what a teacher's ODE makes of the noise z. u is the student's velocity: the student is any denoiser, seen under
`RectifiedFlow`, so that a diffusion teacher's reflow starts at its own velocity. x_t - t u is the student's x0.

By parts: reflow (d squared, times of any law); rf++ (Lee et al. 2405.20320: `UShapedTimes`, d a pseudo-Huber of form ``mean``
weighted by 1 - t, e LPIPS; data with its inverted noise among the pairs); distillation into k steps (2209.03003, section 2.2;
InstaFlow, 2309.06380: `GridTimes`, e alone). A flow is rectified again by making pairs of the student and starting from it.
"""

from __future__ import annotations

import torch

from distill.couplings import Assignment
from distill.denoiser import Denoiser
from distill.distances import Distance
from distill.evaluation import Evaluation
from distill.grids import UniformGrid
from distill.guidance import GuidanceRule, check_null_share, drop_conditions
from distill.lora import LoRA, start_student
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.samplers import OdeSampler, Sampler
from distill.schedules import NoiseSchedule, RectifiedFlow, per_sample
from distill.solvers import Euler
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, DataSpec, Losses
from distill.weights import ConstantWeight, Weight

LEAST_TIME = 1e-5
"""Of any student: the velocity of one that predicts x0 divides by t."""


class Reflow(Method):
    """Straightens a teacher's flow, or distils it, on pairs of data modules whose ``spec.paired`` says that they are.

    Args:
        teacher: the student starts from it; pairs made by another are refused.
        times: law of t, in `RectifiedFlow`.
        velocity_distance, velocity_weight: d and w; None for no such term, and for 1.
        sample_distance, sample_weight: e and v, likewise; at least one of the two distances must be there.
        decode: whether e compares decoded images, as a perceptual distance of latents must; gradients pass the codec.
        coupling: permutes the noise of the pairs in a batch, as FlashAudio's second stage does (2410.12266, algorithm 1);
            None keeps the pairs.
        null_probability: in [0, 1), share of samples trained without their conditions.
        guidance: of the teacher when it is drawn for comparison; what guided the pairs is in the pairs.
        lora: the student is LoRA layers on the teacher's weights; None trains all weights of a copy.
        optimization, evaluation, space: see `Method`; the sampler is Euler's method on a uniform grid by default.

    Raises:
        ValueError: neither distance; a share outside of [0, 1).
    """

    def __init__(
        self,
        teacher: Denoiser,
        times: TimeDistribution,
        optimization: Optimization,
        evaluation: Evaluation,
        velocity_distance: Distance | None = None,
        velocity_weight: Weight | None = None,
        sample_distance: Distance | None = None,
        sample_weight: Weight | None = None,
        decode: bool = False,
        coupling: Assignment | None = None,
        null_probability: float = 0.0,
        guidance: GuidanceRule | None = None,
        lora: LoRA | None = None,
        space: ModelSpace | None = None,
    ):
        if velocity_distance is None and sample_distance is None:
            raise ValueError("velocity_distance and sample_distance are both null: set at least one, e.g. SquaredDistance.")
        check_null_share(null_probability, teacher)
        super().__init__(start_student(teacher, lora), teacher, guidance, optimization, evaluation, space)
        self.schedule, self.times = RectifiedFlow(), times
        self.least_time = max(LEAST_TIME, least_time(self.student.schedule))
        self.velocity_distance, self.velocity_weight = velocity_distance, velocity_weight or ConstantWeight()
        self.sample_distance, self.sample_weight = sample_distance, sample_weight or ConstantWeight()
        self.decode, self.coupling, self.null_probability = decode, coupling, null_probability

    def generator(self, student: Denoiser) -> Denoiser:
        return student.under(self.schedule)

    @property
    def student_sampler(self) -> Sampler:
        return self.evaluation.sampler or OdeSampler(Euler(), UniformGrid())

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        if not spec.paired:
            raise ValueError("data delivers no noise-sample pairs: make some by tools/make_pairs.py, and give PairsDataModule.")

    def losses(self, batch: Batch) -> Losses:
        x, z = batch.x0, batch.noise
        assert x is not None and z is not None
        if self.coupling is not None:
            z = self.coupling.pair(x, z, batch.cond.get("labels"))
        t = self.times.sample(len(x), self.schedule, x.device).clamp(min=self.least_time)
        x_t = self.schedule.add_noise(x, z, t)
        x0 = self.generator(self.student)(x_t, t, drop_conditions(batch.cond, batch.null, self.null_probability))
        losses: Losses = {}
        if self.velocity_distance is not None:
            distances = self.velocity_distance((x_t - x0) / per_sample(t, x), z - x)
            losses["velocity"] = (self.velocity_weight(self.schedule, t, t) * distances).mean()
        if self.sample_distance is not None:
            if self.decode:
                x0, x = self.space.decode_with_gradient(x0), self.to_pixels(x)
            losses["sample"] = (self.sample_weight(self.schedule, t, t) * self.sample_distance(x0, x)).mean()
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def least_time(schedule: NoiseSchedule) -> float:
    """The flow's time at a schedule's least noise: below it a denoiser takes out noise that is not there, divided by t."""
    level = schedule.nsr(torch.tensor(schedule.t_min, dtype=torch.float64))
    return float(level / (1 + level))
