"""Settings of a fake score, and the checks of a score distillation's settings that are made before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from distill.denoiser import Denoiser
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.guidance import GuidanceRule
from distill.lora import LoRA
from distill.optimization import PlayerOptimization
from distill.schedules import NoiseSchedule
from distill.times import TimeDistribution
from distill.weights import Weight


@dataclass
class FakeScore:
    """How the fake score is made of the teacher, and trained.

    Attributes:
        times: law of its training times.
        weight: w(t) of its squared error in x0 (`PredictionWeight` makes it that of the noise, of EDM's F ...).
        optimization: its optimiser, learning rate and clipping.
        steps: its turns for one of the generator's.
        warmup_steps: its turns before the generator's first.
        lora: it is LoRA layers on the teacher's weights (SwiftBrush); None trains all weights of a copy.
        guidance: under which it is trained (SiD-LSG's kappa_1); None for not.
        null_probability: in [0, 1), share of samples on which it is trained without their conditions.
    """

    times: TimeDistribution
    weight: Weight
    optimization: PlayerOptimization = field(default_factory=PlayerOptimization)
    steps: int = 1
    warmup_steps: int = 0
    lora: LoRA | None = None
    guidance: GuidanceRule | None = None
    null_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give at least 1.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: give 0 or more.")
        if not 0 <= self.null_probability < 1:
            raise ValueError(f"null_probability={self.null_probability}: give a share in [0, 1).")


def check_student(teacher: Denoiser, student: Denoiser | None, lora: LoRA | None) -> None:
    """Raises ValueError for a student of its own that is also to be LoRA layers, or on another schedule than the teacher."""
    if student is not None and lora is not None:
        raise ValueError(f"model.student and model.lora={lora} are both set: LoRA stands on the teacher; set one only.")
    if student is not None and not student.schedule.same_as(teacher.schedule):
        raise ValueError(f"model.student's schedule is {student.schedule}, the teacher's {teacher.schedule}: give the same.")


def check_sampling(teacher: Denoiser, sampler: FewStepSampler, evaluation: Evaluation) -> None:
    """Raises ValueError for times outside of the schedule, and an evaluation at others than those of the sampler."""
    if evaluation.sampler is not None:
        raise ValueError("evaluation.sampler is set: the student is sampled by model.sampler; leave it out.")
    if max(evaluation.steps) > len(sampler):
        raise ValueError(f"evaluation.steps={evaluation.steps}: model.sampler has {len(sampler)} times; give no more.")
    sampler.times_in(teacher.schedule)


def check_laws(schedule: NoiseSchedule, laws: dict[str, TimeDistribution]) -> None:
    """Draws one time of each law, so that one that does not know the schedule is refused before any work is done."""
    with torch.random.fork_rng(devices=[]):
        for key, law in laws.items():
            try:
                law.sample(1, schedule)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
