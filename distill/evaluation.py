"""What is drawn and measured while a method trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from jsonargparse import lazy_instance
from torchmetrics import Metric

from distill.samplers import OdeSampler, RenoiseSampler, Sampler

# Written as a config writes them, so that a saved config can spell the defaults out.
UNIFORM = {"class_path": "distill.times.UniformGrid"}
HEUN = {"class_path": "distill.solvers.Heun"}


@dataclass
class Evaluation:
    """How a student and its teacher are sampled, and what the samples are measured by.

    Attributes:
        sampler: the student's.
        steps: numbers of steps at which the student is drawn and measured.
        teacher_sampler: the teacher's.
        teacher_steps: its number of steps.
        metrics: each has a ``name`` and ``update(samples, real, cond)``; one value a number of steps is logged.
        seed: seed of the samples that are drawn in validation.
    """

    sampler: Sampler = field(default_factory=lambda: lazy_instance(RenoiseSampler, grid=UNIFORM))
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    teacher_sampler: Sampler = field(default_factory=lambda: lazy_instance(OdeSampler, solver=HEUN, grid=UNIFORM))
    teacher_steps: int = 32
    metrics: list[Metric] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or self.teacher_steps < 1:
            raise ValueError(f"steps={self.steps}, teacher_steps={self.teacher_steps}: give numbers of steps of at least 1.")
