"""The FID's Inception network by the protocols that published figures have: clean-fid's, and torch-fidelity's, the older one.

The protocols differ in how images come to 299x299 pixels; clean-fid's resize and torch-fidelity's network are those of the
packages, so that features are theirs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from distill import hub
from distill.frozen import Frozen
from distill.image_features.inception import STATE_URL, InceptionFeatures, load_torch_fidelity
from distill.metrics.features import FeatureExtractor, quantize, to_uint8

Images = Float[Tensor, "b c h w"]
FEATURES, LOGITS = "2048", "logits_unbiased"


class CleanFeatures(nn.Module, FeatureExtractor):
    """The 2,048 pooled features under clean-fid's protocol (Parmar et al. 2104.11222), resized by the package itself.

    Args:
        path: ``inception-2015-12-05.pt``; torch-fidelity's file, of the same weights, does as well.

    Raises:
        FileNotFoundError, ValueError: see `InceptionFeatures`.
    """

    name = "clean"

    def __init__(self, path: str):
        from cleanfid.resize import build_resizer

        super().__init__()
        self.network = InceptionFeatures(path)  # of which the layers are used, not the resize
        self.resizer, self.identity = build_resizer("clean"), self.network.identity
        self.protocol = (
            f"2048 pooled features of the FID's Inception network, weights of sha256 {self.identity['sha256']}; of bytes "
            "0..255, one channel repeated to 3, resized to 299x299 by clean-fid's mode clean (Pillow's bicubic of float32, "
            "clipped to 0..255, not rounded), (v - 128) / 128; float64"
        )

    def resized(self, images: Images) -> Float[Tensor, "b 3 299 299"]:
        """Bytes as clean-fid's network is given them: float32, 0..255."""
        pixels = quantize(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor() as threads:  # Pillow computes outside Python's lock
            arrays = list(threads.map(self.resizer, pixels))
        return torch.stack([torch.from_numpy(array) for array in arrays]).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def forward(self, images: Images) -> Float64[Tensor, "b d"]:
        """Features of images in [-1, 1] ``(b, 1 or 3, h, w)``."""
        prepared = self.resized(images).to(images.device)
        return self.network.extract((prepared - 128) / 128).double()


class LegacyFeatures(nn.Module, FeatureExtractor):
    """Features or logits of torch-fidelity's network, which resizes as TensorFlow 1 did (Heusel et al. 1706.08500).

    Args:
        path: ``weights-inception-2015-12-05-6726825d.pth``.
        output: ``2048``, the pooled features, or ``logits_unbiased``, what the Inception score is of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind.
    """

    name = "legacy"

    def __init__(self, path: str, output: str = FEATURES):
        super().__init__()
        if not (file := Path(path)).is_file():
            wanted = f"save {STATE_URL} (a state dict) there, or give another"
            raise FileNotFoundError(f"path={path!r}: there is no such file; {wanted}.")
        self.network = Frozen(load_torch_fidelity(path, output))
        self.identity = {"path": path, "sha256": hub.content_hash(file.parent, [file.name])}
        self.protocol = (
            f"{output} of torch-fidelity's Inception network, weights of sha256 {self.identity['sha256']}; of bytes 0..255, "
            "one channel repeated to 3, resized to 299x299 as TensorFlow 1 did, (v - 128) / 128; float64"
        )

    @torch.no_grad()
    def forward(self, images: Images) -> Float64[Tensor, "b d"]:
        """Features of images in [-1, 1] ``(b, 1 or 3, h, w)``."""
        return self.network(to_uint8(images).expand(-1, 3, -1, -1).contiguous())[0].double()
