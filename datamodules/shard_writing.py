"""Writing shards: a tar under a temporary name, then its manifest, so that a task may be killed at any moment.

What a manifest says is in `datamodules.shards`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from datamodules.members import checksum
from datamodules.shards import differences, kind_of, read_manifest, shard_name
from distill.types import Cond

BLOCK = tarfile.BLOCKSIZE
Writer = Callable[[Path], AbstractContextManager[IO[bytes]]]
"""``with writer(path) as file`` writes to ``path.name.PID.partial`` and renames it when all went well
(`distill.checkpoints.atomic_writer`)."""


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
    first: int,
    samples: Iterable[Mapping[str, bytes]],
) -> dict[str, Any]:
    """Writes a tar and returns its manifest.

    Args:
        file: to write to.
        header: what made the samples; JSON.
        null: null conditions ``(1, ...)`` that all samples share.
        first: number of the first sample; the others follow it.
        samples: members of each by name (``x0.npy``), the same names for all.

    Raises:
        ValueError: a sample with other members than the first.
    """
    from safetensors.torch import save
    from webdataset import TarWriter

    hashing, names = _Hashing(file), None
    offsets: list[int] = []
    places: list[list[int]] = []
    with TarWriter(hashing, encoder=False, mtime=0) as writer:
        tar = writer.tarstream
        shared = save({name: row.contiguous() for name, row in null.items()})
        for name, content in {"__header__": json.dumps(header).encode(), "__null__": shared}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for number, sample in enumerate(samples, first):
            names = names or sorted(sample)
            if sorted(sample) != names:
                raise ValueError(f"sample {number} has members {sorted(sample)}, the first one {names}: they must be the same.")
            offsets.append(tar.offset)
            for name in names:
                writer.write({"__key__": f"{number:09d}", name: sample[name]})
                size = len(sample[name])
                places.append([tar.offset - -(-size // BLOCK) * BLOCK, size, checksum(sample[name])])
        offsets.append(tar.offset)
    manifest = {"header": dict(header), "count": len(offsets) - 1, "bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}
    return manifest | {"offsets": offsets, "first": first, "members": names or [], "places": places}


def save_shard(
    folder: str | Path,
    writer: Writer,
    header: Mapping[str, Any],
    null: Mapping[str, Tensor],
    first: int,
    samples: Iterable[Mapping[str, bytes]],
) -> None:
    """Writes the shard that ``header`` numbers and, when it is whole, its manifest; for the rest see `write_shard`."""
    path = Path(folder) / shard_name(header["shard"], header["of"])
    with writer(path.with_suffix(".tar")) as file:
        manifest = write_shard(file, header, null, first, samples)
    with writer(path.with_suffix(".json")) as file:
        file.write(json.dumps(manifest).encode())


def unfinished_shards(folder: str | Path, header: Mapping[str, Any], wanted: Iterable[int]) -> list[int]:
    """The shards of ``wanted`` that are not whole yet. Removes what killed tasks left of these shards, and nothing of others.

    Raises:
        ValueError: the folder holds a shard that was made by something else.
    """
    folder, finished = Path(folder), set()
    for path in sorted(folder.glob("*-of-*.json")):
        try:
            shard = read_manifest(path, kind_of(header))
        except (ValueError, FileNotFoundError):
            continue  # damaged, or its tar is gone: it is made again
        if keys := differences(header, shard.header):
            raise ValueError(
                f"--out={folder}: holds shards made by other things: {path.name} has {keys[0]}={shard.header.get(keys[0])}, "
                f"this command {keys[0]}={header.get(keys[0])}; give another folder, or the same settings."
            )
        finished.add(shard.header["shard"])
    wanted = list(wanted)
    for number in wanted:
        for leftover in folder.glob(f"{shard_name(number, header['of'])}.*.partial"):
            leftover.unlink(missing_ok=True)
    return [number for number in wanted if number not in finished]


# ------------------------------------------------------------------------------------------------- what the tools check


def shared_null(cond: Cond, null: Cond, own: Collection[str], first: Cond | None = None) -> Cond:
    """The null conditions ``(1, ...)`` that all samples share.

    Args:
        cond: conditions of a batch as they are stored.
        null: its null conditions as they are stored.
        own: those that are the condition itself.
        first: what this function gave for the first batch of the shard, which must be the same.

    Raises:
        ValueError: a null condition that is not the same for all samples.
    """
    shared = {name: value[:1] for name, value in null.items() if name not in own}
    expected = {**cond, **(shared if first is None else first)}
    for name, value in null.items():
        if name not in expected or not torch.equal(value, expected[name].expand_as(value)):
            raise ValueError(f"the null condition {name!r} changes from sample to sample, which shards cannot hold.")
    return shared


def check_finite(columns: Mapping[str, Tensor], numbers: Tensor, remedy: str) -> None:
    """Raises ValueError if a value is not finite in a column of a batch, the samples with these ``numbers`` ``(b,)``."""
    for name, value in columns.items():
        finite = torch.isfinite(value).reshape(len(value), -1).all(1)
        if not finite.all():
            raise ValueError(f"{name} of samples {numbers[~finite][:5].tolist()} is not finite: {remedy}.")
