"""What a tar holds and where, read from its headers alone: samples by number, and what is wrong with it, in one walk.

Files are grouped into samples as WebDataset groups them: the key of ``folder/a.b.jpg`` is ``folder/a``, its ending ``b.jpg``;
files of one key lie side by side; names such as ``__header__``, and those without an ending, are no samples. Contents are not
read, nothing is extracted.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import numpy

Reason = Literal["empty", "garbage", "truncated", "bad header", "duplicate key", "dotted key", "zero size"]
REASONS: tuple[str, ...] = get_args(Reason)
BLOCK = tarfile.BLOCKSIZE
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")
PARTS = ("jpg", "jpeg", "png", "webp", "bmp", "txt", "json", "cls", "caption")
"""Endings of pictures, texts and labels: behind a dot, ``a.b.jpg``, they are more likely part of a key than of an ending."""
MOST_NAMES = 64
"""Endings that an index has columns for; more are a sign of keys with dots, and would make it as large as the tar."""
PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
LARGEST_NAME = 1 << 20
"""Bytes of a long name, which tarfile reads whole."""
BROKEN = (tarfile.TarError, ValueError, LookupError, ArithmeticError, TypeError, RecursionError)
"""What tarfile raises of headers that make no sense; OSError, which is the disk's, is not among them."""
Sample = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a tar.

    Attributes:
        reason: one of `REASONS`.
        key: of the sample, empty where the tar as a whole is meant.
        detail: what was found, in words.
    """

    reason: Reason
    key: str
    detail: str


@dataclass(frozen=True)
class TarIndex:
    """The samples of one tar, in their order in it.

    Attributes:
        file: the tar.
        size: its bytes.
        keys: of its ``n`` samples, no two the same.
        names: all endings, in lower case (``jpg``, ``x0.npy``).
        places: int64 ``(n, names, 2)``, where the bytes of each member begin and how many they are; -1 where a sample lacks it.
        problems: what is wrong, in the order of the tar; samples before a truncation or a bad header are in the index.
    """

    file: Path
    size: int
    keys: list[str]
    names: list[str]
    places: numpy.ndarray
    problems: list[Problem]


class Header(tarfile.TarInfo):
    """A header that cannot make tarfile walk backwards for ever, or read a tar whole as one name."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        name = header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *PAX)
        if header.size < 0 or header.type == tarfile.GNUTYPE_SPARSE or (name and header.size > LARGEST_NAME):
            raise tarfile.InvalidHeaderError("impossible")  # type: ignore[attr-defined]
        return header


