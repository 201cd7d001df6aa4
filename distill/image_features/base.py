"""What every extractor of features shares: a frozen network behind declared preprocessing, differentiable in the images."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.frozen import Frozen
from distill.image_features.preprocessing import Preprocessing

Images = Float[Tensor, "b c h w"]
Features = Float[Tensor, "b d"]


class ImageFeatures(nn.Module, ABC):
    """Maps images to vectors, with gradients in the images. Nothing in it is trained or saved.

    Attributes:
        name: of the kind of features, in the names of metrics.
        protocol: one sentence from which the features could be computed again; figures with other protocols do not compare.
        identity: ``path`` and ``sha256`` of the weights, and of a hub repository ``revision``.
    """

    name: str
    protocol: str
    identity: dict[str, str]

    @abstractmethod
    def forward(self, images: Images) -> Features:
        """Features ``(b, d)``, float32 or wider, of images in [-1, 1]; values outside, which generators make, stay there."""


class PretrainedFeatures(ImageFeatures):
    """Features of a network that was read from a file: `extract` is all that is left to say.

    Args:
        network: is frozen.
        preprocessing: what is done to images in [-1, 1] first.
        reading: what is read of the network, in words for the protocol.
        identity: of the weights.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, reading: str, identity: dict[str, str]):
        super().__init__()
        self.network, self.preprocessing, self.identity = Frozen(network), preprocessing, identity
        self.protocol = f"{reading}, weights of sha256 {identity['sha256']}; {preprocessing.describe()}"

    @abstractmethod
    def extract(self, images: Images) -> Features:
        """Features of images after the preprocessing, in the precision of the network."""

    def forward(self, images: Images) -> Features:
        # Squares and products of features lose too much in half precision, and so do gradients through so many layers.
        with torch.autocast(images.device.type, enabled=False):
            dtype = next((parameter.dtype for parameter in self.network.module.parameters()), torch.float32)
            return self.extract(self.preprocessing(images.to(dtype)))
