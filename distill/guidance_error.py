"""How near a student's one evaluation comes to its guided teacher's two: a relative error on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from distill.denoiser import Denoiser
from distill.guidance import GuidanceRule, guided
from distill.noise import SeededNoise
from distill.types import Batch


@torch.no_grad()
def squared_errors(
    student: Denoiser,
    teacher: Denoiser,
    batches: Iterable[Batch],
    scales: Sequence[float],
    rule: GuidanceRule | None,
    seed: int,
    first: int = 0,
) -> Tensor:
    """``sum |D - D*|^2`` and ``sum |D*|^2`` for each scale, float64 ``(scales, 2)``: the error is the root of their ratio.

    D* is the teacher's x0 under the rule at a scale, D the student's, told the scale if it reads it. Noise and time of sample i
    of the data follow from (seed, i); times are uniform over the teacher's schedule.

    Args:
        student, teacher: the teacher is not guided yet.
        batches: in model space, with ``x0``; their conditions hold whatever else the student reads.
        scales: guidance scales, 1 is none.
        rule: what is distilled; None for classifier-free guidance.
        seed: of noise and times.
        first: number of the first sample.

    Raises:
        ValueError: batches without data.
    """
    sums, schedule = torch.zeros(len(scales), 2, dtype=torch.float64), teacher.schedule
    student = student.under(schedule)
    for batch in batches:
        if batch.x0 is None:
            raise ValueError("the error is of held-out data, and validation delivers none: set data.real, or leave it out.")
        fresh = SeededNoise(seed, range(first, first + len(batch)), batch.x0.shape[1:])
        noise, uniform = fresh(batch.x0), torch.special.ndtr(fresh(batch.x0).flatten(1)[:, 0])
        t = schedule.t_min + uniform * (schedule.t_max - schedule.t_min)
        x_t = schedule.add_noise(batch.x0, noise, t)
        for row, scale in enumerate(scales):
            expected, cond = guided(teacher, batch.cond, batch.null, scale, rule)
            target = expected(x_t, t, cond)
            own = {**batch.cond, "guidance": torch.full_like(t, scale)} if reads_scale(student) else batch.cond
            error = student(x_t, t, own) - target
            sums[row] += torch.stack([error.double().square().sum(), target.double().square().sum()]).cpu()
        first += len(batch)
    return sums


def prepared(method: Any, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches on the method's device, in model space, with the negative prompts that its student may read."""
    for batch in batches:
        ready = method.prepare(move_data_to_device(batch, method.device))
        negatives = getattr(method, "negatives", None)
        yield ready if negatives is None else replace(ready, cond=negatives.of_null(ready.cond, ready.null))


def reads_scale(denoiser: Denoiser) -> bool:
    """Whether a denoiser is guided by an input of its own."""
    return "guidance" in denoiser.scalar_inputs
