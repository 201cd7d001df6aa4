"""Sets of images to be measured: read from wherever they are, checked before anything is computed, known by their content.

The content hash of a set is the sha256 over its shape and the sha256 of each image's bytes ``(h, w, c)``: it depends neither on
the file that they are in (an .npz file, pictures, shards) nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from distill.command_line import Refusal, read_object
from distill.metrics.digits import real_digits
from distill.metrics.features import from_uint8
from distill.metrics.image_sources import ArraySource, ImageSource, PictureSource, ShardSource
from distill.metrics.processes import ALONE, Processes

SETTINGS, PARTS, PICTURES, LABELS = "samples.json", "parts", "images", "labels.json"
"""In a folder of tools/sample.py: how the samples came about, those of a set that is not finished, and, of pictures, the folder
and the labels."""
BESIDE = ("grid.png",)
"""What tools/sample.py leaves beside samples that is none."""
CHECKED = 256
"""Images of a process's share at a time, while sets are checked."""


@dataclass
class ImageSet:
    """Images of one size.

    Attributes:
        path: as it was given.
        source: where they are read from.
        settings: how they were made, of ``samples.json``.
        count: how many of them count.
        shape: of an image, ``(h, w, c)``.
        digests: the sha256 of each image of the source.
    """

    path: str
    source: ImageSource
    settings: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    shape: tuple[int, int, int] = (0, 0, 0)
    digests: list[bytes] = field(default_factory=list)

    @property
    def labels(self) -> numpy.ndarray | None:
        """Labels of the images that count."""
        return None if self.source.labels is None else self.source.labels[: self.count]

    @property
    def sha256(self) -> str:
        """The content hash of the images that count."""
        return content_hash(self.digests[: self.count], self.shape)

    def read(self, numbers: range) -> Float[Tensor, "b c h w"]:
        """Some images, in [-1, 1]."""
        images = numpy.stack([numpy.broadcast_to(self.source[number], self.shape) for number in numbers])
        return from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2))

    def describe(self) -> dict[str, Any]:
        """What a result says of the set."""
        known = {"path": self.path, "count": self.count, "shape": list(self.shape), "sha256": self.sha256}
        return known | ({"settings": self.settings} if self.settings else {})


def content_hash(digests: Sequence[bytes], shape: tuple[int, ...]) -> str:
    """Of images of one shape, by the sha256 of each."""
    return hashlib.sha256(json.dumps(list(shape)).encode() + b"".join(digests)).hexdigest()


def hash_of_images(images: numpy.ndarray) -> str:
    """The content hash of an array ``(n, h, w, c)``, uint8."""
    return content_hash([hashlib.sha256(image.tobytes()).digest() for image in images], images.shape[1:])


def read_set(option: str, value: str, processes: Processes = ALONE, num: int | None = None) -> ImageSet:
    """The images that ``option`` names by ``value``, every one of them looked at.

    Args:
        option: as in messages.
        value: an .npz file, a folder of it, of pictures or of shards, patterns of shards, or ``digits``.
        processes: share the work; all of them learn the same, or raise the same.
        num: how many count, the first of them; None for all.

    Raises:
        Refusal: see the messages.
    """
    images = open_set(option, value)
    check_images(option, images, processes)
    stated, found = images.settings.get("num"), len(images.source)
    remedy = "the samples are not those it was written for; sample again into an empty folder"
    if stated is not None and stated != found:
        raise Refusal(f"{option} {value}: {SETTINGS} says {stated} samples and there are {found}: {remedy}")
    images.count = found
    if images.labels is not None and len(images.labels) != found:
        raise Refusal(f"{option} {value}: has {len(images.labels)} labels of {found} images: {remedy}")
    if images.settings.get("sha256", images.sha256) != images.sha256:
        raise Refusal(f"{option} {value}: {SETTINGS} has the hash of other samples: {remedy}")
    if num is not None and num > found:
        raise Refusal(f"{option} {value}: holds {found} images, fewer than --num {num}; draw more, or state fewer")
    images.count = found if num is None else num
    if images.count < 2:
        raise Refusal(f"{option} {value}: {images.count} images have no covariance; give at least 2, better thousands")
    return images


def open_set(option: str, value: str) -> ImageSet:
    """The set, of which no more is known than what kind it is. Raises Refusal."""
    if value == "digits":
        return ImageSet(value, ArraySource(*real_digits()))
    path, settings = Path(value), {}
    if path.is_dir():
        path = path / "samples" if (path / "samples" / SETTINGS).is_file() else path
        settings = read_settings(option, path / SETTINGS)
        if not (path / "samples.npz").is_file():
            return ImageSet(value, _folder(option, value, path, settings), settings)
        path = path / "samples.npz"
    elif path.name.endswith(".tar") or any(mark in value for mark in "{*"):
        try:
            return ImageSet(value, ShardSource(value))
        except (ValueError, FileNotFoundError) as error:
            raise Refusal(f"{option} {value}: {error}") from error
    if not path.is_file():
        kinds = "an .npz file, a folder of samples, pictures or shards, or digits"
        raise Refusal(f"{option} {value}: there is no file {path}; give {kinds}")
    return ImageSet(value, _arrays(option, value, path), settings)


