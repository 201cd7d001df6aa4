"""What the tests of score distillation share: a generator whose law is a Gaussian, its exact fake score, exact expectations.

The data is N(m, v), the generator's samples are N(b, a^2), element by element. The laws of x_t, the two denoisers and the
divergences between them are then known as functions of (a, b), and everything that is quadratic in the draws (z, eps) has its
exact expectation on draws of +-1 in all combinations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from helpers import SmallNetwork, batch_of, energy_distance, fit, gaussian, two_classes
from oracle import Gaussian
from torch import Tensor, nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.methods import score_distillation
from distill.methods.fake_score import FakeScore
from distill.methods.score_distillation import ScoreDistillation
from distill.networks.bottleneck import Bottleneck
from distill.optimization import Optimization
from distill.schedules import NoiseSchedule, RectifiedFlow, VarianceExploding, VariancePreserving, per_sample
from distill.times import TimeDistribution, UniformTimes
from distill.types import Batch, Cond, Time, label_conditions
from distill.weights import PredictionWeight, Weight

Pair = tuple[Tensor, Tensor]
"""(a, b), each of one sample's shape."""


# ------------------------------------------------------------------------------------------------------------ networks


class Affine(Denoiser):
    """``b + a x / sigma(t)``: where its input is ``sigma(t) z``, its samples are N(b, a^2)."""

    def __init__(self, schedule: NoiseSchedule, a: Tensor, b: Tensor):
        super().__init__()
        self.schedule, self.shape = schedule, tuple(a.shape)
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor, t: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        return self.b + self.a * x / per_sample(self.schedule.sigma(t), x)


class Tapped(SmallNetwork):
    """The small network with a bottleneck: its hidden layer as a map of one place."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        width = self.first.out_features
        self.hidden.append(nn.Unflatten(1, (width, 1, 1)))
        self.last.insert(0, nn.Flatten())

    @classmethod
    def denoiser(cls, seed: int) -> NetworkDenoiser:
        """One for two classes, with weights that depend on ``seed`` alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return NetworkDenoiser(cls(num_classes=2, time_scale=1e-3), RectifiedFlow(), "flow")

    def bottleneck(self, layer: str = "middle") -> Bottleneck:
        return Bottleneck(self.hidden[-1], self.first.out_features, (1, 1))


# ---------------------------------------------------------------------------------------------------- draws and weights


