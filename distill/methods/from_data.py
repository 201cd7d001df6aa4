"""What methods share that train a network from data alone: noised points, their targets, and a weighted squared error."""

from __future__ import annotations

from abc import ABC

import torch

from distill.couplings import Coupling, noise_for, refuse_pairs
from distill.denoiser import NetworkDenoiser
from distill.evaluation import Evaluation
from distill.guidance import check_null_share
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.schedules import NoiseSchedule
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, DataSpec, Losses, Sample, Time
from distill.weights import ConstantWeight, Weight


class TrainingFromData(Method, ABC):
    """Trains a denoiser without a teacher.

    Args:
        student: the denoiser; its schedule and prediction type are what it is trained in.
        times: law of the training times.
        weight: w(t).
        null_probability: in [0, 1), share of samples trained without their conditions.
        coupling: of data and noise, by the labels before any is replaced; None draws noise freely.
        optimization, evaluation, space: see `Method`.

    Raises:
        ValueError: a share outside of [0, 1), or a network without a null class.
    """

    student: NetworkDenoiser

    def __init__(
        self,
        student: NetworkDenoiser,
        times: TimeDistribution,
        optimization: Optimization,
        evaluation: Evaluation,
        weight: Weight | None = None,
        null_probability: float = 0.1,
        coupling: Coupling | None = None,
        space: ModelSpace | None = None,
    ):
        check_null_share(null_probability, student)
        super().__init__(student, None, None, optimization, evaluation, space)
        self.times, self.weight, self.null_probability = times, weight or ConstantWeight(), null_probability
        self.coupling = coupling

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        refuse_pairs(self.coupling, spec)

    def noised(self, batch: Batch) -> tuple[Sample, Time, Sample]:
        """``x_t``, its times ``(b,)`` and the network's target there."""
        assert batch.x0 is not None
        schedule: NoiseSchedule = self.student.schedule
        t = self.times.sample(len(batch.x0), schedule, batch.x0.device)
        eps = noise_for(batch, self.coupling)
        return schedule.add_noise(batch.x0, eps, t), t, self.student.raw_target(batch.x0, eps, t)

    def squared(self, errors: Sample, t: Time) -> Losses:
        """The weighted mean square of ``errors`` ``(b, *shape)``."""
        schedule = self.student.schedule
        weights = self.weight(schedule, t, torch.full_like(t, schedule.t_min))
        return {"loss": (weights * errors.square().flatten(1).mean(1)).mean()}
