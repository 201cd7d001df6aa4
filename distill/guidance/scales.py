"""Guidance scales: ranges of them, draws from these, and a denoiser at a scale, whichever way it takes one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.denoiser import Denoiser
from distill.guidance.classifier_free import ClassifierFreeGuidance
from distill.guidance.rule import GuidanceRule
from distill.types import Cond, PerSample


def check_range(scales: Sequence[float], rule: GuidanceRule | None = None, key: str = "guidance_range") -> None:
    """Raises ValueError, naming ``key``, unless ``scales`` are two numbers with ``0 <= low < high`` that ``rule`` can have."""
    if len(scales) != 2 or not 0 <= scales[0] < scales[1]:
        raise ValueError(f"{key}={scales}: give 0 <= low < high, in the convention where 1 is no guidance.")
    if rule is not None:
        for scale in scales:
            rule.at(scale)


def draw_scales(scales: Sequence[float], count: int, device: torch.device | None = None) -> PerSample:
    """``(count,)`` guidance scales, float32, uniform in the range ``(low, high)``, from torch's generator of the device."""
    low, high = scales
    return low + (high - low) * torch.rand(count, device=device)


def guided(
    denoiser: Denoiser, cond: Cond, null: Cond, scale: float | Tensor, rule: GuidanceRule | None = None
) -> tuple[Denoiser, Cond]:
    """A denoiser and its conditions at a guidance scale.

    One that reads the condition ``guidance`` is given the scale and no rule; another is guided by ``rule`` at that scale.

    Args:
        denoiser, cond, null: what is guided, its conditions and its null conditions.
        scale: in the house convention, where 1 is none: a number, or one a sample ``(b,)``.
        rule: None for classifier-free guidance.
    """
    if "guidance" not in denoiser.scalar_inputs:
        return (ClassifierFreeGuidance(scale) if rule is None else rule.at(scale))(denoiser, null), cond
    if not isinstance(scale, Tensor):
        rows = next(iter(cond.values()))
        scale = torch.full((len(rows),), float(scale), device=rows.device)
    return denoiser, {**cond, "guidance": scale}
