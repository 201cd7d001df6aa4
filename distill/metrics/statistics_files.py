"""Statistics of reference sets in files: those computed here, by content hash, and those that others have published."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy
import torch

from distill.metrics.frechet import GaussianStatistics

DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
CLEAN_FID = "https://www.cs.cmu.edu/~clean-fid/stats"


def default_cache() -> Path:
    """``distill/statistics`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "statistics"


def cache_file(cache: Path, sha256: str, features: str) -> Path:
    """Where statistics are kept of the set with a content hash, in features with the hash ``features`` of their protocol."""
    return cache / f"{hashlib.sha256(f'{sha256} {features}'.encode()).hexdigest()[:40]}.npz"


def keep(file: Path, statistics: GaussianStatistics, record: dict[str, Any]) -> None:
    """Writes statistics, and what a result says of their set and features, at once. Raises OSError."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial.npz")
    parts = {name: getattr(statistics, name).numpy() for name in ("count", "total", "outer")}
    numpy.savez(partial, record=numpy.array(json.dumps(record)), **parts)
    os.replace(partial, file)


def kept(file: Path) -> tuple[GaussianStatistics, dict[str, Any]] | None:
    """What `keep` wrote; None where there is nothing, or nothing whole."""
    try:
        with numpy.load(file, allow_pickle=False) as content:
            parts = {name: torch.from_numpy(content[name]) for name in ("count", "total", "outer")}
            return GaussianStatistics(**parts), json.loads(str(content["record"]))
    except DAMAGED:
        return None


def is_statistics(file: Path) -> bool:
    """Whether an .npz file holds statistics and no images."""
    try:
        with numpy.load(file, allow_pickle=False) as content:
            return "arr_0" not in content and ("outer" in content or {"mu", "sigma"} <= set(content))
    except (*DAMAGED, TypeError, AttributeError):
        return False


def read_statistics(file: Path) -> tuple[GaussianStatistics, dict[str, Any]]:
    """Statistics of `keep`, with their record, or a published pair ``mu`` and ``sigma``, of which nothing more is known.

    Raises:
        ValueError: neither is in the file.
    """
    if (found := kept(file)) is not None:
        return found
    try:
        with numpy.load(file, allow_pickle=False) as content:
            mean, covariance = (torch.from_numpy(content[name]).double() for name in ("mu", "sigma"))
    except DAMAGED as error:
        raise ValueError(f"{file}: holds no statistics ({error}); give one with mu and sigma, or images") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"{file}: mu and sigma have shapes {shapes}; give (d,) and (d, d)")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record = {"reference": {"path": str(file), "count": None, "sha256": digest, "published": True}, "features": None}
    return GaussianStatistics.of_moments(mean, covariance), record


def clean_fid_file(name: str) -> Path:
    """The file of clean-fid's own statistics for ``clean-fid:DATA,RESOLUTION,SPLIT``, such as ``clean-fid:cifar10,32,train``.

    Raises:
        ValueError: another form.
        FileNotFoundError: it is not in the package's folder; nothing is downloaded.
    """
    import cleanfid

    parts = name.removeprefix("clean-fid:").split(",")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"{name}: write clean-fid:DATA,RESOLUTION,SPLIT, such as clean-fid:cifar10,32,train")
    data, resolution, split = parts
    file = Path(cleanfid.__file__).parent / "stats" / f"{data}_clean_{split}_{resolution}.npz".lower()
    if not file.is_file():
        raise FileNotFoundError(f"{name}: there is no file {file}; save {CLEAN_FID}/{file.name} there")
    return file
