"""What the tests of score distillation around its losses share: one method of each kind on a small U-Net, and batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from distill.adversarial import Adversarial, JointAdversarial
from distill.denoiser import NetworkDenoiser
from distill.distances import PseudoHuber
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.guidance import ClassifierFreeGuidance
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.fake_score import FakeScore
from distill.methods.score_distillation import ScoreDistillation
from distill.methods.score_identity import ScoreIdentity
from distill.methods.score_implicit import ScoreImplicit
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization, PlayerOptimization
from distill.schedules import RectifiedFlow
from distill.times import UniformTimes
from distill.types import Batch, label_conditions
from distill.weights import ConstantWeight, VariationalScoreWeight

SHAPE = (1, 4, 4)
ROWS = 4
CFG = ClassifierFreeGuidance(2.0)
KINDS: dict[str, Callable[..., ScoreDistillation]] = {
    "sid": partial(ScoreIdentity, alpha=1.2),
    "sida": partial(ScoreIdentity, adversarial=JointAdversarial()),
    "sim": partial(ScoreImplicit, distance=PseudoHuber(0.1)),
    "vsd": partial(DistributionMatching, weight=VariationalScoreWeight(), normalize=False),
    "dmd2": partial(DistributionMatching, adversarial=Adversarial(UniformTimes())),
}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


def teacher(seed: int = 0, dropout: float = 0.2) -> NetworkDenoiser:
    """A U-Net of two levels, with attention and dropout, on 4x4 samples of two classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2D(1, 4, 2, (8, 8), layers_per_block=1, heads_width=8, groups=4, dropout=dropout)
    return NetworkDenoiser(network, RectifiedFlow(), "flow")


def method(
    kind: str = "sid", times: tuple[float, ...] = (1.0,), fake: dict[str, Any] | None = None, **settings: Any
) -> ScoreDistillation:
    """One of `KINDS`; ``fake`` are settings of its fake score."""
    fake = {"times": UniformTimes(0.02, 0.98), "weight": ConstantWeight()} | (fake or {})
    defaults: dict[str, Any] = {
        "teacher": settings.pop("teacher", None) or teacher(),
        "sampler": FewStepSampler(times=times),
        "times": UniformTimes(0.02, 0.98),
        "fake_score": FakeScore(**{"optimization": PlayerOptimization(adam), **fake}),
        "optimization": Optimization(adam, averaging=DecayAveraging(0.9)),
        "evaluation": Evaluation(steps=[1]),
    }
    return KINDS[kind](**{**defaults, **settings})


def batch(number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x0, noise = torch.randn(2, ROWS, *SHAPE, generator=generator)
    return Batch(x0, *label_conditions((torch.arange(ROWS) + number) % 2, 2), noise)


BATCHES = [batch(number) for number in range(6)]
