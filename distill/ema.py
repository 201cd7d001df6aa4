"""Exponential moving averages of a student's weights, by decay, by half-life in images or by a power of the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from distill.frozen import still_copy
from distill.grids import Curriculum
from distill.sharding import Outline, gathered, local


class Averaging(ABC):
    """How much of the average is kept at an update."""

    @abstractmethod
    def decay(self, step: int, images: int) -> float:
        """Decay in [0, 1) of the update after 0-based ``step``, which trained on ``images`` images over all ranks."""


class DecayAveraging(Averaging):
    """A fixed decay, reached by ``(1 + step) / (10 + step)`` if warmed up.

    Args:
        value: in [0, 1).
        warmup: whether the first steps average over fewer.
    """

    def __init__(self, value: float = 0.999, warmup: bool = True):
        if not 0 <= value < 1:
            raise ValueError(f"value={value}: give a decay in [0, 1).")
        self.value, self.warmup = value, warmup

    def decay(self, step: int, images: int) -> float:
        return min(self.value, (1 + step) / (10 + step)) if self.warmup else self.value


class HalfLifeAveraging(Averaging):
    """EDM's: ``0.5^(batch / min(half_life, ramp * images seen before))`` (Karras et al. 2206.00364, training loop).

    Args:
        half_life: images after which a weight's share has halved, > 0.
        ramp: the half-life's largest share of the images seen; None for no ramp.
    """

    def __init__(self, half_life: float = 500_000, ramp: float | None = 0.05):
        if half_life <= 0 or (ramp is not None and ramp <= 0):
            raise ValueError(f"half_life={half_life}, ramp={ramp}: give positive numbers of images.")
        self.half_life, self.ramp = half_life, ramp

    def decay(self, step: int, images: int) -> float:
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * step * images)
        return 0.5 ** (images / half_life) if half_life > 0 else 0.0


class PowerFunctionAveraging(Averaging):
    """EDM2's: weights after step t count in proportion to ``t^gamma`` (Karras et al. 2312.02696, section 3.1).

    The update after the n-th step, n from 1, has decay ``(1 - 1/n)^(gamma + 1)`` (eq. 127): the first takes the weights as they
    are.

    Args:
        sigma_rel: the profile's standard deviation as a share of the training so far, in (0, 0.2886]; the paper's: 0.05, 0.1.

    Attributes:
        gamma: the exponent, at least 0.
    """

    def __init__(self, sigma_rel: float = 0.1):
        if not 0 < sigma_rel <= 12**-0.5:
            raise ValueError(f"sigma_rel={sigma_rel}: give a number in (0, 0.2886]; at the end of it all steps count alike.")
        # sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (eq. 123), a cubic in gamma: its largest root (algorithm 2).
        ratio = sigma_rel**-2
        self.sigma_rel, self.gamma = sigma_rel, float(numpy.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())

    def decay(self, step: int, images: int) -> float:
        return (step / (step + 1)) ** (self.gamma + 1)


class CurriculumAveraging(Averaging):
    """``exp(s0 ln mu0 / (N(k) - 1))`` for the target of consistency training (Song et al. 2303.01469, appendix C).

    The 1 is taken off because the published code computes mu before it adds one to the number of points.

    Args:
        points: the curriculum N(k).
        start: s0, the intervals at the beginning, >= 1.
        value: mu0 in (0, 1): 0.9 on CIFAR-10, 0.95 elsewhere.
    """

    def __init__(self, points: Curriculum, start: int = 2, value: float = 0.9):
        if start < 1 or not 0 < value < 1:
            raise ValueError(f"start={start}, value={value}: give start >= 1 and a decay in (0, 1).")
        self.points, self.start, self.value = points, start, value

    def decay(self, step: int, images: int) -> float:
        return math.exp(self.start * math.log(self.value) / (self.points.points(step) - 1))


class EMA(nn.Module):
    """A copy of a module that follows it. The copy's weights are in ``state_dict``: a checkpoint without them fails to load.

    Parameters that are not trained are shared with the original, not copied.

    Args:
        module: what is averaged.
        averaging: the decay of each update.

    Attributes:
        outline: what `whole` is made of, once the copy is sharded.
    """

    module: Any
    outline: Outline | None = None

    def __init__(self, module: nn.Module, averaging: Averaging):
        super().__init__()
        self.module = still_copy(module)
        self.averaging = averaging

    def train(self, mode: bool = True) -> EMA:
        """The average is always in evaluation mode, except where a method asks its module otherwise."""
        return self

    def whole(self, wanted: bool) -> Any:
        """The averaged module with whole weights on a rank that ``wanted`` it, where every rank must ask; None on the others.

        It is the very module if that is not sharded, otherwise a copy on the CPU.
        """
        if self.outline is None:
            return self.module if wanted else None
        state = gathered(self.module.state_dict(), wanted)
        return self.outline.filled(state) if wanted else None

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, images: int, skipped: Tensor | None = None) -> None:
        """Moves towards ``module`` after optimiser step ``step`` (0-based) on ``images`` images of all ranks.

        ``skipped`` is a scalar bool tensor that, where true, leaves the average as it is (a skipped step), without asking the
        device for its value.
        """
        weight = 1 - self.averaging.decay(step, images)
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        own_pairs = [(local(average), local(value.detach())) for average, value in pairs if average is not value]
        if own_pairs:
            averages, values = zip(*own_pairs, strict=True)
            differences = torch._foreach_sub(values, averages)
            torch._foreach_mul_(differences, weight if skipped is None else weight * (~skipped))
            torch._foreach_add_(averages, differences)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other if skipped is None else torch.where(skipped, own, other))
