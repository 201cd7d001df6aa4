"""The words that every layer shares: a batch, its conditions, its losses and the shapes of tensors.

Shapes are written once, here, and used in every public signature. A *sample* has any shape after the batch
dimension, ``(b, c, h, w)`` for images and latents; a *time* is one number a sample, ``(b,)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

    A data module delivers pixels and prompts, or what they were encoded to beforehand; a method's losses always see a batch
    in model space (`distill.space.ModelSpace` has encoded it).

    Attributes:
        x0: clean data ``(b, *shape)``, or None for a stream without data (prompts alone).
        cond: conditions of the samples.
        null: the conditions that mean "no condition", same keys and shapes as ``cond``; empty if there are none.
        noise: the unit noise ``(b, *shape)`` paired with ``x0``, or None when noise is drawn freely.
        prompts: texts that a conditioner has yet to turn into conditions, or None.
        encoded: whether ``x0`` is in model space already (a precomputed latent) rather than pixels in [-1, 1].
        time: times ``(b,)`` of points of a teacher's trajectories, in its own schedule, or None when times are drawn freely.
            ``x0`` is then what the guided teacher predicted at the point ``x_t = alpha x0 + sigma noise``.
    """

    x0: Tensor | None
    cond: Cond
    null: Cond
    noise: Tensor | None = None
    prompts: list[str] | None = None
    encoded: bool = False
    time: Tensor | None = None

    def __len__(self) -> int:
        """Samples in the batch. Raises ValueError for one of nothing."""
        columns = [self.x0, self.noise, self.prompts, *self.cond.values()]
        sizes = [len(column) for column in columns if column is not None]
        if not sizes:
            raise ValueError("a batch without samples, noise, prompts or conditions has no size: deliver one of these.")
        return sizes[0]


@dataclass(frozen=True)
class DataSpec:
    """What a data module delivers, so that a network that does not fit is refused before any work is done.

    Attributes:
        shape: shape of one sample as delivered, ``(c, h, w)``: pixels, or a latent if ``codec`` says what encoded it.
        num_classes: number of classes, or None if the samples carry no label.
        prompts: whether batches carry texts.
        widths: size of the last dimension of each condition that is delivered encoded, e.g. ``{"prompt_embeds": 768}``.
        codec: sha256 of the codec that the delivered latents were made by, or None for pixels.
        conditioner: sha256 of the conditioner that the delivered conditions were made by, or None.
        paired: whether batches carry the noise that ``x0`` belongs to.
        teacher: sha256 of the teacher whose pairs or trajectories these are, or None.
        guidance_range: of the guidance scales that were drawn for these, ``(low, high)``, or None.
        trajectories: whether batches are points of a guided teacher's trajectories (`Batch.time`) rather than data.
    """

    shape: tuple[int, ...]
    num_classes: int | None = None
    prompts: bool = False
    widths: dict[str, int] = field(default_factory=dict)
    codec: str | None = None
    conditioner: str | None = None
    paired: bool = False
    teacher: str | None = None
    guidance_range: tuple[float, float] | None = None
    trajectories: bool = False


def label_conditions(labels: Labels, num_classes: int) -> tuple[Cond, Cond]:
    """Conditions and null conditions of class labels ``(b,)`` in ``0..num_classes-1``; the null class is ``num_classes``."""
    return {"labels": labels}, {"labels": labels.new_full(labels.shape, num_classes)}
