"""Adaptive projected guidance (APG, Sadat et al. 2410.02416, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.guidance.evaluations import Evaluations, Some
from distill.guidance.two_evaluations import TwoEvaluationRule


@dataclass
class AdaptiveProjectedGuidance(TwoEvaluationRule):
    """Guides by the difference of conditional and null ``x0``, without the part of it that saturates.

        d = x0_cond - x0_null,   m <- d + momentum m,   d = m min(1, norm_threshold / |m|)
        x0 = x0_cond + (scale - 1) (d_orthogonal + eta d_parallel)

    parallel and orthogonal to ``x0_cond``; norms and products run over a sample's elements. In clean samples, as in the paper:
    what is parallel to a prediction of noise is another thing. With ``eta=1``, no threshold and no momentum it is
    classifier-free guidance.

    Attributes:
        scale: as in `ClassifierFreeGuidance`.
        eta: share of the parallel part; 0 in the paper.
        norm_threshold: r, > 0, which grows with the samples' size: 2.5 for EDM2-S, 5 for DiT-XL/2, 7.5 for Stable Diffusion
            2.1, 15 for SDXL; None for no bound.
        momentum: in (-1, 1), negative in the paper (-0.75 or -0.5). It is of the evaluations of one trajectory, begins anew
            with each, and where there is none (a teacher at a random time) it is not used.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`; evaluations outside leave ``m`` as it is.

    Raises:
        ValueError: a value outside of these ranges.
    """

    scale: float | Tensor
    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = -0.5
    sigma_low: float | None = None
    sigma_high: float | None = None

    def __post_init__(self) -> None:
        self.check_interval()
        if self.norm_threshold is not None and self.norm_threshold <= 0:
            raise ValueError(f"norm_threshold={self.norm_threshold}: give a positive norm, or null for no bound.")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: give a number in (-1, 1), 0 for none; larger ones grow without bound.")

    def combine(self, both: Evaluations) -> Some:
        shift = both.x0 - both.reference
        if self.momentum and both.memory is not None:
            shift = shift + self.momentum * both.recall("shift", torch.zeros_like(shift))
            both.keep("shift", shift)
        elements = tuple(range(1, shift.dim()))
        if self.norm_threshold is not None:
            norm = torch.linalg.vector_norm(shift, dim=elements, keepdim=True).clamp(min=1e-12)
            shift = shift * (self.norm_threshold / norm).clamp(max=1)
        square = both.x0.square().sum(elements, keepdim=True).clamp(min=1e-24)
        parallel = (shift * both.x0).sum(elements, keepdim=True) / square * both.x0
        return both.x0 + (both.scale - 1) * (shift + (self.eta - 1) * parallel)
