"""Closed-form teachers: data laws whose denoiser, score, velocity and flow map are known at every time of every schedule.

Everything computes in the precision of its input. Networks small enough to be trained in a test are here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.schedules import NoiseSchedule, RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving, per_sample
from distill.types import Cond

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp-linear": VariancePreserving("linear"),
    "vp-scaled": VariancePreserving("scaled_linear", 0.00085, 0.012),
    "vp-cosine": VariancePreserving("cosine"),
    "ve": VarianceExploding(),
    "rf": RectifiedFlow(),
    "rf-shift3": RectifiedFlow(3.0),
    "trig": TrigFlow(),
}
"""All four kinds, by a name to read in a test's report."""


class Gaussian(Denoiser):
    """Exact denoiser of data ``N(mean, diag(variance))``, both of one sample's shape.

    Given a second time, it is the exact jump: the x0 from which ``alpha_r x0 + sigma_r eps`` lands on the flow map.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, variance: Tensor):
        super().__init__()
        self.schedule, self.shape = schedule, tuple(mean.shape)
        self.register_buffer("mean", mean.double())
        self.register_buffer("variance", variance.double())

    def scales(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(alpha, sigma, mean, variance)`` in float64, the first two shaped to multiply ``x``."""
        alpha, sigma = self.schedule.alpha(t.double()), self.schedule.sigma(t.double())
        return per_sample(alpha, x), per_sample(sigma, x), self.mean, self.variance

    def forward(self, x: Tensor, t: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        alpha, sigma, mean, variance = self.scales(x, t)
        if r is None:
            return (mean + variance * alpha / (alpha**2 * variance + sigma**2) * (x - alpha * mean)).to(x.dtype)
        if bool((r <= self.schedule.t_min).all()):
            return self.to_data(x, t)
        alpha_r, sigma_r, *_ = self.scales(x, r)
        landed = self.flow(x, t, r)
        return ((sigma * landed - sigma_r * x) / (alpha_r * sigma - sigma_r * alpha)).to(x.dtype)

    def score_of(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log density of ``x_t ~ N(alpha mean, alpha^2 variance + sigma^2)``."""
        alpha, sigma, mean, variance = self.scales(x, t)
        return -(x - alpha * mean) / (alpha**2 * variance + sigma**2)

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The probability-flow ODE's solution at ``s`` that is ``x`` at ``t``: it keeps each element's standard score."""
        alpha, sigma, mean, variance = self.scales(x, t)
        alpha_s, sigma_s, *_ = self.scales(x, s)
        ratio = ((alpha_s**2 * variance + sigma_s**2) / (alpha**2 * variance + sigma**2)).sqrt()
        return (alpha_s * mean + ratio * (x - alpha * mean)).to(x.dtype)

    def to_data(self, x: Tensor, t: Tensor) -> Tensor:
        """The solution where there is no noise at all: the exact consistency function."""
        alpha, sigma, mean, variance = self.scales(x, t)
        return (mean + (variance / (alpha**2 * variance + sigma**2)).sqrt() * (x - alpha * mean)).to(x.dtype)

    def data(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` samples of the data, float64."""
        noise = torch.randn(count, *self.mean.shape, dtype=torch.float64, generator=generator)
        return self.mean + self.variance.sqrt() * noise


class GaussianConsistency(Gaussian):
    """The exact consistency function of Gaussian data: each point of a trajectory to its origin."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        return self.to_data(x, t)


class Mixture(Denoiser):
    """Exact denoiser of equally likely classes, class k ``N(means[k], std^2)``; the null class is all of them.

    Args:
        schedule: in which ``x`` and ``t`` are given.
        means: ``(k, *shape)``.
        std: of every element within a class.
    """

    def __init__(self, schedule: NoiseSchedule, means: Tensor, std: float):
        super().__init__()
        self.schedule, self.std = schedule, std
        self.shape, self.num_classes = tuple(means.shape[1:]), len(means)
        self.register_buffer("means", means.double())

    def forward(self, x: Tensor, t: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        """x0 given ``cond["labels"]``; without labels, of the null class."""
        alpha = per_sample(self.schedule.alpha(t.double()), x)[:, None]
        sigma = per_sample(self.schedule.sigma(t.double()), x)[:, None]
        off = x.double()[:, None] - alpha * self.means
        variance = alpha**2 * self.std**2 + sigma**2
        log_weights = -(off**2 / variance).flatten(2).sum(2) / 2
        if "labels" in cond:
            labels = cond["labels"][:, None]
            others = (labels < len(self.means)) & (labels != torch.arange(len(self.means), device=x.device))
            log_weights = log_weights.masked_fill(others, -math.inf)
        weights = log_weights.softmax(1).reshape(*log_weights.shape, *[1] * (x.dim() - 1))
        return (weights * (self.means + self.std**2 * alpha / variance * off)).sum(1).to(x.dtype)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """Logarithm of the null class's density of ``x_t``, ``(b,)`` float64, up to a constant that depends on ``t``."""
        alpha = per_sample(self.schedule.alpha(t.double()), x)[:, None]
        sigma = per_sample(self.schedule.sigma(t.double()), x)[:, None]
        off = x.double()[:, None] - alpha * self.means
        return (-(off**2 / (alpha**2 * self.std**2 + sigma**2)).flatten(2).sum(2) / 2).logsumexp(1)

    def data(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One float64 sample for each of ``labels`` ``(b,)``, which name a class each (not the null class)."""
        noise = torch.randn(len(labels), *self.means.shape[1:], dtype=torch.float64, generator=generator)
        return self.means[labels] + self.std * noise


class MLP(nn.Module):
    """A small smooth network behind the common call ``net(x, time, cond, r) -> F``, for samples of any shape.

    Args:
        shape: of one sample.
        num_classes: classes of ``cond["labels"]``; one more is the null class. None for no labels.
        width: of the hidden layers.
        depth: number of hidden layers.
        time_scale: times are multiplied by it, which should bring the schedule's network times to about [-2, 2].
        second_time: whether it reads r.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int | None = None,
        width: int = 64,
        depth: int = 2,
        time_scale: float = 1.0,
        second_time: bool = False,
    ):
        super().__init__()
        self.shape, self.num_classes, self.time_scale, self.second_time = tuple(shape), num_classes, time_scale, second_time
        self.register_buffer("frequencies", 2.0 ** torch.arange(-1, 4))
        size, features = math.prod(self.shape), 2 * len(self.frequencies) * (1 + second_time)
        self.labels = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.first = nn.Linear(size + features, width)
        self.hidden = nn.Sequential(*[layer for _ in range(depth - 1) for layer in (nn.SiLU(), nn.Linear(width, width))])
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        if (r is not None) != self.second_time:
            raise ValueError(f"second_time={self.second_time}, and r is {r}.")
        angles = [self.time_scale * each.to(x.dtype)[:, None] * self.frequencies for each in (time, r) if each is not None]
        features = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        value = self.first(torch.cat([x.flatten(1), *features], 1))
        if self.labels is not None:
            value = value + self.labels(cond["labels"])
        return self.last(self.hidden(value)).reshape(x.shape)
