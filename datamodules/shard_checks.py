"""What is wrong with shards of samples, and what is in them: every member of every tar is read and decoded.

By the endings of their names; or as training would decode them, by `datamodules.streams.contents`. Reasons are the words that
training counts rejected samples under.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.kept_indices import scan_and_keep
from datamodules.members import from_json, from_text
from datamodules.streams.contents import Contents
from datamodules.streams.decoding import FORMATS, check_finite, decode_picture, read_array
from datamodules.streams.exact import IndexedSamples
from datamodules.streams.rejects import Reject, Rejected
from datamodules.tar_index import TarIndex

Problem = tuple[str, str, str]
"""Reason, key (empty where the whole tar is meant), and detail."""
PARTS = {"txt": "caption", "cls": "label"} | dict.fromkeys(FORMATS, "image")
"""What a member is to its sample, if not its ending: pictures may be in this format or that."""


@dataclass
class ShardReport:
    """What was found in one tar.

    Attributes:
        file: the tar.
        bytes: of it.
        keys: of its samples.
        members: number of samples that have a member, by its ending.
        pictures: number of pictures by format, mode and size (``PNG RGB 256x256``).
        arrays: keys of the samples, by the ending and by type and shape (``float32 [4, 64, 64]``).
        lacking: keys of the samples that lack what others of the tar have, by what it is.
        problems: what is wrong.
        unkept: why its index could not be kept, empty if it was.
    """

    file: str
    bytes: int = 0
    keys: list[str] = field(default_factory=list)
    members: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    arrays: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unkept: str = ""


def check_shard(
    file: str, most_pixels: int, contents: Contents | None = None, index_cache: str | None = None
) -> ShardReport:
    """What one tar says without the others. Raises nothing: what cannot be read is among the problems. Keeps its index.

    Args:
        file: the tar.
        most_pixels: a picture of more is wrong.
        contents: what a sample is in training; None for a look at each member by itself.
        index_cache: folder of the index; None for beside the tar.
    """
    report = ShardReport(file)
    try:
        index, unkept = scan_and_keep(file, index_cache)
        report.unkept = "" if unkept is None else str(unkept)
        report.bytes, report.keys = index.size, index.keys
        report.problems = [(problem.reason, problem.key, problem.detail) for problem in index.problems]
        _read_members(report, index, most_pixels)
        if contents is not None:
            _read_samples(report, index, contents, index_cache)
        _compare_manifest(report)
    except FileNotFoundError:
        report.problems.append(("missing", "", "there is no such file"))
    except (OSError, ValueError) as error:
        report.problems.append(("unreadable", "", str(error)))
    return report


# ------------------------------------------------------------------------------------------------------ inside one tar


def _read_members(report: ShardReport, index: TarIndex, most_pixels: int) -> None:
    parts = {PARTS.get(name, name) for name in index.names}
    report.lacking = {part: [] for part in parts}
    with open(report.file, "rb") as stream:
        for key, places in zip(index.keys, index.places.tolist()):
            there = [(name, *place) for name, place in zip(index.names, places) if place[0] >= 0]
            report.members.update(name for name, _, _ in there)
            for part in parts - {PARTS.get(name, name) for name, _, _ in there}:
                report.lacking[part].append(key)
            for name, begin, size in there:
                if not size:
                    continue  # the index has said so
                stream.seek(begin)
                try:
                    _look(report, key, name, stream.read(size), most_pixels)
                except Reject as reject:
                    report.problems.append((reject.reason, key, f"{name}: {reject.detail}"))


def _look(report: ShardReport, key: str, name: str, content: bytes, most_pixels: int) -> None:
    """Decodes one member by its ending, and notes what it is. Raises Reject."""
    kind = name.rpartition(".")[2]
    if kind in FORMATS:
        report.pictures[_picture(content, most_pixels)] += 1
    elif kind == "npy":
        array = check_finite(read_array(content))
        report.arrays.setdefault(name, {}).setdefault(f"{array.dtype} {list(array.shape)}", []).append(key)
    elif kind == "json":
        _parse(content, from_json, "bad json")
    elif kind == "cls":
        _parse(content, lambda members: int(members[0]), "bad label")
    elif kind == "txt":
        _parse(content, from_text, "bad caption")


def _picture(content: bytes, most_pixels: int) -> str:
    """Format, mode and size of a picture that can be read whole. Raises Reject."""
    from PIL import Image

    decode_picture(content, 3, most_pixels)
    with Image.open(io.BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
        return f"{image.format} {image.mode} {image.width}x{image.height}"


def _parse(content: bytes, by: Callable[[list[bytes]], Any], reason: str) -> None:
    try:
        by([content])
    except (ValueError, RecursionError) as error:
        raise Reject(reason, error) from error


def _read_samples(report: ShardReport, index: TarIndex, contents: Contents, index_cache: str | None) -> None:
    """Decodes each sample as training does, and notes what no look at its members alone has found."""
    samples, known = IndexedSamples([index], contents, index_cache), {key for _, key, _ in report.problems}
    for number, key in enumerate(index.keys):
        one = samples.decode(number, None)
        if isinstance(one, Rejected) and key not in known:
            report.problems.append((one.reason, key, one.detail))


def _compare_manifest(report: ShardReport) -> None:
    """Notes what the manifest beside a tar says otherwise, if there is one."""
    path = Path(report.file).with_suffix(".json")
    if not path.is_file():
        return
    with open(report.file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    found = {"bytes": report.bytes, "sha256": digest, "count": len(report.keys)}
    try:
        manifest = json.loads(path.read_text())
        wrong = [f"{key} {value}, {path.name} says {manifest[key]}" for key, value in found.items() if manifest[key] != value]
    except (ValueError, LookupError, TypeError) as error:
        wrong = [f"{path.name} is no manifest ({error!r})"]
    report.problems += [("other than its manifest", "", words) for words in wrong]


# ---------------------------------------------------------------------------------------------------------- among tars


def compare(reports: list[ShardReport]) -> None:
    """Adds to the reports what only all of them tell: keys that others have, members that most samples have, other shapes."""
    total, whose = sum(len(report.keys) for report in reports), dict[str, str]()
    have, shapes = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for report in reports:
        have.update({part: len(report.keys) - len(keys) for part, keys in report.lacking.items()})
        for name, found in report.arrays.items():
            shapes[name].update({shape: len(keys) for shape, keys in found.items()})
    expected = [part for part, count in have.items() if 2 * count > total]
    usual = {name: counts.most_common(1)[0][0] for name, counts in shapes.items()}
    for report in reports:
        known = {(reason, key) for reason, key, _ in report.problems}
        for key in report.keys:
            if whose.setdefault(key, report.file) != report.file:
                report.problems.append(("duplicate key", key, f"also in {whose[key]}"))
        for part in expected:
            lacking = [key for key in report.lacking.get(part, report.keys) if (f"no {part}", key) not in known]
            report.problems += [(f"no {part}", key, "most samples have one") for key in lacking]
        for name, found in report.arrays.items():
            other = [(shape, key) for shape, keys in found.items() if shape != usual[name] for key in keys]
            report.problems += [
                ("other shape", key, f"{name} is {shape}, most are {usual[name]}")
                for shape, key in other
                if ("other shape", key) not in known
            ]


def by_reason(reports: list[ShardReport]) -> dict[str, list[tuple[str, str, str]]]:
    """Shard, key and detail of the problems of each reason."""
    found = defaultdict(list)
    for report in reports:
        for reason, key, detail in report.problems:
            found[reason].append((report.file, key, detail))
    return dict(sorted(found.items()))