class _Walk:
    """A walk over the headers of a tar, which collects samples and problems."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.size = file, size
        self.samples: dict[str, Sample] = {}
        self.problems: list[Problem] = []
        self.key: str | None = None
        self.repeated = False

    def problem(self, reason: Reason, key: str, detail: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(reason, key, detail))

    def run(self) -> None:
        """Walks to the end, or to the first header that cannot be read."""
        try:
            archive = tarfile.open(fileobj=self.file, mode="r:", tarinfo=Header)
        except BROKEN as error:
            self.file.seek(0)
            packed = " (it is compressed: numbered access needs a plain tar)" if self.file.read(2) == b"\x1f\x8b" else ""
            return self.problem("garbage" if self.size else "empty", "", (str(error) if self.size else "no bytes") + packed)
        member = archive.next()
        offset = -1
        while member is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            if archive.offset <= offset or member.size < 0 or member.issparse():  # type: ignore[attr-defined]
                return self._broken("bad header", f"{member.name}: sparse, or of size {member.size}")
            offset = archive.offset  # type: ignore[attr-defined]
            if member.offset_data + member.size > self.size:
                return self._cut(member)
            if member.isreg():
                self._add(member)
            try:
                member = archive.next()
            except BROKEN as error:
                return self._broken("bad header" if offset < self.size else "truncated", f"{error}, at byte {offset}")
        self._end(archive.offset)  # type: ignore[attr-defined]

    def _add(self, member: tarfile.TarInfo) -> None:
        """Puts a member into its sample."""
        found = NAME.fullmatch(member.name)
        if found is None or META.match(member.name):
            return
        key, ending = found[1], found[2].lower()
        if key != self.key:
            self.key, self.repeated = key, key in self.samples
            if self.repeated:
                self.problem("duplicate key", key, f"again at byte {member.offset}, where it is left out")
            else:
                self.samples[key] = {}
        if self.repeated:
            return
        if ending in self.samples[key]:
            return self.problem("duplicate key", key, f"{member.name} is there twice, the first one is taken")
        if not member.size:
            self.problem("zero size", key, f"{member.name} has no bytes")
        self.samples[key][ending] = (member.offset_data, member.size)

    def _cut(self, member: tarfile.TarInfo) -> None:
        """The tar ends within a member: the sample that it belongs to is not whole."""
        found = NAME.fullmatch(member.name)
        if found is not None and found[1] == self.key and not self.repeated:
            del self.samples[found[1]]
            self.key = None
        missing = member.offset_data + member.size - self.size
        self._broken("truncated", f"{member.name}: the last {missing} of its {member.size} bytes are missing")

    def _end(self, offset: int) -> None:
        """Looks at what follows the last member: two blocks of zeros are the end of a tar, and nothing after them."""
        self.file.seek(offset)
        rest = self.file.read(128 * BLOCK)
        if not rest[:BLOCK]:
            self._broken("truncated", f"it ends at byte {offset} without the blocks that end a tar")
        elif any(rest[:BLOCK]):
            self._broken("bad header" if len(rest) >= BLOCK else "truncated", f"no header at byte {offset}")
        elif any(rest):
            self.problem("bad header", "", f"the tar ends at byte {offset}, but more follows")

    def _broken(self, reason: Reason, detail: str) -> None:
        """Ends the walk; the last sample is left out if it lacks what the one before it has."""
        self.problem(reason, "", detail)
        last = list(self.samples.values())[-2:]
        if len(last) == 2 and last[0].keys() - last[1].keys():
            self.samples.popitem()


def scan(file: str | Path) -> TarIndex:
    """The index of a tar. Whatever its bytes are, this ends, and says what is wrong rather than raises.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, such as a pipe or a folder.
    """
    file = Path(file)
    if not file.exists():
        raise FileNotFoundError(f"{file}: there is no such shard.")
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file, whose samples could be numbered; give a tar.")
    with open(file, "rb") as stream:
        walk = _Walk(stream, os.fstat(stream.fileno()).st_size)
        walk.run()
    samples, names, dotted = _without_dotted(walk.samples)
    columns = {name: column for column, name in enumerate(names)}
    places = numpy.full((len(samples), len(names), 2), -1, numpy.int64)
    for row, sample in enumerate(samples.values()):
        for name, place in sample.items():
            places[row, columns[name]] = place
    problems = walk.problems + dotted
    if not samples and not problems:
        problems = [Problem("empty", "", "it holds no samples")]
    return TarIndex(file, walk.size, list(samples), names, places, problems)


def _without_dotted(samples: dict[str, Sample]) -> tuple[dict[str, Sample], list[str], list[Problem]]:
    """Samples without the members whose names tell of a key with a dot, the endings that are left, and these as problems.

    ``a.b.jpg`` is such a name where other files end in ``jpg``, unless most samples have a ``b.jpg``.
    """
    counts = Counter(name for sample in samples.values() for name in sample)
    tails = Counter(name.rpartition(".")[2] for name in counts)
    ordinary: list[str] = []
    for name, count in counts.most_common():
        tail = name.rpartition(".")[2]
        rare = name != tail and tail in PARTS and tails[tail] > 1 and (count == 1 or 2 * count <= len(samples))
        if not rare and len(ordinary) < MOST_NAMES:
            ordinary.append(name)
    if len(ordinary) == len(counts):
        return samples, sorted(ordinary), []
    kept, problems, known = {}, [], set(ordinary)
    for key, sample in samples.items():
        for name in sample.keys() - known:
            problems.append(Problem("dotted key", key, f"{key}.{name}: a key ends at its first dot; rename it without dots"))
        if left := {name: place for name, place in sample.items() if name in known}:
            kept[key] = left
    return kept, sorted(ordinary), problems
