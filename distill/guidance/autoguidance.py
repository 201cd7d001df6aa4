"""Autoguidance (Karras et al. 2406.02507): a denoiser guided by a worse version of itself."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.frozen import Frozen
from distill.guidance.evaluations import Memory, Query, Some
from distill.guidance.two_evaluations import TwoEvaluationRule
from distill.pretrained import identity_of
from distill.types import Cond, Sample


class Autoguidance(TwoEvaluationRule, nn.Module):
    """``x0 = x0_guide + scale (x0 - x0_guide)``: away from what a smaller or less trained denoiser says (2406.02507, eq. 4).

    The guide is frozen. It moves with whoever holds this rule (a module, too), and is in no ``parameters()`` and no
    ``state_dict()``. It is another network: two forwards, of b rows and of those inside the interval.

    Args:
        guide: the worse denoiser, of the same samples; it may have another schedule. The paper's for EDM2-S is XS after a
            sixteenth of the training, scale 2.1.
        scale: as in `ClassifierFreeGuidance`.
        conditional: whether the guide sees the sample's conditions, as in the paper, or the null conditions (Kynkäänniemi et
            al. 2404.07724 guide EDM2-XXL so by XS). A guide without classes reads none either way.
        sigma_low, sigma_high: the interval of `TwoEvaluationRule`.

    Raises:
        ValueError: an empty interval; a guide of other samples or conditions.
    """

    def __init__(
        self,
        guide: Denoiser,
        scale: float | Tensor,
        conditional: bool = True,
        sigma_low: float | None = None,
        sigma_high: float | None = None,
    ):
        super().__init__()
        self.frozen, self.scale, self.conditional = Frozen(guide), scale, conditional
        self.sigma_low, self.sigma_high = sigma_low, sigma_high
        self.check_interval()

    @property
    def guide(self) -> Denoiser:
        """The worse denoiser."""
        return self.frozen.module

    @property
    def identity(self) -> dict[str, Any]:
        return {"guide": identity_of(self.guide)}

    def at(self, scale: float | Tensor) -> Autoguidance:
        """The same rule, by the same guide, at another scale."""
        same = copy.copy(self)  # the guide is not a copy
        same.scale = scale
        return same

    def check(self, denoiser: Denoiser, null: Cond) -> None:
        guide = self.guide
        for name in ("shape", "num_classes"):
            own, other = getattr(denoiser, name), getattr(guide, name)
            if own is not None and other is not None and own != other:
                raise ValueError(f"guidance.guide has {name}={other}, the denoiser {own}: give a guide of the same samples.")
        if unread := [f"{key}={width}" for key, width in guide.widths.items() if denoiser.widths.get(key) != width]:
            raise ValueError(f"guidance.guide reads {', '.join(unread)}, the denoiser {dict(denoiser.widths)}: give one alike.")
        if self.conditional or (guide.num_classes is None and not guide.widths):
            return
        if not null or (guide.num_classes is not None and not guide.null_class):
            raise ValueError("guidance.conditional=false: there is no null condition that the guide knows; set it to true.")

    def evaluate(
        self, denoiser: Denoiser, query: Query, null: Cond, rows: Tensor | None, memory: Memory | None
    ) -> tuple[Sample, Some]:
        x0, second = query.asked(denoiser), query
        if not self.conditional:
            second = Query(query.x, query.t, self.reference_conditions(denoiser, query, null, memory), query.r)
        if rows is not None and len(rows) == 0:
            return x0, x0[rows]
        if next(self.guide.parameters(), x0).device != x0.device:
            self.frozen.to(x0.device)  # its holder is no module (the settings of a fake score), and did not move it
        return x0, second.take(rows).asked(self.guide.under(denoiser.schedule)).to(x0.dtype)
