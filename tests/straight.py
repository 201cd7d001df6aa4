"""What reflow of a Gaussian's flow ends in, in closed form: straight lines from each noise to its own sample."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.schedules import RectifiedFlow, per_sample
from distill.types import Cond


class StraightGaussian(Denoiser):
    """The optimum of reflow on the pairs ``(z, x = mean + variance^1/2 z)``, those of the flow to ``N(mean, diag(variance))``.

    The lines ``x_t = (1 - t) x + t z`` do not cross, so the mean of ``x`` given ``x_t`` is the ``x`` of the one line through
    ``x_t``: with ``z = (x_t - (1 - t) mean) / ((1 - t) variance^1/2 + t)``. Computes in float64.
    """

    def __init__(self, mean: Tensor, variance: Tensor):
        super().__init__()
        self.schedule, self.shape = RectifiedFlow(), tuple(mean.shape)
        self.register_buffer("mean", mean.double())
        self.register_buffer("std", variance.double().sqrt())

    def to_data(self, noise: Tensor) -> Tensor:
        """The sample ``(b, *shape)`` that belongs to unit ``noise``."""
        return (self.mean + self.std * noise).to(noise.dtype)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        time = per_sample(t.double(), x)
        noise = (x - (1 - time) * self.mean) / ((1 - time) * self.std + time)
        return self.to_data(noise).to(x.dtype)

    def pairs(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(noise, sample)``, each ``(count, *shape)`` float64."""
        noise = torch.randn(count, *self.mean.shape, dtype=torch.float64, generator=generator)
        return noise, self.to_data(noise)