class Listed(TimeDistribution):
    """The given times, float64, each for as many samples in a row."""

    def __init__(self, *times: float):
        self.times = torch.tensor(times, dtype=torch.float64)

    def sample(self, count: int, schedule: NoiseSchedule, device: torch.device | None = None) -> Time:
        return self.times.repeat_interleave(count // len(self.times))


class RatioPower(Weight):
    """``scale (alpha / sigma)^power``; ``scale`` may have a number for each sample."""

    def __init__(self, power: float, scale: float | Tensor = 1.0):
        self.power, self.scale = power, scale

    def __call__(self, schedule: NoiseSchedule, t: Time, u: Time) -> Tensor:
        return self.scale * schedule.nsr(t) ** -self.power


@contextmanager
def drawn(*draws: Tensor) -> Iterator[None]:
    """Within the block ``torch.randn`` and ``torch.randn_like`` give these, in this order; all must be asked for."""
    left = list(draws)

    def take(shape: tuple[int, ...]) -> Tensor:
        assert left and left[0].shape == shape
        return left.pop(0)

    with (
        patch.object(torch, "randn", lambda *shape, **_: take(shape)),
        patch.object(torch, "randn_like", lambda like, **_: take(like.shape)),
    ):
        yield
    assert not left


@contextmanager
def returning(method: ScoreDistillation, x_g: Tensor) -> Iterator[None]:
    """Within the block the generator's samples are these; a gradient in them is what the generator is given."""
    with patch.object(method, "generate", lambda batch, gradient: x_g.detach() if gradient == "none" else x_g):
        yield


def signs(numbers: int) -> Tensor:
    """All combinations of +-1, ``(2^numbers, numbers)``: means 0, variances 1 and no correlation, as of unit noise."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * numbers)


def hermite(numbers: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite points ``(nodes^numbers, numbers)`` of unit noise, and their masses ``(nodes^numbers,)``."""
    points, masses = (torch.from_numpy(each) for each in numpy.polynomial.hermite_e.hermegauss(nodes))
    masses = masses / math.sqrt(2 * math.pi)
    return torch.cartesian_prod(*[points] * numbers), torch.cartesian_prod(*[masses] * numbers).prod(1)


# ---------------------------------------------------------------------------------------------- methods in closed form


@dataclass(frozen=True)
class Setting:
    """A schedule, the times of the generator's loss, and others, at which the fake score is trained."""

    schedule: NoiseSchedule
    times: tuple[float, ...]
    fake_times: tuple[float, ...]

    @cached_property
    def teacher(self) -> Gaussian:
        return gaussian(self.schedule)

    @property
    def match(self) -> Pair:
        """(a, b) of the generator whose samples are the data."""
        return self.teacher.variance.sqrt(), self.teacher.mean

    def scales(self, times: tuple[float, ...]) -> Pair:
        """alpha and sigma, each ``(times, 1, 1, 1)``."""
        t = torch.tensor(times, dtype=torch.float64)
        return self.schedule.alpha(t).reshape(-1, 1, 1, 1), self.schedule.sigma(t).reshape(-1, 1, 1, 1)

    def parts(self, teacher: Denoiser | None = None, **fake_score: Any) -> dict[str, Any]:
        """What every method of score distillation is built of; the generator starts at noise-to-signal ratio 2.5."""
        return {
            "teacher": teacher or self.teacher,
            "sampler": FewStepSampler(sigmas=[2.5]),
            "times": Listed(*self.times),
            "fake_score": FakeScore(Listed(*self.fake_times), **{"weight": RatioPower(1.0), **fake_score}),
            "optimization": Optimization(),
            "evaluation": Evaluation(steps=[1]),
        }

    def build(self, kind: type[ScoreDistillation], law: Pair, **settings: Any) -> Any:
        """A method with a generator of law N(b, a^2) and its exact fake score, which has no gradient in (a, b)."""
        method = kind(**self.parts(), student=Affine(self.schedule, *law), **settings)
        method.critic["score"] = Gaussian(self.schedule, law[1], law[0] ** 2)
        return method

    def loss(self, method: ScoreDistillation, turn: str = "losses") -> Tensor:
        """The exact expectation of a loss that is quadratic in the draws, averaged over the times."""
        points = signs(4).repeat(len(self.times), 1)
        return self.loss_on(method, points, turn)

    def loss_on(self, method: ScoreDistillation, points: Tensor, turn: str = "losses") -> Tensor:
        """The loss where (z, eps) are these ``(b, 4)``."""
        z, eps = (each.reshape(-1, 2, 1, 1) for each in points.chunk(2, 1))
        with drawn(z, eps):
            return getattr(method, turn)(Batch(None, {}, {}, z))["loss"]

    # -------------------------------------------------------------------------------------------- known functions of (a, b)

    def divergence(self, law: Pair) -> Tensor:
        """KL divergence of the generator's noisy law from the data's, of whole samples, averaged over the times."""
        (a, b), (alpha, sigma) = law, self.scales(self.times)
        own, other = alpha**2 * a**2 + sigma**2, alpha**2 * self.teacher.variance + sigma**2
        off = alpha**2 * (b - self.teacher.mean) ** 2
        return ((own + off) / other - 1 - (own / other).log()).flatten(1).sum(1).mean() / 2

    def gap(self, law: Pair, fake: Pair) -> Pair:
        """Mean and standard deviation ``(times, *shape)`` of ``X_fake - X_phi`` at the noisy samples of a law: it is Gaussian.

        Both pairs are (a, b): of the generator whose samples they are, and of the one whose score the fake score is.
        """
        alpha, sigma = self.scales(self.times)
        mean, variance = self.teacher.mean, self.teacher.variance
        gain = variance * alpha / (alpha**2 * variance + sigma**2)
        fake_gain = fake[0] ** 2 * alpha / (alpha**2 * fake[0] ** 2 + sigma**2)
        middle = fake[1] + fake_gain * alpha * (law[1] - fake[1]) - mean - gain * alpha * (law[1] - mean)
        return middle, (fake_gain - gain) * (alpha**2 * law[0] ** 2 + sigma**2).sqrt()

    def squared_gap(self, law: Pair, fake: Pair) -> Tensor:
        """``E |X_fake - X_phi|^2`` ``(times,)``: where both pairs are the same, twice the Fisher divergence of denoisers."""
        middle, spread = self.gap(law, fake)
        return (middle**2 + spread**2).flatten(1).sum(1)


SETTINGS = {
    "vp": Setting(VariancePreserving(), (80.0, 300.0, 600.0), (150.0, 440.0, 700.0)),
    "ve": Setting(VarianceExploding(), (0.15, 0.6, 2.0), (0.3, 1.0, 3.0)),
    "rf": Setting(RectifiedFlow(), (0.2, 0.5, 0.8), (0.3, 0.6, 0.7)),
}


def pair(a: list[float], b: list[float]) -> Pair:
    """(a, b) in float64, each ``(2, 1, 1)``."""
    return torch.tensor(a).double().reshape(2, 1, 1), torch.tensor(b).double().reshape(2, 1, 1)


OFF = [pair([0.8, 0.5], [0.1, 0.3]), pair([0.2, 0.1], [0.9, -0.5])]
"""Generators that are too wide and too narrow, both off the mean."""

every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
off_the_match = pytest.mark.parametrize("law", OFF, ids=["wide", "narrow"])


def slope(function: Callable[[Pair], Tensor], at: Pair) -> Tensor:
    """The gradient ``(2, *shape)`` of a scalar function of (a, b)."""
    a, b = (each.clone().requires_grad_() for each in at)
    return torch.stack(torch.autograd.grad(function((a, b)), [a, b]))


def gradient(loss: Tensor, method: ScoreDistillation) -> Tensor:
    """That of a method's loss in its generator's (a, b), ``(2, *shape)``."""
    return torch.stack(torch.autograd.grad(loss, [method.student.a, method.student.b]))


# ------------------------------------------------------------------------------------------------------------ learning


BATCHES = [batch_of(number, 128, tied=False) for number in range(100)]


def learned(kind: type[ScoreDistillation], turns: int, **settings: Any) -> tuple[float, float]:
    """Energy distances of one-step samples to the data of their class, before and after training small networks.

    The fake score has a turn for each of the generator's; ``settings`` are of the method.
    """
    averaging = DecayAveraging(0.95)
    parts = {
        "teacher": two_classes(),
        "sampler": FewStepSampler(times=[0.9]),
        "times": UniformTimes(0.02, 0.9),
        "fake_score": FakeScore(UniformTimes(0.02, 0.98), PredictionWeight("flow"), Optimization(adam)),
        "optimization": Optimization(adam, averaging=averaging),
        "evaluation": Evaluation(steps=[1]),
        "student": Tapped.denoiser(1),
    }
    fake = Tapped.denoiser(2)
    with patch.object(score_distillation, "start_student", lambda teacher, lora: fake):
        method = kind(**{**parts, **settings})
    labels = torch.arange(2000) % 2
    data, (cond, null) = two_classes().data(labels).float(), label_conditions(labels, 2)

    def distance() -> float:
        samples = method.draw(1, range(2000), cond, null)
        return sum(energy_distance(samples[labels == k], data[labels == k]) for k in (0, 1))

    before = distance()
    fit(method, BATCHES, turns)
    return before, distance()


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=5e-3, betas=(0.0, 0.99), fused=True)
