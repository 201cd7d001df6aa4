"""Features of the Inception network of the Fréchet inception distance (Heusel et al. 1706.08500), from either published file.

The weights are those of TensorFlow's inception-2015-12-05, a network that torchvision's Inception is not.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from distill import hub
from distill.image_features.base import Features, Images, PretrainedFeatures
from distill.image_features.preprocessing import Preprocessing

SIZE = 299
MIDDLE = (128 / 255,)
"""Mean and standard deviation: the network reads ``(v - 128) / 128`` of values v in 0..255."""
SCRIPT_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
STATE_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class InceptionFeatures(PretrainedFeatures):
    """The 2,048 pooled features; of images that are whole bytes, those that the Fréchet inception distance compares.

    Args:
        path: ``inception-2015-12-05.pt``, the TorchScript file of StyleGAN and clean-fid, or torch-fidelity's (and
            pytorch-fid's) state dict ``...-6726825d.pth``; which of them is seen from the file.
        resize: ``tensorflow``, as the distance is defined and torch-fidelity resizes; ``bicubic`` with antialiasing, which is
            clean-fid's (Parmar et al. 2104.11222) but for its clipping to 0..255 afterwards; ``bilinear``, torch's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of neither kind, or one through which no gradients pass.
    """

    name = "inception"

    def __init__(self, path: str, resize: Literal["tensorflow", "bicubic", "bilinear"] = "tensorflow"):
        identity = {"path": path, "sha256": "unread"}
        if hub.reads_weights():
            file = self.locate(path)
            network = _load_script(path) if is_script(file) else _Layers(load_torch_fidelity(path, "2048"))
            identity["sha256"] = hub.content_hash(file.parent, [file.name])
        else:
            network = _described()
        preprocessing = Preprocessing(3, SIZE, resize, antialias=resize == "bicubic", mean=MIDDLE, std=MIDDLE)
        super().__init__(network, preprocessing, "2048 pooled features of the FID's Inception network", identity)

    @staticmethod
    def locate(path: str) -> Path:
        """The file. Raises FileNotFoundError if it is not there; nothing is downloaded."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"path={path!r}: there is no such file; save {SCRIPT_URL} (TorchScript) or {STATE_URL} (a state dict) there."
            )
        return Path(path)

    def extract(self, images: Images) -> Features:
        return self.network(images)


class _Script(nn.Module):
    """The layers of the TorchScript file, without the resize and normalisation in it: those are declared as preprocessing."""

    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        # operator by operator: TorchScript's own differentiation is compiled anew for each shape, and is not autograd's
        with torch.jit.optimized_execution(False):
            return self.script.layers(images).flatten(1)


class _Layers(nn.Module):
    """The layers of torch-fidelity's network up to the pooling; its own ``forward`` takes bytes, which have no gradient."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*(layer for name, layer in network.named_children() if name != "fc"))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)


def _described() -> nn.Module:
    """A network of the same sizes without weights: torchvision's, whose pooling alone is another."""
    from torchvision.models import inception_v3

    with hub.built_on():
        network = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    network.fc = nn.Identity()
    return network


def is_script(file: Path) -> bool:
    """Whether it is a TorchScript archive, which holds its code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _load_script(path: str) -> nn.Module:
    script = torch.jit.load(path, map_location="cpu").eval()
    if not hasattr(script, "layers"):
        raise ValueError(f"path={path!r}: a TorchScript file without `layers`; save {SCRIPT_URL} there.")
    network = _Script(script)
    probe = torch.zeros(1, 3, SIZE, SIZE, requires_grad=True)
    if not network(probe).requires_grad:
        raise ValueError(f"path={path!r}: no gradients pass through this TorchScript file; save {STATE_URL} there instead.")
    return network


def load_torch_fidelity(path: str, output: str) -> nn.Module:
    """torch-fidelity's network, which takes bytes ``(b, 3, h, w)``, for one of its outputs: ``2048``, ``logits_unbiased`` ...

    Raises:
        ValueError: a file that is no state dict of it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        # refuses pickled code: torch-fidelity, which reads the file next, does not
        torch.load(path, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3("inception", [output], feature_extractor_weights_path=path)
    except Exception as error:  # of the unpickler, or keys and shapes of another network
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"path={path!r}: no state dict of the FID's Inception ({reason}); save {STATE_URL} there.") from error
