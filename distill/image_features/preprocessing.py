"""What is done to images before a network sees them: size, range and normalisation, declared as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

Images = Float[Tensor, "b c h w"]
Prepared = Float[Tensor, "b channels height width"]
Resize = Literal["bilinear", "bicubic", "tensorflow"]


@dataclass(frozen=True)
class Preprocessing:
    """Images in [-1, 1] as a network expects them: channels, size, normalisation, in this order, and no clamping.

    Attributes:
        channels: of the network; one channel is repeated to as many.
        size: height and width.
        resize: torch's ``bilinear`` or ``bicubic`` interpolation, or ``tensorflow``: TensorFlow 1's bilinear one, whose
            pixel i of n out of m lies at ``i m / n``, without half-pixel centres (the FID network's own). None: images must
            have the size already.
        antialias: of torch's interpolations; a bicubic one is then Pillow's (a = -0.5), also where images are enlarged.
        smaller_only: whether images of at least the size are left as they are.
        mean, std: of a channel, or of each, of images in [0, 1]; a mean and std of 0.5 leave [-1, 1].
    """

    channels: int
    size: int
    resize: Resize | None = None
    antialias: bool = False
    smaller_only: bool = False
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __call__(self, images: Images) -> Prepared:
        """Differentiable. Raises ValueError for a number of channels, or a size that is not resized, of another network."""
        if images.shape[1] not in (1, self.channels):
            raise ValueError(f"images of {images.shape[1]} channels: the features read {self.channels}, or 1 that is repeated.")
        images = self._resized(images.expand(-1, self.channels, -1, -1))
        mean, std = (_column(values, images) for values in (self.mean, self.std))
        return (images - (2 * mean - 1)) / (2 * std)

    def _resized(self, images: Images) -> Prepared:
        sides, target = tuple(images.shape[-2:]), (self.size, self.size)
        if sides == target or (self.smaller_only and min(sides) >= self.size):
            return images
        if self.resize is None:
            raise ValueError(f"images of {sides[0]}x{sides[1]} pixels: the features read {self.size}x{self.size}, not resized.")
        if self.resize == "tensorflow":
            rows, columns = (_tensorflow_weights(side, self.size, images.device).to(images.dtype) for side in sides)
            return rows @ images @ columns.T
        return interpolate(images, target, mode=self.resize, align_corners=False, antialias=self.antialias)

    def describe(self) -> str:
        """These settings in words."""
        size = f"{self.size}x{self.size}"
        if self.resize is None:
            resized = f"of {size} pixels"
        else:
            which = "those below it enlarged" if self.smaller_only else "resized"
            how = {"tensorflow": "TensorFlow 1's bilinear interpolation (no half-pixel centres)"}.get(self.resize, self.resize)
            resized = f"{which} to {size} ({how}{', antialiased' if self.antialias else ''})"
        mean, std = ("/".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return (
            f"images in [-1, 1], not clamped, {resized}, one channel repeated to {self.channels}; of x in [0, 1] "
            f"(x - {mean}) / {std}"
        )


def _column(values: tuple[float, ...], like: Tensor) -> Float[Tensor, "k 1 1"]:
    """Numbers as a tensor, filled in where it is used: one made of a list would be copied to a device, which waits for it."""
    return torch.cat([torch.full((1, 1, 1), value, dtype=like.dtype, device=like.device) for value in values])


def _tensorflow_weights(before: int, after: int, device: torch.device) -> Float[Tensor, "after before"]:
    """The share of each of ``before`` pixels in each of ``after``; float64."""
    # the positions in float32, as TensorFlow has them: else a pixel at a whole number may fall on its other side
    places = torch.arange(after, dtype=torch.float32, device=device) * torch.tensor(before / after, dtype=torch.float32)
    low = places.long()
    share = (places - low).double()[:, None]
    identity = torch.eye(before, dtype=torch.float64, device=device)
    return identity[low] * (1 - share) + identity[(low + 1).clamp(max=before - 1)] * share
