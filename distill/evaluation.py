"""What is drawn and measured while a method trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchmetrics import Metric

from distill.grids import UniformGrid
from distill.samplers import OdeSampler, RenoiseSampler, Sampler
from distill.solvers import Heun
from distill.types import Sample


@dataclass
class Evaluation:
    """How a student and its teacher are sampled, and what the samples are measured by.

    Attributes:
        sampler: the student's; None re-noises on a uniform grid.
        steps: numbers of steps at which the student is drawn and measured.
        teacher_sampler: the teacher's; None is Heun's solver on a uniform grid.
        teacher_steps: its number of steps.
        metrics: each has a ``name`` and ``update(samples, real, cond)``; one value a number of steps is logged.
        seed: seed of the samples that are drawn in validation.
    """

    # None, not objects: a saved config must be able to spell its defaults out.
    sampler: Sampler | None = None
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    teacher_sampler: Sampler | None = None
    teacher_steps: int = 32
    metrics: list[Metric] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or self.teacher_steps < 1:
            raise ValueError(f"steps={self.steps}, teacher_steps={self.teacher_steps}: give numbers of steps of at least 1.")

    @property
    def student_sampler(self) -> Sampler:
        """The student's sampler, made where ``sampler`` is None."""
        return self.sampler or RenoiseSampler(UniformGrid())

    def sample_teacher(self, *args: Any, **kwargs: Any) -> Sample:
        """Calls the teacher's sampler."""
        return (self.teacher_sampler or OdeSampler(Heun(), UniformGrid()))(*args, **kwargs)
