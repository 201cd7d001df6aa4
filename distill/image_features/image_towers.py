"""Features of published image towers, from folders of transformers: CLIP (2103.00020) and DINOv2 (2304.07193)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import hub
from distill.image_features.base import Features, Images, PretrainedFeatures
from distill.image_features.preprocessing import Preprocessing

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on (its code)."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = {"clip": "CLIPModel", "clip_vision_model": "CLIPVisionModelWithProjection"}
DINO = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""Classes of transformers by the ``model_type`` of ``config.json``."""
CLIP_ADVICE = "give a folder of transformers' CLIPModel, such as openai/clip-vit-base-patch32"
DINO_ADVICE = "give a folder of transformers' Dinov2Model, such as facebook/dinov2-large"


class ClipFeatures(PretrainedFeatures):
    """CLIP's image embedding ``(b, d)``, after the projection and not of unit length, as in MMD-DDM (2301.07969).

    Args:
        path: folder or hub id of a ``CLIPModel`` or ``CLIPVisionModelWithProjection``.
        revision: of a hub repository.
        allow_pickle: whether ``.bin`` weights are read where there are no safetensors.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: a folder of another model, or weights that are not whole.
    """

    name = "clip"

    def __init__(self, path: str, revision: str | None = None, allow_pickle: bool = False):
        folder = self.locate(path, revision, allow_pickle)
        model = load_tower(path, folder, CLIP, CLIP_ADVICE)
        size = model.vision_model.config.image_size
        preprocessing = Preprocessing(3, size, "bicubic", antialias=True, mean=CLIP_MEAN, std=CLIP_STD)
        # of a whole CLIP, the text tower is left out
        tower = nn.ModuleDict({"vision": model.vision_model, "projection": model.visual_projection})
        super().__init__(tower, preprocessing, "image embedding of CLIP, not normalised", _identity(path, folder))

    @staticmethod
    def locate(path: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
        """The folder, fetched if need be, with all that the constructor reads."""
        return _locate(path, revision, allow_pickle, CLIP_ADVICE)

    def extract(self, images: Images) -> Features:
        tower = self.network.module
        return tower["projection"](tower["vision"](pixel_values=images).pooler_output)


class DinoFeatures(PretrainedFeatures):
    """DINOv2's class token ``(b, d)`` after the last normalisation, as FD-DINOv2 compares (Stein et al. 2306.04675).

    Args:
        path: folder or hub id of a ``Dinov2Model``, with or without registers.
        revision: of a hub repository.
        allow_pickle: whether ``.bin`` weights are read where there are no safetensors.
        size: height and width that images are resized to; the patch must divide it.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: a folder of another model, weights that are not whole, or a size that patches do not fill.
    """

    name = "dinov2"

    def __init__(self, path: str, revision: str | None = None, allow_pickle: bool = False, size: int = 224):
        folder = self.locate(path, revision, allow_pickle)
        tower = load_tower(path, folder, DINO, DINO_ADVICE)
        if size < 1 or size % tower.config.patch_size:
            raise ValueError(f"size={size}: give a positive multiple of the patch, {tower.config.patch_size} pixels.")
        preprocessing = Preprocessing(3, size, "bicubic", antialias=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        super().__init__(tower, preprocessing, "class token of DINOv2, normalised by its last layer", _identity(path, folder))

    @staticmethod
    def locate(path: str, revision: str | None = None, allow_pickle: bool = False) -> Path:
        """The folder, fetched if need be, with all that the constructor reads."""
        return _locate(path, revision, allow_pickle, DINO_ADVICE)

    def extract(self, images: Images) -> Features:
        return self.network(pixel_values=images).last_hidden_state[:, 0]


def _locate(path: str, revision: str | None, allow_pickle: bool, advice: str) -> Path:
    try:
        return hub.component_folder(path, "", revision, allow_pickle=allow_pickle)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace(hub.ADVICE, advice)) from error


def _identity(path: str, folder: Path) -> dict[str, str]:
    return hub.identity(path, folder, hub.component_files(folder, "", allow_pickle=True))


def load_tower(path: str, folder: Path, classes: dict[str, str], advice: str) -> Any:
    """The model of transformers in a folder, in float32, every weight of it read.

    Args:
        path: as it was given, for messages.
        folder: where it is.
        classes: of transformers that will do, by ``model_type``.
        advice: what else to give.

    Raises:
        ValueError: a model of another type; weights that are broken or not whole.
    """
    import transformers

    found = hub.read_json(folder / "config.json").get("model_type")
    if found not in classes:
        raise ValueError(f"path={path!r}: config.json there is of a model of type {found!r}; {advice}.")
    model_class: Any = getattr(transformers, classes[found])
    if not hub.reads_weights():
        with hub.built_on():
            return model_class(model_class.config_class.from_pretrained(folder)).eval()
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=bool(hub.weight_files(folder)), output_loading_info=True
        )
    except Exception as error:  # whatever a wrong config or a broken file makes of it, down in torch or safetensors
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"path={path!r}: its weights and config do not fit or are broken ({reason}); {advice}.") from error
    wrong = [f"{kind.split('_')[0]}: {', '.join(map(str, sorted(keys)[:2]))}" for kind, keys in report.items() if keys]
    if wrong:
        raise ValueError(f"path={path!r}: its weights are not those of a {classes[found]} ({'; '.join(wrong)}); {advice}.")
    return model
