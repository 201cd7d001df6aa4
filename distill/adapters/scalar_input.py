"""An extra scalar input of an existing network, added to what its time embedding is made of, zero at first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distill.types import Time

SECOND_TIME = "r"
"""The name of the scalar input that is not a condition, but the second time of a call."""


def sinusoid(value: Time, dimension: int) -> Tensor:
    """Sines then cosines of ``value`` ``(b,)`` at frequencies ``10000^(-j / (dimension/2 - 1))``: ``(b, dimension)``."""
    half = dimension // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=value.device) / (half - 1))
    angles = value.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ScalarInput(nn.Module):
    """One more scalar in a network's time embedding: ``MLP(time + W sinusoid(1000 (value - origin)))``, W zero at first.

    Where latent consistency models put the guidance scale (Luo et al. 2310.04378, diffusers' ``time_cond_proj_dim``; Meng et
    al. 2210.03142 embed it alike), but with a zero-initialised ``W``, so that the student starts as its teacher.

    Args:
        embedding: the time embedding's MLP, whose input is ``(b, width)``; it is hooked, its keys do not change.
        width: size of that input.
        origin: the value that is embedded as 0 (1 for a guidance scale: LCM embeds ``scale - 1``).
        dimension: number of sines and cosines.
    """

    def __init__(self, embedding: nn.Module, width: int, origin: float = 0.0, dimension: int = 256):
        super().__init__()
        self.origin, self.dimension = origin, dimension
        self.projection = nn.Linear(dimension, width, bias=False)
        nn.init.zeros_(self.projection.weight)
        self.value: Time | None = None
        self.add_to(embedding)

    def add_to(self, embedding: nn.Module) -> None:
        """Hooks a further embedding of times: some networks have one in each block."""
        # A bound method, not a closure: a deep copy of the network then hooks the copy's own scalar input.
        embedding.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.value is None:
            raise ValueError("The network has an extra scalar input and was called without a value for it.")
        own = self.projection(sinusoid(1000 * (self.value - self.origin), self.dimension).to(self.projection.weight.dtype))
        return (inputs[0] + own.to(inputs[0].dtype), *inputs[1:])


class SecondTime(ScalarInput):
    """The time at which a jump ends, in the embedding of the time at which it starts; without effect at first.

    What is embedded is ``u_r`` or ``u_t - u_r`` (a stride), with u the share of the way from the schedule's least network time
    to its greatest: the ``1000 s`` and ``1000 (t - s)`` of inductive moment matching (Zhou et al. 2503.07565) where network
    times are 0 to 1000, and numbers of that size for EDM's ``ln(sigma) / 4``, whose own are not.

    Attributes:
        combination: ``(3,)``; the value is ``combination . (time, r, 1)``. Saved with the weights, so that whoever loads them
            embeds what they were trained on.
    """

    combination: Tensor

    def __init__(self, embedding: nn.Module, width: int):
        super().__init__(embedding, width)
        self.register_buffer("combination", torch.tensor([0.0, 1.0, 0.0]))

    def describe(self, low: float, high: float, stride: bool) -> None:
        """Says what the network times ``low < high`` at the ends of the schedule are, and whether a stride is embedded."""
        span = high - low
        values = [1 / span, -1 / span, 0.0] if stride else [0.0, 1 / span, -low / span]
        self.combination.copy_(torch.tensor(values))

    def read(self, time: Time, r: Time) -> None:
        """Takes the network times ``(b,)`` of the next call."""
        of_time, of_r, constant = self.combination.unbind()
        self.value = of_time * time + of_r * r + constant
