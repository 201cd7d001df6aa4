"""Chains of denoiser calls that are differentiated as a whole: a call's activations are computed again when needed."""

from __future__ import annotations

from torch.utils.checkpoint import checkpoint

from distill.denoiser import Denoiser, FreshNoise, refuse_own_noise
from distill.types import Cond, Sample, Time


class CheckpointedDenoiser(Denoiser):
    """A denoiser whose calls keep their arguments alone, and are made again in the backward pass (Chen et al. 1604.06174).

    A sampler's chain of k calls then holds k samples and the activations of one call, at the cost of one more forward each.
    The second forward draws the same dropout masks as the first. Guidance rules go around it, so that what they remember or
    draw along a trajectory is remembered and drawn once.

    Args:
        inner: the denoiser. It is not named ``base``: rules that put hooks on the network for the time of a call
            (`TimeStepGuidance`) look for it there, and the second forward would run without them.

    Raises:
        ValueError: a denoiser that goes on with a noise of its own.
    """

    def __init__(self, inner: Denoiser):
        super().__init__()
        refuse_own_noise(self, inner)
        self.inner = inner
        self.describe_as(inner)

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        return checkpoint(self.inner, x, t, cond, r, use_reentrant=False, preserve_rng_state=True)

    def trajectory(self, fresh: FreshNoise) -> Denoiser:
        inner = self.inner.trajectory(fresh)
        return self if inner is self.inner else CheckpointedDenoiser(inner)
