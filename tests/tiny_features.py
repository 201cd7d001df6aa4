"""Tiny networks of the classes that features are published of, in the files that these are published in."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import tiny_text
import torch
from torch import Tensor, nn

from distill.classifier import ConvClassifier


class Script(nn.Module):
    """What the TorchScript file of the FID looks like from outside: 2,048 pooled features of ``layers``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 2048, 3, stride=60), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return self.layers((x - 128) / 128).flatten(1)


def inception_script(folder: Path) -> Path:
    """``inception-2015-12-05.pt``."""
    torch.manual_seed(0)
    torch.jit.script(Script().eval()).save(str(folder / "inception-2015-12-05.pt"))
    return folder / "inception-2015-12-05.pt"


def inception_state(folder: Path) -> Path:
    """The state dict of torch-fidelity's network, of full size, with random weights that keep the size of features."""
    from torch_fidelity import feature_extractor_inceptionv3 as package

    torch.manual_seed(1)
    extractor = package.FeatureExtractorInceptionV3
    with patch.object(package, "load_state_dict_from_url"), patch.object(extractor, "load_state_dict"):
        state = extractor("inception", ["2048"]).state_dict()
    state = {name: value * 6**0.5 if name.endswith("conv.weight") else value for name, value in state.items()}
    torch.save(state, folder / "state.pth")
    return folder / "state.pth"


def clip(folder: Path) -> Path:
    """A whole CLIP for 16x16 pixels, text tower included."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(3)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=6)).save_pretrained(folder / "clip")
    return folder / "clip"


def clip_with_words(folder: Path) -> Path:
    """A whole CLIP for 16x16 pixels that reads `tiny_text`'s words, with its tokenizer: prompts of up to 16 tokens."""
    from transformers import CLIPConfig, CLIPModel

    words = tiny_text.clip_tokenizer(folder, "clip")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {**small, **ends, "vocab_size": len(words), "max_position_embeddings": tiny_text.CLIP_LENGTH}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    for seed, size in ((None, 0.1), (2, 0.3)):  # by which some cosines are positive, some negative
        if seed is not None:
            torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += size * torch.randn_like(parameter)
    model.save_pretrained(folder / "clip")
    return folder / "clip"


def dino(folder: Path) -> Path:
    """A DINOv2 of two layers."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(4)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dino")
    return folder / "dino"


def classifier(folder: Path) -> Path:
    """A classifier of digits."""
    torch.manual_seed(1)
    ConvClassifier(channels=(4, 8), hidden=12).save(folder / "classifier")
    return folder / "classifier"


def images(*shape: int, seed: int = 0) -> Tensor:
    """Whole bytes as images in [-1, 1]."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 127.5 - 1
