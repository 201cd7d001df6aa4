"""Denoising and flow-matching training of a teacher (Ho et al. 2006.11239; Karras et al. 2206.00364; Lipman et al. 2210.02747).

    L = E_{x0, eps, t} w(t) |F(x_t, t, c) - F*|^2 / D,   x_t = alpha_t x0 + sigma_t eps,   x0, eps: (b, *shape), t: (b,)

F is the network's own output, F* what it should be (`NetworkDenoiser.raw_target`): the noise, v, eps - x0, or EDM's F, whose
plain squared error is EDM's weighted loss. Times follow a law of their own. With probability ``null_probability`` a sample's
conditions are replaced by the null conditions, so that classifier-free guidance is possible (Ho & Salimans 2207.12598).
A coupling chooses which eps goes with which x0 (`distill.couplings`); the loss stays as it is.
"""

from __future__ import annotations

from distill.guidance import drop_conditions
from distill.methods.from_data import TrainingFromData
from distill.types import Batch, Losses


class DenoisingTraining(TrainingFromData):
    """Trains a denoiser from data; see `TrainingFromData`."""

    def losses(self, batch: Batch) -> Losses:
        x_t, t, target = self.noised(batch)
        cond = drop_conditions(batch.cond, batch.null, self.null_probability)
        return self.squared(self.student.raw(x_t, t, cond) - target, t)
