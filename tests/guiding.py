"""What the tests of guidance share: counted oracles, a setting at four noise levels, every rule by name."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Mixture

from distill.denoiser import Denoiser
from distill.guidance import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    Autoguidance,
    CfgPlusPlus,
    ClassifierFreeGuidance,
    GuidanceRule,
    IndependentConditionGuidance,
)
from distill.schedules import NoiseSchedule, RectifiedFlow
from distill.types import Cond, label_conditions

MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])
IMAGES = 0.4 * torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
"""Means of three classes of small images, near enough to each other that no x0 is of one class alone."""

LEVELS = (0.25, 0.7, 1.5, 4.0)


class Counted(Mixture):
    """The mixture's oracle; keeps the rows of each call and the last conditions."""

    def __init__(self, schedule: NoiseSchedule, means: torch.Tensor = MEANS, std: float = 0.4):
        super().__init__(schedule, means, std)
        self.rows: list[int] = []

    def forward(self, x, t, cond, r=None):
        self.rows.append(len(x))
        self.cond = cond
        return super().forward(x, t, cond)


def setting(schedule: NoiseSchedule = RectifiedFlow(), means: torch.Tensor = MEANS):
    """A counted denoiser, a batch at four noise levels, its conditions and its null conditions."""
    t = schedule.time_of_nsr(torch.tensor(LEVELS, dtype=torch.float64))
    x = torch.randn(4, *means.shape[1:], dtype=torch.float64)
    x = x * schedule.scale(t).reshape(-1, *[1] * (means.dim() - 1))
    return Counted(schedule, means), x, t, *label_conditions(torch.tensor([0, 1, 2, 0]), 3)


def both(denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, cond: Cond, null: Cond) -> tuple[torch.Tensor, torch.Tensor]:
    """The two evaluations, one by one."""
    return denoiser(x, t, cond), denoiser(x, t, null)


def assert_near(found: torch.Tensor, expected: torch.Tensor, off: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=off)


def no_fresh(x: torch.Tensor) -> torch.Tensor:
    """For trajectories on which nothing is drawn."""
    raise AssertionError("drawn")


def rules(schedule: NoiseSchedule, means: torch.Tensor = MEANS) -> dict[str, GuidanceRule]:
    """Each rule that guides an oracle (one without a network), with every setting in use."""
    interval: dict[str, Any] = {"sigma_low": 0.3, "sigma_high": 2.0}
    return {
        "cfg": ClassifierFreeGuidance(3.0, **interval),
        "rescaled": ClassifierFreeGuidance(3.0, rescale=0.7, **interval),
        "apg": AdaptiveProjectedGuidance(3.0, 0.2, 0.5, **interval),
        "cfg++": CfgPlusPlus(0.6, **interval),
        "adaptive": AdaptiveGuidance(3.0, 0.99, "x0", **interval),
        "auto": Autoguidance(Mixture(schedule, means, 0.7), 2.0, **interval),
        "icg": IndependentConditionGuidance(3.0, **interval),
    }
