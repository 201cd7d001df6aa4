"""The words that every layer shares: a batch, its conditions, its losses and the shapes of tensors.

Shapes are written once, here, and used in every public signature. A *sample* has any shape after the batch
dimension, ``(b, c, h, w)`` for images and latents; a *time* is one number a sample, ``(b,)``.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

Sample = Float[Tensor, "b *shape"]
Time = Float[Tensor, " b"]
PerSample = Float[Tensor, " b"]
Labels = Int[Tensor, " b"]

Cond = dict[str, Tensor]
"""Conditions of a batch by name (``labels``, ``prompt_embeds``, ``guidance`` ...), each with the batch dimension first."""

Losses = dict[str, Tensor]
"""Scalar losses by name; ``loss`` is the one that is minimised, the others are logged."""


@dataclass
class Batch:
    """One batch of training data on one rank. Not frozen: Lightning cannot move a frozen dataclass between devices.

    Attributes:
        x0: clean data ``(b, *shape)``, or None for a stream without data (prompts alone).
        cond: conditions of the samples.
        null: the conditions that mean "no condition", same keys and shapes as ``cond``; empty if there are none.
        noise: the unit noise ``(b, *shape)`` paired with ``x0``, or None when noise is drawn freely.
    """

    x0: Tensor | None
    cond: Cond
    null: Cond
    noise: Tensor | None = None

    def __len__(self) -> int:
        """Samples in the batch."""
        tensors = [self.x0, self.noise, *self.cond.values()]
        return next(len(tensor) for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class DataSpec:
    """What a data module delivers, so that a network that does not fit is refused before any work is done.

    Attributes:
        shape: shape of one sample, ``(c, h, w)``.
        num_classes: number of classes, or None if the samples carry no label.
    """

    shape: tuple[int, ...]
    num_classes: int | None = None


def label_conditions(labels: Labels, num_classes: int) -> tuple[Cond, Cond]:
    """Conditions and null conditions of class labels ``(b,)`` in ``0..num_classes-1``; the null class is ``num_classes``."""
    return {"labels": labels}, {"labels": labels.new_full(labels.shape, num_classes)}
