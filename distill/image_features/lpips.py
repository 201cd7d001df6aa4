"""Features whose squared distance is the learned perceptual distance (LPIPS, Zhang et al. 1801.03924)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from distill import hub
from distill.distances import LPIPS
from distill.image_features.base import Features, Images, PretrainedFeatures
from distill.image_features.preprocessing import Preprocessing


class LpipsFeatures(PretrainedFeatures):
    """The layers that LPIPS compares: of unit length over channels at each place, times the roots of its weights.

    Whole, the layers are divided by the root of their number of places, and then ``|f(a) - f(b)|^2`` is LPIPS (equation 1 of
    the paper); of a 224x224 image these are millions of numbers. Pooled, they are averaged over places: some 1,500 numbers
    (of vgg), which say what textures there are and not where, and a squared distance of at most LPIPS.

    Args:
        weights: file of the torchvision backbone's state dict, see `distill.distances.LPIPS`.
        net: ``vgg``, ``alex`` or ``squeeze``; must be the backbone of ``weights``.
        size: images smaller than this are enlarged to it bilinearly.
        pooled: whether layers are averaged over places.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another backbone.
    """

    name = "lpips"

    def __init__(self, weights: str, net: Literal["vgg", "alex", "squeeze"] = "vgg", size: int = 224, pooled: bool = True):
        file = self.locate(weights, net)
        network = LPIPS(weights, net, size).model.module
        identity = {"path": weights, "sha256": hub.content_hash(file.parent, [file.name])}
        reading = f"layers of LPIPS ({net}), normalised and weighted{', averaged over places' if pooled else ''}"
        super().__init__(network, Preprocessing(3, size, "bilinear", smaller_only=True), reading, identity)
        self.pooled = pooled

    @staticmethod
    def locate(weights: str, net: str = "vgg") -> Path:
        """The backbone's file. Raises FileNotFoundError if it is not there; nothing is downloaded."""
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"weights={weights!r}: there is no such file; save torchvision's state dict of the {net} backbone there "
                "(torchvision.models names the file and its address)."
            )
        return Path(weights)

    def extract(self, images: Images) -> Features:
        network = self.network.module
        layers = network.net(network.scaling_layer(images))
        return torch.cat([self._weighted(layer, head.model[-1].weight) for layer, head in zip(layers, network.lins)], dim=1)

    def _weighted(self, layer: Float[Tensor, "b c h w"], weights: Float[Tensor, "1 c 1 1"]) -> Features:
        # bounded below inside the root: where a layer is 0 its direction is 0, with gradient 0 and not NaN
        layer = layer * layer.square().sum(1, keepdim=True).clamp(min=1e-20).rsqrt() * weights.sqrt()
        return layer.mean((2, 3)) if self.pooled else layer.flatten(1) / (layer.shape[2] * layer.shape[3]) ** 0.5
