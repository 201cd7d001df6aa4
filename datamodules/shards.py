"""Shards of encoded samples: WebDataset tars of plain arrays, with a manifest beside each that says what made them.

``00003-of-00010.tar`` holds ``__header__`` (JSON), ``__null__`` (safetensors: null conditions that all samples share), and for
each sample ``KEY.x0.npy``, ``KEY.<condition>.npy`` and ``KEY.txt`` (its prompt); WebDataset skips the first two. The manifest
``00003-of-00010.json`` is written last: ``header`` again, ``count``, ``bytes``, ``sha256`` of the tar, and ``offsets``, where
each sample begins and the last one ends. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy
from torch import Tensor

FORMAT = 1
AGAIN = "encode it again by tools/encode_latents.py"
MADE_BY = ("codec", "conditioner")


def shard_name(shard: int, of: int) -> str:
    """``00003-of-00010``."""
    return f"{shard:05d}-of-{of:05d}"


def differences(header: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two headers of one folder may not differ and do: all but ``shard``, and where codecs were read from."""

    def content(of: Mapping[str, Any], key: str) -> Any:
        value = of.get(key)
        return (value or {}).get("sha256") if key in MADE_BY else value

    return [key for key in {**header, **other} if key != "shard" and content(header, key) != content(other, key)]


# --------------------------------------------------------------------------------------------------------------- writing


class _Hashing:
    """A file that is only written to, and the hash and number of its bytes."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write_shard(
    file: IO[bytes],
    header: Mapping[str, Any],
    null: Mapping[str, Tensor],
    samples: Iterable[tuple[str, dict[str, Any], str | None]],
) -> dict[str, Any]:
    """Writes a tar and returns its manifest.

    Args:
        file: to write to.
        header: what made the samples; JSON.
        null: null conditions ``(1, ...)`` that all samples share.
        samples: of each its key, its arrays by name, and its prompt or None.
    """
    from safetensors.torch import save
    from webdataset import TarWriter

    hashing, offsets = _Hashing(file), []
    with TarWriter(hashing, encoder=False, mtime=0) as writer:
        shared = save({name: row.contiguous() for name, row in null.items()})
        for name, content in {"__header__": json.dumps(header).encode(), "__null__": shared}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            writer.tarstream.addfile(entry, io.BytesIO(content))
        for key, arrays, prompt in samples:
            offsets.append(writer.tarstream.offset)
            members: dict[str, Any] = {f"{name}.npy": to_npy(array) for name, array in arrays.items()}
            writer.write({"__key__": key, **members, **({} if prompt is None else {"txt": prompt.encode()})})
        offsets.append(writer.tarstream.offset)
    tar = {"count": len(offsets) - 1, "bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}
    return {"header": dict(header), **tar, "offsets": offsets}


def to_npy(array: Any) -> bytes:
    """An array in NumPy's format, never as a pickle."""
    stream = io.BytesIO()
    numpy.lib.format.write_array(stream, numpy.asarray(array), allow_pickle=False)
    return stream.getvalue()


# --------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Shard:
    """One finished tar.

    Attributes:
        file: the tar.
        header: what made it.
        sha256: of the tar.
        offsets: bytes ``(count + 1,)`` at which its samples begin, and at which the last one ends.
    """

    file: Path
    header: dict[str, Any]
    sha256: str
    offsets: numpy.ndarray

    @property
    def count(self) -> int:
        """Samples in it."""
        return len(self.offsets) - 1

    def read(self, index: int) -> dict[str, numpy.ndarray]:
        """The arrays of sample ``index`` by name.

        Raises:
            ValueError: a damaged tar.
        """
        from webdataset.tariterators import tar_file_iterator

        first, last = self.offsets[index : index + 2].tolist()
        with open(self.file, "rb") as file:
            file.seek(first)
            content = file.read(last - first)
        try:
            members = [(entry["fname"].partition(".")[2], entry["data"]) for entry in tar_file_iterator(io.BytesIO(content))]
            arrays = {name.removesuffix(".npy"): from_npy(data) for name, data in members if name.endswith(".npy")}
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise ValueError(f"{self.file}: sample {index} is damaged ({error}); {AGAIN}.") from error
        if "x0" not in arrays:
            raise ValueError(f"{self.file}: sample {index} is damaged (there is no x0); {AGAIN}.")
        return arrays

    def null(self) -> dict[str, Tensor]:
        """Null conditions ``(1, ...)`` that all samples share."""
        from safetensors.torch import load

        return load(_leading_members(self.file)["__null__"])


