"""Shards of samples made beforehand: WebDataset tars of plain arrays, with a manifest beside each that says what made them.

Three kinds: encoded samples (tools/encode_latents.py), noise-sample pairs (tools/make_pairs.py), points of trajectories
(tools/make_trajectories.py). ``00003-of-00010.tar`` holds ``__header__`` (JSON), ``__null__`` (safetensors: null conditions
that all samples share), and the members of each sample, such as ``KEY.x0.npy``, ``KEY.<condition>.npy``, ``KEY.txt``;
WebDataset skips the first two. The manifest ``00003-of-00010.json`` is written last: ``header`` again, ``count``,
``bytes`` and ``sha256`` of the tar, ``offsets``, where each sample begins and the last one ends, ``first``, the number of the
first sample, ``members``, their names, and ``places``, where the bytes of each member begin, how many they are, and their check
sum: samples are read by these alone. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy
from torch import Tensor

from datamodules.members import checksum

FORMAT = 1
Kind = Literal["encoded", "pairs", "trajectories"]
TOOLS = {
    "encoded": "tools/encode_latents.py",
    "pairs": "tools/make_pairs.py",
    "trajectories": "tools/make_trajectories.py",
}
MADE_BY = ("codec", "conditioner", "teacher")
MAY_DIFFER = ("shard", "computed_by")
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")
"""Conditions that may be stored in half precision."""
OWN_NULL = ("time_ids", "resolution", "aspect_ratio")
"""Conditions whose null is the condition itself; all other null conditions are the same for all samples."""
OPEN_FILES = 256


def shard_name(shard: int, of: int) -> str:
    """``00003-of-00010``."""
    return f"{shard:05d}-of-{of:05d}"


def differences(header: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two headers of one folder may not differ and do.

    Which shard it is, and by what torch, NumPy and device it was computed, may differ.
    """
    return [key for key in {**header, **other} if key not in MAY_DIFFER and not same(header, other, key)]


