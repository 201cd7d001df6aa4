"""Denoising and flow-matching training of a teacher (Ho et al. 2006.11239; Karras et al. 2206.00364; Lipman et al. 2210.02747).

    L = E_{x0, eps, t} w(t) |F(x_t, t, c) - F*|^2 / D,   x_t = alpha_t x0 + sigma_t eps,   x0, eps: (b, *shape), t: (b,)

F is the network's own output, F* what it should be (`NetworkDenoiser.raw_target`): the noise, v, eps - x0, or EDM's F, whose
plain squared error is EDM's weighted loss. Times follow a law of their own. With probability ``null_probability`` a sample's
conditions are replaced by the null conditions, so that classifier-free guidance is possible (Ho & Salimans 2207.12598).
A coupling chooses which eps goes with which x0 (`distill.couplings`); the loss stays as it is.
"""

from __future__ import annotations

import torch

from distill.couplings import Coupling, noise_for, refuse_pairs
from distill.denoiser import NetworkDenoiser
from distill.evaluation import Evaluation
from distill.guidance import check_null_share, drop_conditions
from distill.methods.base import Method
from distill.optimization import Optimization
from distill.space import ModelSpace
from distill.times import TimeDistribution
from distill.types import Batch, DataSpec, Losses
from distill.weights import ConstantWeight, Weight


class DenoisingTraining(Method):
    """Trains a denoiser from data.

    Args:
        student: the denoiser; its schedule and prediction type are what it is trained in.
        times: law of the training times.
        weight: w(t).
        null_probability: in [0, 1), share of samples trained without their conditions.
        coupling: of data and noise, by the labels before any is replaced; None draws noise freely.
        optimization, evaluation, space: see `Method`.
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
        super().__init__(student, None, None, optimization, evaluation, space)
        check_null_share(null_probability, student)
        self.times, self.weight, self.null_probability = times, weight or ConstantWeight(), null_probability
        self.coupling = coupling

    def check_data(self, spec: DataSpec) -> None:
        super().check_data(spec)
        refuse_pairs(self.coupling, spec)

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        schedule, x0 = self.student.schedule, batch.x0
        t = self.times.sample(len(x0), schedule, x0.device)
        eps = noise_for(batch, self.coupling)
        cond = drop_conditions(batch.cond, batch.null, self.null_probability)
        raw = self.student.raw(schedule.add_noise(x0, eps, t), t, cond)
        errors = (raw - self.student.raw_target(x0, eps, t)).square().flatten(1).mean(1)
        return {"loss": (self.weight(schedule, t, torch.full_like(t, schedule.t_min)) * errors).mean()}
