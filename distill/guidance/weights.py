"""Guidance weights that change in time (Wang et al. 2404.13040): little guidance in noise, more as it falls.

The paper's omega multiplies ``cond - null`` next to ``cond``: it is ``scale - 1`` in the house convention. Its ``t / T`` is the
share u of a schedule's time, ``(t - t_min) / (t_max - t_min)``: 1 at pure noise, 0 at data. A step index, a flow's time and
TrigFlow's angle are such times; a noise level (EDM) is not, its shares would be near 0 in all but the first steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distill.schedules import NoiseSchedule, VarianceExploding
from distill.types import Time


class ShareOfTime:
    """The share of a schedule's time.

    Args:
        schedule: in whose time it is counted, by equal noise-to-signal ratio; None for the denoiser's own, under which a
            teacher seen in another schedule has other shares.

    Raises:
        ValueError: a schedule whose time is a noise level.
    """

    def __init__(self, schedule: NoiseSchedule | None = None):
        self.schedule = schedule
        if schedule is not None:
            self.check(schedule)

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises ValueError if the time of a denoiser of this schedule has no shares."""
        own = self.schedule or schedule
        if isinstance(own, VarianceExploding):
            raise ValueError(
                f"guidance: the time of {own!r} is a noise level, which has no share of the steps; set the schedule in which "
                "shares are counted (VariancePreserving, RectifiedFlow or TrigFlow)."
            )

    def __call__(self, schedule: NoiseSchedule, t: Time) -> Time:
        """u in [0, 1], ``(b,)``, at times ``t`` of a denoiser's ``schedule``."""
        own = self.schedule or schedule
        time = t if own.same_as(schedule) else own.time_of_angle(schedule.angle(t))
        return ((time - own.t_min) / (own.t_max - own.t_min)).clamp(0, 1)


class GuidanceWeight(ABC):
    """How ``scale - 1`` changes in time.

    Args:
        schedule: see `ShareOfTime`.
    """

    def __init__(self, schedule: NoiseSchedule | None = None):
        self.share = ShareOfTime(schedule)

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises ValueError if the time of a denoiser of this schedule has no shares."""
        self.share.check(schedule)

    def __call__(self, weight: Tensor, schedule: NoiseSchedule, t: Time) -> Tensor:
        """What becomes of ``scale - 1``, ``weight`` ``(b,)``, at times ``t``."""
        return self.at_share(weight, self.share(schedule, t))

    @abstractmethod
    def at_share(self, weight: Tensor, u: Tensor) -> Tensor:
        """The weight at shares ``u`` of the time, both ``(b,)``."""


class LinearGuidanceWeight(GuidanceWeight):
    """``2 (1 - u) weight``: from 0 to twice the weight, which is its mean."""

    def at_share(self, weight: Tensor, u: Tensor) -> Tensor:
        return 2 * (1 - u) * weight


class CosineGuidanceWeight(GuidanceWeight):
    """``(1 + cos(pi u)) weight``: from 0 to twice the weight, which is its mean."""

    def at_share(self, weight: Tensor, u: Tensor) -> Tensor:
        return (1 + torch.cos(math.pi * u)) * weight


class ClampedLinearGuidanceWeight(GuidanceWeight):
    """``max(c, 2 (1 - u) weight)``: the linear one, at least c.

    Args:
        least: c, at least 0, in the paper's convention (a guidance scale of ``1 + c``).
        schedule: see `ShareOfTime`.

    Raises:
        ValueError: a negative c.
    """

    def __init__(self, least: float, schedule: NoiseSchedule | None = None):
        super().__init__(schedule)
        if least < 0:
            raise ValueError(f"least={least}: give 0 or a positive weight.")
        self.least = least

    def at_share(self, weight: Tensor, u: Tensor) -> Tensor:
        return (2 * (1 - u) * weight).clamp(min=self.least)


class PoweredCosineGuidanceWeight(GuidanceWeight):
    """``(1 - cos(pi (1 - u)^power)) / 2 weight``: from 0 to the weight, the later the larger ``power`` is.

    Args:
        power: > 0; the paper's s, to be tuned for each model.
        schedule: see `ShareOfTime`.

    Raises:
        ValueError: a power that is not positive.
    """

    def __init__(self, power: float, schedule: NoiseSchedule | None = None):
        super().__init__(schedule)
        if power <= 0:
            raise ValueError(f"power={power}: give a positive number.")
        self.power = power

    def at_share(self, weight: Tensor, u: Tensor) -> Tensor:
        return (1 - torch.cos(math.pi * (1 - u) ** self.power)) / 2 * weight
