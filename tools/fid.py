"""The Fréchet distance between two sets of images, as JSON with everything that is needed to compare it with another.

    python tools/fid.py --samples runs/digits/cd/samples --reference digits --features pixels --out fid.json

A set is an .npz file (``arr_0`` uint8 images n,h,w,c; optional ``arr_1`` labels), a folder with ``samples.npz`` (and
``samples.json``, whose settings are copied into the result), or the word ``digits``: scikit-learn's 1,797 real ones. Labelled
8x8x1 samples are also read by a classifier of digits, which gives ``accuracy``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

from distill.metrics.digits import read_digits, real_digits
from distill.metrics.features import FeatureExtractor, PixelFeatures, from_uint8
from distill.metrics.frechet import GaussianStatistics

FEATURES: dict[str, type[FeatureExtractor]] = {"pixels": PixelFeatures}
PACKAGES = ("distill", "torch", "numpy", "scikit-learn")
BATCH = 512


class Refusal(Exception):
    """Something that the user can put right; its message names option, value and remedy."""


@dataclass
class ImageSet:
    """Images ``(n, h, w, c)`` uint8, labels ``(n,)`` or None, and how they were made."""

    path: str
    images: numpy.ndarray
    labels: numpy.ndarray | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What the result says of the set; the hash is of the images' bytes."""
        digest = hashlib.sha256(numpy.ascontiguousarray(self.images).tobytes()).hexdigest()
        known = {"path": self.path, "count": len(self.images), "shape": list(self.images.shape[1:]), "sha256": digest}
        return known | ({"settings": self.settings} if self.settings else {})


def read_set(option: str, value: str) -> ImageSet:
    """The images that ``option`` names by ``value``. Raises Refusal."""
    if value == "digits":
        return ImageSet(value, *real_digits())
    path, settings = Path(value), {}
    if path.is_dir():
        settings = read_settings(option, path / "samples.json")
        path = path / "samples.npz"
    if not path.is_file():
        raise Refusal(f"{option} {value}: there is no file {path}; give an .npz file, a folder with samples.npz, or digits")
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in ("arr_0", "arr_1") if name in arrays}
    # A bare .npy gives an array, which is no context manager: TypeError (AttributeError before Python 3.11).
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        why = f"{path} is no .npz file that can be read ({error})"
        raise Refusal(f"{option} {value}: {why}; write it by numpy.savez") from error
    check_arrays(option, value, content)
    return ImageSet(value, content["arr_0"], content.get("arr_1"), settings)


def read_settings(option: str, path: Path) -> dict[str, Any]:
    """The content of a ``samples.json``; empty if there is none. Raises Refusal."""
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{option} {path.parent}: {path} is no JSON ({error}); sample again, or remove it") from error
    if not isinstance(settings, dict):
        raise Refusal(f"{option} {path.parent}: {path} holds no JSON object; sample again, or remove it")
    return settings


def check_arrays(option: str, value: str, content: dict[str, numpy.ndarray]) -> None:
    """Raises Refusal if the arrays of a file are not images with or without labels."""
    images, labels = content.get("arr_0"), content.get("arr_1")
    if images is None:
        raise Refusal(f"{option} {value}: holds no arr_0; save the images by numpy.savez(path, images)")
    if images.dtype != numpy.uint8 or images.ndim != 4:
        got = f"{images.dtype} of shape {images.shape}"
        raise Refusal(f"{option} {value}: arr_0 is {got}; give uint8 images (n, h, w, c), 0..255 spanning the data's range")
    if len(images) < 2:
        raise Refusal(f"{option} {value}: {len(images)} images have no covariance; give at least 2, better thousands")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        got = f"{labels.dtype} of shape {labels.shape}"
        raise Refusal(f"{option} {value}: arr_1 is {got}; give one whole number for each of the {len(images)} images")


def statistics(images: numpy.ndarray, features: FeatureExtractor) -> GaussianStatistics:
    """Mean and covariance of the features of uint8 images ``(n, h, w, c)``."""
    result = GaussianStatistics()
    for start in range(0, len(images), BATCH):
        result.update(features(as_tensor(images[start : start + BATCH])))
    return result


def as_tensor(images: numpy.ndarray) -> torch.Tensor:
    """uint8 images ``(n, h, w, c)`` as float32 ones ``(n, c, h, w)`` in [-1, 1]."""
    return from_uint8(torch.from_numpy(numpy.ascontiguousarray(images.transpose(0, 3, 1, 2))))


def evaluate(samples: ImageSet, reference: ImageSet, features: FeatureExtractor) -> dict[str, Any]:
    """The result: the distance, what was compared, how, and by which versions."""
    distance = statistics(samples.images, features).distance(statistics(reference.images, features))
    result: dict[str, Any] = {"distance": distance}
    if features.name == "pixels" and samples.images.shape[1:] == (8, 8, 1) and samples.labels is not None:
        read = read_digits(as_tensor(samples.images)).numpy()
        result["accuracy"] = float((read == samples.labels).mean())
    return result | {
        "features": {"name": features.name, "hash": features.hash, "protocol": features.protocol},
        "samples": samples.describe(),
        "reference": reference.describe(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Checks the options, measures, and writes the result. Raises Refusal."""
    if options.features not in FEATURES:
        raise Refusal(f"--features {options.features}: unknown; give one of: {', '.join(FEATURES)}")
    if options.out is not None and options.out.is_dir():
        raise Refusal(f"--out {options.out}: is a folder; give the name of a file, e.g. {options.out / 'fid.json'}")
    samples, reference = read_set("--samples", options.samples), read_set("--reference", options.reference)
    if samples.images.shape[1:] != reference.images.shape[1:]:
        sizes = f"its images are {samples.images.shape[1:]} (h, w, c), those of --reference {reference.images.shape[1:]}"
        raise Refusal(f"--samples {samples.path}: {sizes}; compare images of one size")
    result = evaluate(samples, reference, FEATURES[options.features]())
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise Refusal(f"--out {options.out}: cannot be written ({error}); give another file") from error
    return result


class Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: list[str] | None = None) -> None:
    """Reads the options, prints the result; ends with 2 and one line on stderr if they cannot be followed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--samples", required=True, help="the images to measure: an .npz file, a folder, or digits")
    parser.add_argument("--reference", required=True, help="the images to measure them against, likewise")
    parser.add_argument("--features", default="pixels", help=f"what is compared: {', '.join(FEATURES)} (default pixels)")
    parser.add_argument("--out", type=Path, help="a file for the JSON, beside printing it")
    try:
        print(json.dumps(run(parser.parse_args(arguments)), indent=2))
    except Refusal as refusal:
        parser.error(" ".join(str(refusal).split()))


if __name__ == "__main__":
    main()
