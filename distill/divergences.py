"""f-divergences: what the distribution-matching gradient is weighted with (f-distill, Xu et al. 2502.15681).

    D_f(p || q) = E_{x ~ q} f(r(x)),   r = p / q,   p the data's law at a time, q that of the generator's samples x = G(z)

    grad_theta D_f = int (d q / d theta) (f(r) - r f'(r)) dx         since d(q f(p / q)) / dq = f(r) - r f'(r)
                   = E_z <grad_x (f(r) - r f'(r)), dx / d theta>      at x = G(z)
                   = E_z h(r) <score_q - score_p, dx / d theta>,      h(r) = r^2 f''(r)

by ``grad_x r = r (score_p - score_q)``. A factor on f is one on h, and goes out where h is divided by its mean over the batch;
h below is that of the f written beside it, which is the textbook's divergence times the constant that makes h plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from distill.types import PerSample

DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "softened_reverse_kl", "neyman", "squared_hellinger", "jeffreys"
]

RATIO_WEIGHTS: dict[DivergenceName, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,  # f = -log r: KL(q || p)
    "forward_kl": lambda r: r,  # f = r log r: KL(p || q)
    "jensen_shannon": lambda r: 1 - 1 / (1 + r),  # f = r log r - (r + 1) log((r + 1) / 2): 2 JS(p, q)
    "softened_reverse_kl": lambda r: 1 / (1 + r),  # f = (r + 1) log((r + 1) / (2 r)): 2 KL((p + q) / 2 || p)
    "neyman": lambda r: 1 / r,  # f = (r - 1)^2 / (2 r): int (p - q)^2 / (2 p)
    "squared_hellinger": lambda r: r.sqrt(),  # f = 2 (sqrt(r) - 1)^2: 4 H^2, H^2 = 1 - int sqrt(p q)
    "jeffreys": lambda r: 1 + r,  # f = (r - 1) log r: KL(p || q) + KL(q || p)
}
"""h(r) = r^2 f''(r) by divergence, for r > 0."""


class FDivergence(nn.Module):
    """Weights of the samples of a batch on the distribution-matching gradient, from their density ratios.

    With ``decay``, ratios are first divided by their running mean at like times, for a discriminator that is off by a factor at
    some of them. The means start at 1 and take in a batch before it is divided by them, as in FastGen; its decay is 0.5 on
    ImageNet-64, in 10 bins. The running means are over the batches of all ranks, that of the weights over this rank's alone.

    Args:
        name: the divergence; ``reverse_kl`` weights all samples alike.
        bins: bins of equal width over [0, 1] in which a running mean is kept, at least 1; read with ``decay``.
        decay: in [0, 1), what is kept of the running means at a batch; None for no division.

    Attributes:
        mean_ratios: the running means ``(bins,)``, part of checkpoints; there with ``decay`` alone.

    Raises:
        ValueError: settings out of range.
    """

    mean_ratios: Tensor

    def __init__(self, name: DivergenceName, bins: int = 10, decay: float | None = None):
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins={bins}: give at least 1.")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: give a number in [0, 1), or null for ratios as they are.")
        self.name, self.bins, self.decay = name, bins, decay
        if decay is not None:
            self.register_buffer("mean_ratios", torch.ones(bins))

    @torch.no_grad()
    def forward(self, ratio: PerSample, position: PerSample) -> PerSample:
        """``h(r) / mean h`` over the batch, ``(b,)`` without gradient.

        Args:
            ratio: p / q at each noisy sample, > 0; the caller bounds it (FastGen: to [0.1, 20]).
            position: the sample's time as a fraction of the schedule, in [0, 1]; read with ``decay``.
        """
        if self.decay is not None:
            ratio = ratio / self._update(ratio, position, self.decay)
        weights = RATIO_WEIGHTS[self.name](ratio)
        return weights / weights.mean()

    def _update(self, ratio: PerSample, position: PerSample, decay: float) -> PerSample:
        """The running mean ``(b,)`` of each sample's bin, with this batch of all ranks in it. All ranks must call it.

        A mean that is not finite changes nothing: an empty bin's, or that of a step that is skipped for it.
        """
        own = (position * self.bins).long().clamp(0, self.bins - 1)
        # a sum over a mask: torch.bincount waits for the device, and scattered sums are not the same twice on a GPU
        inside = own == torch.arange(self.bins, device=own.device)[:, None]
        totals = torch.stack([torch.where(inside, ratio, 0.0).sum(1), inside.sum(1).to(ratio.dtype)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        batch_mean = totals[0] / totals[1]
        moved = decay * self.mean_ratios + (1 - decay) * batch_mean
        self.mean_ratios.copy_(torch.where(batch_mean.isfinite(), moved, self.mean_ratios))
        return self.mean_ratios[own]