def from_npy(data: bytes) -> numpy.ndarray:
    """An array in NumPy's format. Raises ValueError for a pickle or what is no array."""
    return numpy.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _leading_members(file: Path) -> dict[str, bytes]:
    """``__header__`` and ``__null__``, without a walk through the whole tar."""
    try:
        with tarfile.open(file, "r:") as archive:
            entries = [archive.next() for _ in range(2)]
            return {entry.name: archive.extractfile(entry).read() for entry in entries if entry}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file}: not a tar ({error}); {AGAIN}.") from error


def read_manifest(path: Path, verify: bool = False) -> Shard:
    """The shard of a manifest, whose tar is there, whole, and says the same of itself.

    Args:
        path: the manifest.
        verify: whether the whole tar is read and its hash compared, not only its size and header.

    Raises:
        FileNotFoundError: there is no tar.
        ValueError: the manifest is broken or of another format; the tar is truncated, damaged, or not the manifest's.
    """
    try:
        manifest = json.loads(path.read_text())
        header, offsets = manifest["header"], numpy.array(manifest["offsets"], numpy.int64)
        size, digest, count = manifest["bytes"], manifest["sha256"], manifest["count"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of encoded samples ({error!r}); {AGAIN}.") from error
    if header.get("format") != FORMAT or len(offsets) != count + 1:
        raise ValueError(f"{path}: format {header.get('format')} is not known, this version reads {FORMAT}; {AGAIN}.")
    file = path.with_suffix(".tar")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing, though {path.name} says that it is finished; {AGAIN}.")
    if file.stat().st_size != size:
        raise ValueError(f"{file}: has {file.stat().st_size} bytes, {path.name} says {size}: truncated or replaced; {AGAIN}.")
    inside = _leading_members(file).get("__header__")
    if inside is None or json.loads(inside) != header:
        raise ValueError(f"{file}: its own header is not that of {path.name}: not the tar that was made with it; {AGAIN}.")
    if verify:
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"{file}: sha256 {found[:12]}, {path.name} says {digest[:12]}: damaged; {AGAIN}.")
    return Shard(file, header, digest, offsets)


def read_folder(folder: str | Path, verify: bool = False) -> list[Shard]:
    """All shards of a folder, in order.

    Raises:
        FileNotFoundError: no folder, no manifest, missing shards.
        ValueError: see `read_manifest`; shards that were made by different things.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*-of-*.json"))
    if not paths:
        state = "holds no manifest of encoded samples (*-of-*.json)" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"folder={str(folder)!r}: {state}; make one by tools/encode_latents.py.")
    shards = [read_manifest(path, verify) for path in paths]
    first = shards[0].header
    for path, shard in zip(paths, shards):
        if keys := differences(first, shard.header):
            raise ValueError(
                f"folder={str(folder)!r}: {paths[0].name} and {path.name} differ in {keys[0]}: {first.get(keys[0])} and "
                f"{shard.header.get(keys[0])}; {AGAIN}."
            )
    missing = sorted(set(range(first["of"])) - {shard.header["shard"] for shard in shards})
    if missing:
        raise FileNotFoundError(
            f"folder={str(folder)!r}: {len(missing)} of {first['of']} shards are missing "
            f"({shard_name(missing[0], first['of'])} first): run tools/encode_latents.py as before, it makes those alone."
        )
    return shards