def same(header: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Whether two headers agree in a key. Of codecs, conditioners and teachers the hash counts, not the path."""
    mine, its = ((of.get(key) or {}).get("sha256") if key in MADE_BY else of.get(key) for of in (header, other))
    return mine == its


def kind_of(header: Mapping[str, Any]) -> Kind:
    """The kind of a shard; headers of encoded samples do not say it."""
    return header.get("kind", "encoded")


class OpenFiles:
    """Reads parts of files, ``OPEN_FILES`` of which are kept open.

    ``pread`` has no position to share: workers that were forked read by the same descriptors. A pickled copy opens its own.
    """

    def __init__(self) -> None:
        self.descriptors: dict[Path, int] = {}

    def read(self, file: Path, begin: int, size: int) -> bytes:
        """Bytes ``begin .. begin + size - 1``, fewer where the file ends.

        Where a read fails, the file is opened anew and read once more: a network file system may have dropped it.
        """
        descriptor = self.descriptors.get(file)
        try:
            return os.pread(self.open(file) if descriptor is None else descriptor, size, begin)
        except OSError:
            if (failed := self.descriptors.pop(file, None)) is not None:
                os.close(failed)
            return os.pread(self.open(file), size, begin)

    def open(self, file: Path) -> int:
        """Opens a file, and closes the one that was opened first if there are too many."""
        if len(self.descriptors) == OPEN_FILES:
            os.close(self.descriptors.pop(next(iter(self.descriptors))))
        self.descriptors[file] = os.open(file, os.O_RDONLY)
        return self.descriptors[file]

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


@dataclass(frozen=True)
class Shard:
    """One finished tar.

    Attributes:
        file: the tar.
        header: what made it.
        sha256: of the tar.
        offsets: bytes ``(count + 1,)`` at which its samples begin, and at which the last one ends.
        first: number of its first sample.
        names: of the members of each sample.
        places: ``(count, names, 3)`` of each member: where its bytes begin, how many they are, their check sum; None for shards
            that were written before manifests held them.
    """

    file: Path
    header: dict[str, Any]
    sha256: str
    offsets: numpy.ndarray
    first: int
    names: list[str]
    places: numpy.ndarray | None

    @property
    def count(self) -> int:
        """Samples in it."""
        return len(self.offsets) - 1

    def read(self, index: int, places: list[list[int]] | None, files: OpenFiles) -> dict[str, bytes | memoryview]:
        """The members of sample ``index``, which lie at ``places``, by their names (``x0.npy``).

        Raises:
            ValueError: a damaged or truncated tar; names it and the sample's key.
        """
        if places is None:
            return self._read_by_tarfile(index, files)
        start, (last, size, _) = places[0][0], places[-1]
        content = memoryview(files.read(self.file, start, last + size - start))
        members: dict[str, bytes | memoryview] = {}
        for name, (begin, size, expected) in zip(self.names, places):
            members[name] = data = content[begin - start : begin - start + size]
            if checksum(data) != expected:
                raise self.damaged(index, f"{name}: not the bytes that were written")
        return members

    def _read_by_tarfile(self, index: int, files: OpenFiles) -> dict[str, bytes | memoryview]:
        from webdataset.tariterators import tar_file_iterator

        first, last = self.offsets[index : index + 2].tolist()
        content = io.BytesIO(files.read(self.file, first, last - first))
        try:
            return {entry["fname"].partition(".")[2]: entry["data"] for entry in tar_file_iterator(content)}
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise self.damaged(index, error) from error

    def damaged(self, index: int, reason: object) -> ValueError:
        """The error to raise of sample ``index``."""
        return ValueError(
            f"{self.file}: sample {self.first + index:09d} is damaged ({reason}); delete it and {again(kind_of(self.header))}."
        )

    def null(self) -> dict[str, Tensor]:
        """Null conditions ``(1, ...)`` that all samples share."""
        from safetensors.torch import load

        return load(_leading_members(self.file, kind_of(self.header))["__null__"])


def again(kind: Kind) -> str:
    """What to do about a shard that cannot be used."""
    return f"make it again by {TOOLS[kind]}"


def _leading_members(file: Path, kind: Kind) -> dict[str, bytes]:
    """``__header__`` and ``__null__``, without a walk through the whole tar."""
    try:
        with tarfile.open(file, "r:") as archive:
            entries = [archive.next() for _ in range(2)]
            return {entry.name: archive.extractfile(entry).read() for entry in entries if entry}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file}: not a tar ({error}); {again(kind)}.") from error


def read_manifest(path: Path, kind: Kind, verify: bool = False) -> Shard:
    """The shard of a manifest, whose tar is there, whole, and says the same of itself.

    Args:
        path: the manifest.
        kind: of shards that are expected: says what to make a broken one again by.
        verify: whether the whole tar is read and its hash compared, not only its size and header.

    Raises:
        FileNotFoundError: there is no tar.
        ValueError: the manifest is broken or of another format; the tar is truncated, damaged, or not the manifest's.
    """
    file, redo = path.with_suffix(".tar"), again(kind)
    shard, size = _parse(path, kind)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, though {path.name} says that it is finished; {redo}.")
    if (found := file.stat().st_size) != size:
        raise ValueError(f"{file}: has {found} bytes, {path.name} says {size}: truncated or replaced; {redo}.")
    inside = _leading_members(file, kind).get("__header__")
    if inside is None or json.loads(inside) != shard.header:
        raise ValueError(f"{file}: its own header is not that of {path.name}: not the tar that was made with it; {redo}.")
    if verify:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != shard.sha256:
            own = f"sha256 {digest[:12]}, {path.name} says {shard.sha256[:12]}"
            raise ValueError(f"{file}: {own}: damaged; delete it and {redo}.")
    return shard


def _parse(path: Path, kind: Kind) -> tuple[Shard, int]:
    """What a manifest says: the shard, and the bytes of its tar. Raises as `read_manifest`."""
    try:
        manifest = json.loads(path.read_text())
        header, count, size, digest = (manifest[key] for key in ("header", "count", "bytes", "sha256"))
        known = header.get("format")
        offsets = numpy.array(manifest["offsets"], numpy.int64)
        names, places = manifest.get("members", []), None
        if "places" in manifest:
            places = numpy.array(manifest["places"], numpy.int64).reshape(count, len(names), 3)
        first = manifest["first"] if "first" in manifest else header["shard"] * header["total"] // header["of"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of shards ({error!r}); {again(kind)}.") from error
    if known != FORMAT or len(offsets) != count + 1:
        raise ValueError(f"{path}: format {known} is not known, this version reads {FORMAT}; {again(kind)}.")
    return Shard(path.with_suffix(".tar"), header, digest, offsets, first, names, places), size


def read_folder(folder: str | Path, kind: Kind, verify: bool = False) -> list[Shard]:
    """All shards of a folder, in order.

    Raises:
        FileNotFoundError: no folder, no manifest, missing shards.
        ValueError: see `read_manifest`; shards of another kind, or that were made by different things.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*-of-*.json"))
    if not paths:
        state = "holds no manifest (*-of-*.json)" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"folder={str(folder)!r}: {state}; make one by {TOOLS[kind]}.")
    shards = [read_manifest(path, kind, verify) for path in paths]
    first = shards[0].header
    if kind_of(first) != kind:
        raise ValueError(f"folder={str(folder)!r}: made by {TOOLS[kind_of(first)]}; give one that {TOOLS[kind]} made.")
    for path, shard in zip(paths, shards):
        if keys := differences(first, shard.header):
            raise ValueError(
                f"folder={str(folder)!r}: {paths[0].name} and {path.name} differ in {keys[0]}: {first.get(keys[0])} and "
                f"{shard.header.get(keys[0])}; make all of them again by the same command, {TOOLS[kind]}."
            )
    missing = sorted(set(range(first["of"])) - {shard.header["shard"] for shard in shards})
    if missing:
        raise FileNotFoundError(
            f"folder={str(folder)!r}: {len(missing)} of {first['of']} shards are missing "
            f"({shard_name(missing[0], first['of'])} first): run {TOOLS[kind]} as before, it makes those alone."
        )
    return shards
