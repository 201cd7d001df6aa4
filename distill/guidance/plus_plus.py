"""CFG++ (Chung et al. 2406.08070): guided samples, unguided noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distill.guidance.two_evaluations import TwoEvaluationRule


@dataclass
class CfgPlusPlus(TwoEvaluationRule):
    """DDIM's step by the guided ``x0`` and the null prediction's noise (2406.08070, algorithm 2):

        x0 = x0_null + scale (x0_cond - x0_null),   x_s = alpha_s x0 + sigma_s eps_null

    Only a solver that steps by both can follow it: `DDIM` does, the others refuse. ``x0`` is linear in the predictions, hence
    the same whatever type the scale is applied to.

    Attributes:
        scale: the paper's lambda, in [0, 1], a number, or one a sample ``(b,)``: 0 is the null condition; 1 is the condition's
            ``x0`` but not its noise. 0.6 is about what scale 7.5 is for classifier-free guidance.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`; outside of it both are the condition's.

    Raises:
        ValueError: a number outside of [0, 1], or an empty interval.
    """

    scale: float | Tensor
    sigma_low: float | None = None
    sigma_high: float | None = None

    own_noise = True
    unguided_at_1 = False

    def __post_init__(self) -> None:
        self.check_interval()
        if not isinstance(self.scale, Tensor) and not 0 <= self.scale <= 1:
            raise ValueError(f"scale={self.scale}: CfgPlusPlus interpolates; give a number in [0, 1], e.g. 0.6.")
