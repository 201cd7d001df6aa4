"""Indices of tars kept in files, so that training need not read the headers of all its shards.

A scan takes about 0.1 ms a file: 3 s for a tar of 10,000 samples of three files each, on one slow core. Tools write the index
when they make or check a tar, so that training only loads it. Of what is loaded training holds, in each rank, 8 bytes for each
member of a sample that it reads (16 in tars of 2 GiB or more): for pictures with captions 16 bytes a sample, 1.6 GB for 100
million.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from datamodules.tar_index import Problem, TarIndex, scan

FORMAT = 2
SUFFIX = ".index.npz"
DAMAGED = (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile)
"""What reading an index raises that is not there, or not whole."""


def read_index(file: str | Path, cache: str | Path | None = None) -> TarIndex:
    """The index of a tar, from the file that an earlier call left if the tar has not changed since (size, time of change).

    Many processes at once are fine. Where nothing can be written, the tar is scanned each time.

    Args:
        file: the tar.
        cache: folder of the index; beside the tar by default.

    Raises:
        FileNotFoundError, ValueError: see `scan`.
    """
    index = _load(Path(file), cache)
    return scan_and_keep(file, cache)[0] if index is None else index


def read_indices(files: Sequence[str | Path], cache: str | Path | None = None) -> Iterator[TarIndex]:
    """The indices of tars, one after another; for the rest see `read_index`. Says how many tars are to be scanned first.

    Processes that start together share that work, without a wait: each takes the tars in an order of its own, and leaves out
    those whose index another one has kept meanwhile.
    """
    missing = [file for file in files if not is_kept(file, cache)]
    if missing:
        rank_zero_info(
            f"data: indexing {len(missing)} shards that have no index yet (about 1 s for 10,000 files); tools/check_shards.py "
            "does so beforehand, in parallel"
        )
    random.SystemRandom().shuffle(missing)
    for file in missing:
        if is_kept(file, cache):
            continue
        if error := scan_and_keep(file, cache)[1]:
            rank_zero_warn(
                f"data.index_cache={cache}: the index of {file} cannot be kept ({error}): shards are scanned at each start, by "
                "each process. Set data.index_cache to a folder that can be written."
            )
            break
    for file in files:
        yield read_index(file, cache)


def scan_and_keep(file: str | Path, cache: str | Path | None = None) -> tuple[TarIndex, OSError | None]:
    """The index of a tar, whatever was kept before, and why it could not be kept; see `read_index`."""
    file = Path(file)
    stamp = _stamp(file)
    index = scan(file)
    if _stamp(file) != stamp:
        return index, OSError("the tar is being written to")
    try:
        _save(_kept(file, cache), index, stamp)
    except OSError as error:
        return index, error
    return index, None


def is_kept(file: str | Path, cache: str | Path | None = None) -> bool:
    """Whether there is an index of the tar as it is now."""
    try:
        with numpy.load(_kept(Path(file), cache), allow_pickle=False) as content:
            return content["stamp"].tolist() == _stamp(Path(file))
    except DAMAGED:
        return False


def kept_keys(file: str | Path, cache: str | Path | None = None) -> list[str]:
    """The keys of a tar's samples, as its index says, also one of a tar that has changed or gone since.

    Raises:
        FileNotFoundError, ValueError: no index, see `scan`.
    """
    try:
        with numpy.load(_kept(Path(file), cache), allow_pickle=False) as content:
            return list(json.loads(content["record"].tobytes())["keys"])
    except DAMAGED:
        return scan(file).keys


def _kept(file: Path, cache: str | Path | None) -> Path:
    """Where the index of a tar is kept; tars of one name in different folders do not share it."""
    if cache is None:
        return file.with_name(file.name + SUFFIX)
    return Path(cache) / f"{file.name}.{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:12]}{SUFFIX}"


def _stamp(file: Path) -> list[int]:
    """What tells one state of a tar from another; of what is no file, zeros."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return [FORMAT, 0, 0]
    return [FORMAT, found.st_size, found.st_mtime_ns]


def _load(file: Path, cache: str | Path | None) -> TarIndex | None:
    """The index that was kept, or None if it is damaged or another tar's."""
    try:
        with numpy.load(_kept(file, cache), allow_pickle=False) as content:
            stamp = _stamp(file)
            if content["stamp"].tolist() != stamp:
                return None
            record: dict[str, Any] = json.loads(content["record"].tobytes())
            places = content["places"]
        if places.shape != (len(record["keys"]), len(record["names"]), 2):
            return None
        return TarIndex(
            file, stamp[1], record["keys"], record["names"], places, [Problem(**problem) for problem in record["problems"]]
        )
    except DAMAGED:
        return None


def _save(kept: Path, index: TarIndex, stamp: list[int]) -> None:
    """Writes beside the target, then renames. Who may read it is the umask's to say."""
    problems = [asdict(problem) for problem in index.problems]
    record = json.dumps({"keys": index.keys, "names": index.names, "problems": problems}).encode()
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.{secrets.token_hex(8)}.partial")  # other nodes have processes of the same number
    try:
        with open(partial, "xb") as file:
            numpy.savez(file, stamp=numpy.array(stamp), record=numpy.frombuffer(record, numpy.uint8), places=index.places)
        os.replace(partial, kept)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
