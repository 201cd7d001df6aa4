"""What an image is reduced to before two sets are compared, and the one conversion of images to bytes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from distill.image_features import ImageFeatures

Images = Float[Tensor, "b c h w"]


def quantize(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Images in [-1, 1] as whole numbers 0..255, still floating: ``round(127.5 x + 127.5)``, clamped. NaN stays NaN."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Images in [-1, 1] as bytes, -1 as 0 and 1 as 255; what lies outside is clamped.

    Raises:
        ValueError: a value is not finite, and no byte stands for it.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).sum())
        raise ValueError(f"{bad} of {images.numel()} values of the images are not finite: the network has diverged.")
    return quantize(images).to(torch.uint8)


def from_uint8(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes as images in [-1, 1], float32; `to_uint8` gives the same bytes back."""
    return images.float().div(127.5).sub(1)


class FeatureExtractor(ABC):
    """Maps images to vectors.

    Attributes:
        name: of the features, in the names of metrics.
        protocol: one sentence from which the features could be computed again; figures with other protocols do not compare.
    """

    name: str
    protocol: str

    @property
    def hash(self) -> str:
        """sha256 of the protocol, in hexadecimal digits."""
        return hashlib.sha256(self.protocol.encode()).hexdigest()

    @abstractmethod
    def __call__(self, images: Images) -> Float64[Tensor, "b d"]:
        """Features of images in [-1, 1]."""


class PixelFeatures(FeatureExtractor):
    """The pixels themselves, as they are after saving to bytes, so that figures in training equal those of saved samples."""

    name = "pixels"
    protocol = "pixels: bytes round(127.5 x + 127.5) of x in [-1, 1], half to even, clamped to 0..255; over 255; flat; float64"

    def __call__(self, images: Images) -> Float64[Tensor, "b d"]:
        """Pixels in [0, 1], ``d = c h w``. NaN stays NaN."""
        return quantize(images).double().div(255).flatten(1)


class NetworkFeatures(nn.Module, FeatureExtractor):
    """Features of a network, for measuring: of images as they are after saving to bytes, in float64, without gradients.

    Args:
        features: the network's.

    Attributes:
        identity: of its weights.
    """

    def __init__(self, features: ImageFeatures):
        super().__init__()
        self.features, self.name, self.identity = features, features.name, features.identity
        self.protocol = f"{features.protocol}; of images rounded to bytes 0..255, clamped; float64"

    @torch.no_grad()
    def forward(self, images: Images) -> Float64[Tensor, "b d"]:
        """Features ``(b, d)``. A row with an image that is not finite is NaN."""
        return self.features(quantize(images).div(127.5).sub(1)).double()
