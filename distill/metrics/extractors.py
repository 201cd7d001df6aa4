"""Extractors of features by name, by name and path, or by path alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from distill import hub
from distill.image_features import ClassifierFeatures, ClipFeatures, DinoFeatures
from distill.image_features.image_towers import CLIP, DINO
from distill.image_features.inception import is_script
from distill.metrics.features import FeatureExtractor, NetworkFeatures, PixelFeatures
from distill.metrics.inception import LOGITS, CleanFeatures, LegacyFeatures

WEIGHTS = "weights"
"""The folder in which published weights are looked for."""


class ClassifierLogits(NetworkFeatures):
    """The logits of a `ConvClassifier`, for an Inception score of the images it is made for.

    Raises:
        FileNotFoundError, ValueError: see `ClassifierFeatures`.
    """

    def __init__(self, path: str):
        super().__init__(ClassifierFeatures(path))
        self.protocol = f"logits behind the {self.protocol}"

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Float64[Tensor, "b classes"]:
        """Logits ``(b, classes)``."""
        network: Any = self.features.network
        return network.module.head(super().forward(images).float()).double()


@dataclass(frozen=True)
class Kind:
    """What is known of extractors of one name.

    Attributes:
        make: the extractor of a path.
        path: where its weights are looked for if no path is given; None where there are none.
        logits: what gives an Inception score with the same weights, None where nothing does.
        repository: of the hub, of a folder of transformers.
        packages: whose versions may change the features.
    """

    make: Callable[[str], FeatureExtractor]
    path: str | None = None
    logits: Callable[[str], FeatureExtractor] | None = None
    repository: str | None = None
    packages: tuple[str, ...] = ()


KINDS = {
    "pixels": Kind(lambda path: PixelFeatures()),
    "classifier": Kind(
        lambda path: NetworkFeatures(ClassifierFeatures(path)), "runs/digits/classifier/export", ClassifierLogits
    ),
    "clean": Kind(CleanFeatures, f"{WEIGHTS}/inception-2015-12-05.pt", packages=("clean-fid", "pillow")),
    "legacy": Kind(
        LegacyFeatures,
        f"{WEIGHTS}/weights-inception-2015-12-05-6726825d.pth",
        lambda path: LegacyFeatures(path, LOGITS),
        packages=("torch-fidelity",),
    ),
    "dinov2": Kind(
        lambda path: NetworkFeatures(DinoFeatures(path)),
        f"{WEIGHTS}/dinov2-large",
        repository="facebook/dinov2-large",
        packages=("transformers",),
    ),
    "clip": Kind(
        lambda path: NetworkFeatures(ClipFeatures(path)),
        f"{WEIGHTS}/clip-vit-large-patch14",
        repository="openai/clip-vit-large-patch14",
        packages=("transformers",),
    ),
}


def find_extractor(wanted: str) -> tuple[str, str]:
    """Name and path of ``NAME``, ``NAME=PATH`` or ``PATH``, whose kind is seen from what lies there; nothing is loaded.

    Raises:
        ValueError: an unknown name that is no path either, a path of an unknown kind, or one for pixels, which have none.
        FileNotFoundError: there is nothing at the path; says what is to be fetched, from where, and where to put it.
    """
    name, _, path = wanted.partition("=")
    if name not in KINDS:
        return _kind_of(wanted), wanted
    kind = KINDS[name]
    if kind.path is None:
        if path:
            raise ValueError(f"{wanted}: {name} are of no weights; give {name} alone.")
        return name, ""
    path = path or kind.path
    if kind.repository and not Path(path).is_dir() and (path == kind.path or not hub.is_hub_id(path)):
        raise FileNotFoundError(
            f"{name}: there is no folder {path}; where there is a network run "
            f"`hf download {kind.repository} --local-dir {path}`, copy the folder here, or give another one by {name}=FOLDER."
        )
    return name, path


def make_extractor(wanted: str, logits: bool = False) -> FeatureExtractor:
    """The extractor that `find_extractor` finds, or, for an Inception score, its logits.

    Raises:
        ValueError, FileNotFoundError: see `find_extractor`; weights that cannot be read; features that no logits belong to.
    """
    name, path = find_extractor(wanted)
    if not logits:
        return KINDS[name].make(path)
    make = KINDS[name].logits
    if make is None:
        able = ", ".join(sorted(name for name, kind in KINDS.items() if kind.logits))
        raise ValueError(f"{name}: has no logits that an Inception score is of; give features of: {able}.")
    return make(path)


def _kind_of(wanted: str) -> str:
    """The kind of extractor that a path is of."""
    path = Path(wanted)
    if path.is_file():
        return "clean" if is_script(path) else "legacy"
    if (path / "config.json").is_file():
        config = hub.read_json(path / "config.json")
        if config.get("_class_name") == "ConvClassifier":
            return "classifier"
        for name, types in (("dinov2", DINO), ("clip", CLIP)):
            if config.get("model_type") in types:
                return name
        raise ValueError(f"{wanted}: config.json there is of none of the extractors; give one of: {', '.join(KINDS)}.")
    raise ValueError(f"{wanted}: unknown; give one of: {', '.join(KINDS)}, with the path of its weights behind = if need be.")
