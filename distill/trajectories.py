"""Guided trajectories of a teacher, stored to distil its guidance without it: AGD (2503.07274), algorithm and section 4.

A trajectory is a run of the guided teacher's sampler. A point of it is an evaluation: the guided prediction x0 at (x_t, t),
kept as x0 and the noise ``eps = (x_t - alpha x0) / sigma`` that it leaves, from which ``x_t = alpha x0 + sigma eps``. Both are
of the scale of data and of unit noise at every level, which x_t is not, and give the target of any parametrisation. The paper
stores x_t and the guided eps, from which x0 is not to be had where sigma / alpha is large.

With u the rounding unit of the storage (2^-11 in float16, 2^-24 in float32), an element of x0 is the teacher's to ``u |x0|``,
and one of x_t made again to ``u (alpha |x0| + sigma |eps|)``, besides a few roundings in float32; in float16 what is below
2^-14 is rounded as 2^-14 is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch
from torch import Tensor

from distill.denoiser import Denoiser, FreshNoise, refuse_own_noise
from distill.guidance import GuidanceRule
from distill.noise import SeededNoise
from distill.numbered_draws import NumberedDraws
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule
from distill.space import ModelSpace
from distill.types import Batch, Cond, Labels, Sample, Time

OFFSET = 1
"""Third word of the seed of a trajectory's offset; its scale's seed has two."""


class EvaluationRecord:
    """Chosen evaluations of a batch.

    Args:
        chosen: ``(b, points)``, numbers of the evaluations that are kept of each sample, increasing.

    Attributes:
        count: evaluations so far.
    """

    def __init__(self, chosen: Tensor):
        self.chosen, self.count = chosen, 0
        self.places: list[Tensor] = []
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Sample, t: Time, x0: Sample) -> None:
        """The next evaluation of the batch, of which the rows are kept that chose it."""
        rows, points = torch.nonzero(self.chosen == self.count, as_tuple=True)
        self.places.append(rows * self.chosen.shape[1] + points)
        self.kept.append((x[rows], t[rows], x0[rows]))
        self.count += 1

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, t, x0)`` of what was kept, ``(b * points, ...)``, sample after sample."""
        order = torch.cat(self.places).argsort()
        x, t, x0 = (torch.cat(column)[order] for column in zip(*self.kept, strict=True))
        return x, t, x0


class RecordedDenoiser(Denoiser):
    """A denoiser, guided or not, whose evaluations are recorded.

    Args:
        base: what is evaluated.
        record: where to.
    """

    def __init__(self, base: Denoiser, record: EvaluationRecord):
        super().__init__()
        self.base, self.record = base, record
        self.describe_as(base)

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        x0 = self.base(x, t, cond, r)
        self.record.add(x, t, x0)
        return x0

    def trajectory(self, fresh: FreshNoise) -> Denoiser:
        return RecordedDenoiser(self.base.trajectory(fresh), self.record)


class _Nothing(Denoiser):
    """Predicts zeros: for counting evaluations."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        return torch.zeros_like(x)


def count_evaluations(sampler: OdeSampler, schedule: NoiseSchedule, steps: int) -> int:
    """How often a sampler evaluates its denoiser in so many steps."""
    record = EvaluationRecord(torch.empty(1, 0))
    sampler(RecordedDenoiser(_Nothing(schedule), record), torch.zeros(1, 1), {}, steps)
    return record.count


class GuidedTrajectories(NumberedDraws):
    """Draws points of guided trajectories. Trajectory i is a function of the seed, of i and of its conditions.

    Fewer points than evaluations lie evenly over a trajectory, from an offset that is drawn for each: together they are of all
    evaluations equally often, so that the student sees every time at which it will be sampled.

    Args:
        teacher: the denoiser whose trajectories they are; its file's hash is stored with them.
        sampler: whose evaluations they are; Heun's inner ones count.
        steps: of the sampler.
        space: codec and conditioner of the teacher; null for a teacher that works on pixels and reads no prompts.
        guidance: of the teacher; null for none, or for classifier-free guidance where there is a range.
        guidance_range: lowest and highest guidance scale; one is drawn for each trajectory, uniform, and stored with its points
            as condition ``guidance``. AGD's is [1, 6] for DiT and [1, 12] for Stable Diffusion. A teacher that reads that
            condition is given it, another is guided at it by ``guidance``.
        points: evaluations of each trajectory that are kept; null for all.
        seed: of the noise and of all that is drawn.

    Attributes:
        evaluations: of a trajectory.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        teacher: Denoiser,
        sampler: OdeSampler,
        steps: int,
        space: ModelSpace | None = None,
        guidance: GuidanceRule | None = None,
        guidance_range: tuple[float, float] | None = None,
        points: int | None = None,
        seed: int = 0,
    ):
        refuse_own_noise(self, guidance)
        super().__init__(teacher, sampler, steps, space, guidance, guidance_range, seed)
        self.evaluations = count_evaluations(sampler, teacher.schedule, steps)
        if points is not None and not 1 <= points <= self.evaluations:
            there = f"{steps} steps have {self.evaluations} evaluations"
            raise ValueError(f"points={points}: {there}; give 1 to {self.evaluations}, or null for all.")
        self.each = points or self.evaluations

    @torch.no_grad()
    def draw(self, numbers: Labels, batch: Batch, shape: tuple[int, ...]) -> Batch:
        """The points of the trajectories with these numbers ``(b,)``, ``(b * each, ...)``, in the order of evaluation.

        Args:
            numbers: of the trajectories, 0 or more.
            batch: what they are to show, in prompts or encoded.
            shape: of a sample in model space.
        """
        ready = self.encode(numbers, replace(batch, x0=None))
        denoiser, cond = self.guided(numbers, ready)
        fresh = SeededNoise(self.seed, numbers.tolist(), shape)
        record = EvaluationRecord(self.chosen(numbers))
        self.sampler(RecordedDenoiser(denoiser, record), fresh.draw(self.device), cond, self.steps, fresh)
        x, t, x0 = record.points()
        noise = self.teacher.schedule.eps(x, x0, t)
        return Batch(x0, self.repeated(cond), self.repeated(ready.null), noise, encoded=True, time=t)

    def repeated(self, cond: Cond) -> Cond:
        """The conditions of trajectories as those of their points."""
        return {name: value.repeat_interleave(self.each, 0) for name, value in cond.items()}

    def chosen(self, numbers: Labels) -> Tensor:
        """The evaluations ``(b, each)`` that are kept: ``floor((k + u) evaluations / each)``, u in [0, 1) from (seed, number).

        In whole numbers, so that a u near to 1 is not rounded to it.
        """
        seeds = ((self.seed, number, OFFSET) for number in numbers.tolist())
        states = torch.tensor([int(numpy.random.SeedSequence(seed).generate_state(1)[0]) for seed in seeds])
        return ((torch.arange(self.each) * 2**32 + states[:, None]) * self.evaluations) // (self.each * 2**32)