def _folder(option: str, value: str, path: Path, settings: dict[str, Any]) -> ImageSource:
    """Shards or pictures of a folder without ``samples.npz``."""
    drawn = bool(settings)
    if not drawn and (path / PARTS / "settings.json").is_file():
        raise Refusal(f"{option} {value}: its samples are not all drawn; start the same command of tools/sample.py again")
    if shards := sorted(str(file) for file in path.glob("*.tar")):
        try:
            return ShardSource(shards)
        except (ValueError, FileNotFoundError) as error:
            raise Refusal(f"{option} {value}: {error}") from error
    run = next((folder for folder in (path, path.parent) if (folder / "config.yaml").is_file()), None)
    if settings.get("format") == "png":
        return PictureSource(path / PICTURES, (), _listed_labels(option, value, path / LABELS))
    pictures = PictureSource(path, BESIDE if drawn else ())
    if len(pictures) and (drawn or run is None):
        return pictures
    remedy = f"draw them by tools/sample.py --run {run} --out {path}" if run else "give a folder with images"
    if (path / "model_index.json").is_file():
        remedy = f"it is a pipeline: draw by tools/sample_pipeline.py --pipeline {path} --out FOLDER, and give that folder"
    raise Refusal(f"{option} {value}: there is no file {path / 'samples.npz'}, nor pictures or shards of samples; {remedy}")


def _listed_labels(option: str, value: str, path: Path) -> numpy.ndarray | None:
    """The labels of numbered pictures, a JSON list; None if there is none. Raises Refusal."""
    if not path.is_file():
        return None
    try:
        labels = numpy.array(json.loads(path.read_text()))
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{labels.dtype} of shape {labels.shape}")
    except (OSError, ValueError) as error:
        raise Refusal(f"{option} {value}: {path} is no list of whole numbers ({error}); sample again, or remove it") from error
    return labels


def read_settings(option: str, path: Path) -> dict[str, Any]:
    """The content of a ``samples.json``; empty if there is none. Raises Refusal."""
    if not path.exists():
        return {}
    return read_object(f"{option} {path.parent}", path, "sample again, or remove it")


def _arrays(option: str, value: str, path: Path) -> ArraySource:
    """The images, and labels if there are any, of an .npz file."""
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in ("arr_0", "arr_1") if name in arrays}
    # A bare .npy gives an array, which is no context manager: TypeError (AttributeError before Python 3.11).
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        why = f"{path} is no .npz file that can be read ({error})"
        raise Refusal(f"{option} {value}: {why}; write it by numpy.savez") from error
    images, labels = content.get("arr_0"), content.get("arr_1")
    if images is None:
        raise Refusal(f"{option} {value}: holds no arr_0; save the images by numpy.savez(path, images)")
    if images.dtype != numpy.uint8 or images.ndim != 4:
        got = f"{images.dtype} of shape {images.shape}"
        if images.dtype.kind == "f" and not numpy.isfinite(images).all():
            got += f", and {int((~numpy.isfinite(images)).sum())} of its values are not finite: the network has diverged"
        raise Refusal(f"{option} {value}: arr_0 is {got}; give uint8 images (n, h, w, c), 0..255 spanning the data's range")
    if images.shape[-1] not in (1, 3):
        raise Refusal(f"{option} {value}: its images have {images.shape[-1]} channels; give (n, h, w, c) with c of 1 or 3")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        got = f"{labels.dtype} of shape {labels.shape}"
        raise Refusal(f"{option} {value}: arr_1 is {got}; give one whole number for each of the {len(images)} images")
    return ArraySource(images, labels)


def check_images(option: str, images: ImageSet, processes: Processes) -> None:
    """Reads every image once, and notes shape and digests. Raises Refusal, on every process alike."""
    shares, problem = [], None
    try:
        for numbers in processes.batches(len(images.source), CHECKED):
            shares.append([_look(images.source[number]) for number in numbers])
    except ValueError as error:
        problem = str(error)
    problems = [found for found in processes.gather(problem) if found]
    if problems:
        raise Refusal(f"{option} {images.path}: {problems[0]}")
    seen = [each for share in processes.in_order(shares) for each in share]
    sizes: dict[tuple[int, int], int] = {}
    for number, (shape, _, _) in enumerate(seen):
        sizes.setdefault(shape[:2], number)
    if len(sizes) > 1:
        examples = ", ".join(f"{h}x{w} ({images.source.name(number)})" for (h, w), number in list(sizes.items())[:2])
        raise Refusal(f"{option} {images.path}: its images are of {len(sizes)} sizes, {examples}; give images of one size")
    channels = max((shape[2] for shape, _, _ in seen), default=1)
    images.shape = (*next(iter(sizes), (0, 0)), channels)
    images.digests = [digest if shape[2] == channels else coloured for shape, digest, coloured in seen]


def _look(pixels: numpy.ndarray) -> tuple[tuple[int, int, int], bytes, bytes]:
    """Shape and digest of an image, and its digest in three channels."""
    own = hashlib.sha256(pixels.tobytes()).digest()
    height, width, channels = pixels.shape
    if channels == 3:
        return (height, width, 3), own, own
    coloured = numpy.broadcast_to(pixels, (height, width, 3))
    return (height, width, channels), own, hashlib.sha256(coloured.tobytes()).digest()
