"""The contract of guidance rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.types import Cond


class GuidanceRule(ABC):
    """``rule(denoiser, null)`` is a denoiser that is guided away from ``null``, or from whatever else the rule says."""

    own_noise = False
    """Whether what it guides goes on with another noise than its x0 leaves: a solver must step by both."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, null: Cond) -> Denoiser:
        """The guided denoiser; ``null`` has the keys and shapes of its conditions will have, or one row for all."""

    def drawn(self, device: torch.device) -> GuidanceRule:
        """The rule of one batch: itself, unless something in it is random."""
        return self

    def at(self, scale: float | Tensor) -> GuidanceRule:
        """The same rule at another scale: a number, or one a sample ``(b,)``. Raises ValueError if it has none to set."""
        raise ValueError(f"guidance={type(self).__name__}: this rule has no scale to set; give another rule.")

    @property
    def identity(self) -> dict[str, Any]:
        """Name, path and hash of each further network that the rule calls, as a checkpoint keeps them; none by default."""
        return {}
