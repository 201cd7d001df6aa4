"""Where a student's folder takes the parts from that are not its own: autoencoder, text encoders, tokenizers, licence."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import hub
from distill.codecs import AutoencoderKLCodec, Codec, DeepCompressionCodec, DiffusersCodec, IdentityCodec, TinyCodec
from distill.methods.sampled import SampledModule
from distill.pretrained import identity_of

CODECS: dict[str, Any] = {part.model_class: part for part in (AutoencoderKLCodec, DeepCompressionCodec, TinyCodec)}
PIXEL_PIPELINES = ("DDPMPipeline", "StudentPipeline")
TEXT_PARTS = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
SMALL_PARTS = ["safety_checker", "feature_extractor", "image_encoder"]
FACTORS = {"SanaPipeline": 32}
"""Pixels on a side for an element of a latent that pipelines without an autoencoder assume; the others assume 8."""


@dataclass
class Sources:
    """What a student's folder is completed from.

    Attributes:
        teacher: the teacher's identity, or None.
        teacher_folder: its folder, or None if it is not there any more.
        folders: of pipelines, in the order in which they are asked for a component.
        absent: parts that the student was trained without, though a folder has them.
        codec: of the student, or of the teacher's own folder if data came encoded; None if there is none.
    """

    teacher: dict[str, str] | None
    teacher_folder: Path | None
    folders: list[Path]
    codec: Codec | None
    absent: tuple[str, ...] = ()

    @property
    def pipeline(self) -> str | None:
        """Name of the class of the teacher's own pipeline, or None."""
        return None if self.teacher_folder is None else index_of(self.teacher_folder).get("_class_name")

    def factor(self, pipeline: str) -> int:
        """Pixels on a side for each element of a sample."""
        if pipeline in PIXEL_PIPELINES:
            return 1
        return self.codec.compression if isinstance(self.codec, DiffusersCodec) else FACTORS.get(pipeline, 8)

    def check(self, pipeline: str, codec: Codec) -> None:
        """Raises ValueError if the pipeline decodes and there is no autoencoder, or the other way round."""
        if pipeline == "DiTPipeline" and self.codec is None:
            raise ValueError("DiTPipeline decodes its samples: set model.space.codec, or give a teacher's folder with vae/.")
        if pipeline in PIXEL_PIPELINES and isinstance(codec, DiffusersCodec):
            raise ValueError(
                f"the student's {pipeline} gives what the network gives, but model.space.codec={type(codec).__name__} makes "
                "that latents: no pipeline here decodes them."
            )

    def float_codec(self, pipeline: str) -> Codec | None:
        """What turns samples into pixels in the check, float32; None if the folder has no autoencoder."""
        if pipeline in PIXEL_PIPELINES:
            return IdentityCodec()
        return None if self.codec is None else copy.deepcopy(self.codec).cpu().float()

    @staticmethod
    def missing(folder: Path) -> list[str]:
        """Text encoders, tokenizers and autoencoder that ``folder``'s pipeline could have and has not."""
        index = index_of(folder)
        return [part for part in [*TEXT_PARTS, "vae"] if index.get(part) == [None, None]]


def index_of(folder: Path) -> dict[str, Any]:
    """The content of ``model_index.json``, empty if there is none."""
    file = folder / "model_index.json"
    return hub.read_json(file) if file.is_file() else {}


def find_sources(method: SampledModule) -> Sources:
    """The sources of a method's student: its teacher's folder, those of its codec and conditioner."""
    teacher = identity_of(method.teacher) if method.has_teacher else identity_of(method.student)
    space = method.space
    teacher_folder = place_of(teacher)
    # The text encoders that the student was trained with come before those of its teacher's folder.
    given = [None if space.conditioner is None else space.conditioner.identity, teacher, space.codec.identity]
    folders = [folder for folder in (place_of(identity) for identity in given) if folder is not None]
    codec = space.codec if isinstance(space.codec, DiffusersCodec) else next(_codecs(folders), None)
    absent = () if getattr(space.conditioner, "t5", True) else ("text_encoder_3", "tokenizer_3")
    return Sources(teacher, teacher_folder, folders, codec, absent)


def _codecs(folders: Sequence[Path]) -> Any:
    for folder in folders:
        file = folder / "vae" / "config.json"
        name = hub.read_json(file).get("_class_name") if file.is_file() else None
        if name in CODECS:
            yield CODECS[name](str(folder))


def place_of(identity: dict[str, str] | None) -> Path | None:
    """The folder of weights that were read from a path or the hub; None if it cannot be had."""
    if identity is None or ("revision" not in identity and not Path(identity["path"]).is_dir()):
        return None  # without a revision it was a local path, which is never looked up on the hub
    parts = ["model_index.json", "README.md", *(pattern for part in [*TEXT_PARTS, *SMALL_PARTS] for pattern in _files(part))]
    try:
        return hub.resolve(identity["path"], identity.get("revision"), parts)
    except (FileNotFoundError, ValueError):
        return None


def _files(part: str) -> list[str]:
    return hub.component_patterns(part)
