"""A shard that is read from front to back, a file, a pipe or a URL, whatever its bytes are."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from datamodules.streams.contents import Contents
from datamodules.streams.exact import MOST_BYTES
from datamodules.streams.patterns import URL
from datamodules.streams.rejects import Reject, Rejected
from datamodules.tar_index import META, NAME, Header

READ_AT_ONCE = 1 << 18
WAIT = 10.0
"""Seconds for a command whose output has ended to end itself."""


class _Strict(Header):
    """Headers of a stream: one that cannot be read is an error, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        cut = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
        offset = archive.offset  # type: ignore[attr-defined]
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            if offset:
                reason = "truncated" if isinstance(error, cut) else "bad header"
                raise Reject(reason, f"{error}, at byte {offset}") from error
            raise Reject("empty" if "empty" in str(error) else "garbage", error) from error


@dataclass(frozen=True)
class Raw:
    """An undecoded sample; ``others`` are the endings of its members that were not read."""

    shard: str
    key: str
    members: dict[str, bytes]
    others: list[str]

    @property
    def endings(self) -> set[str]:
        """Of all its members."""
        return {*self.members, *self.others}


class Shard:
    """One shard that is read from front to back, whatever its bytes are.

    Args:
        name: path or URL.
        contents: which members are read, and what headers do.
    """

    def __init__(self, name: str, contents: Contents):
        self.name, self.contents = name, contents
        self.stream: Any = None

    def __iter__(self) -> Iterator[Raw | Rejected]:
        """Samples, and what is wrong with the shard. A sample that may be cut short is left out."""
        keys: set[str] = set()
        try:
            for one in self._grouped():
                if isinstance(one, Raw):
                    if one.key in keys:
                        one = self.rejected(one.key, Reject("duplicate key", "again in this shard, where it is left out"))
                    keys.add(one.key)
                yield one
        except Reject as reject:
            yield self.rejected("", self._of_command(reject))
        except FileNotFoundError as error:
            yield self.rejected("", Reject("missing", error))
        except tarfile.ReadError as error:
            known = self.stream is not None and "unexpected end" in str(error)
            yield self.rejected("", self._of_command(Reject("truncated" if known else "garbage", error)))
        except OSError as error:
            yield self.rejected("", Reject("unreadable", error))
        except Exception as error:  # of damaged headers tarfile raises a dozen kinds, of packed ones zlib's and lzma's
            yield self.rejected("", Reject("bad header", f"{type(error).__name__}: {error}"))
        finally:
            self._close()

    def rejected(self, key: str, reject: Reject) -> Rejected:
        """What becomes of a reject."""
        return Rejected(self.name, key, reject.reason, reject.detail)

    def members(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        """Name and header of each file in the shard, whose bytes can be read until the next one is asked for."""
        if URL.match(self.name):
            from webdataset.gopen import gopen

            self.stream = gopen(self.name)
        else:
            self.stream = open(self.name, "rb")
        with tarfile.open(fileobj=self.stream, mode="r|*", tarinfo=_Strict, bufsize=READ_AT_ONCE) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]
                if member.isreg():
                    yield member.name, member, archive

    def _grouped(self) -> Iterator[Raw | Rejected]:
        sample: Raw | None = None
        before: Raw | None = None
        try:
            for name, member, archive in self._checked():
                found = NAME.fullmatch(name)
                if found is None or META.match(name):
                    continue
                key, ending = found[1], found[2].lower()
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                        before = sample
                    sample = Raw(self.name, key, {}, [])
                yield from self._add(sample, name, ending, archive, member)
        except Exception:
            if sample is not None and before is not None and not before.endings - sample.endings:
                yield sample  # as whole as the one before: what is broken comes after it
            raise
        if sample is None:
            raise Reject("empty", "it holds no samples")
        yield sample

    def _checked(self) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
        """The files, after a look at the first one. Raises Reject for a shard of other contents."""
        for number, (name, member, archive) in enumerate(self.members()):
            if not number:
                self.contents.check_header(_read(archive, member) if name == "__header__" else None)
            yield name, member, archive

    def _add(
        self, sample: Raw, name: str, ending: str, archive: tarfile.TarFile, member: tarfile.TarInfo
    ) -> Iterator[Rejected]:
        """Puts a file into its sample, or says why not."""
        if not self.contents.wants(ending):
            sample.others.append(ending)
        elif ending in sample.members:
            yield self.rejected(sample.key, Reject("duplicate key", f"{name} is there twice, the first one is taken"))
        elif member.size > MOST_BYTES:
            sample.others.append(ending)
            yield self.rejected(sample.key, Reject("huge", f"{name} has {member.size} bytes"))
        else:
            sample.members[ending] = _read(archive, member)

    def leading(self) -> dict[str, bytes]:
        """``__header__`` and ``__null__``, with which shards of the tools begin, if they are there."""
        found: dict[str, bytes] = {}
        try:
            for name, member, archive in self.members():
                if not META.match(name):
                    break
                found[name] = _read(archive, member)
        except Exception as error:  # see __iter__
            raise ValueError(f"shards: {self.name}: cannot be read ({error}); see tools/check_shards.py.") from error
        finally:
            self._close()
        return found

    def _of_command(self, reject: Reject) -> Reject:
        """The reject, or that the command which gives the bytes failed."""
        process = getattr(self.stream, "proc", None)
        if process is not None:
            with suppress(Exception):
                if (code := process.wait(WAIT)) not in (0, 141, -13):
                    return Reject("unreadable", f"exit code {code}; {reject.reason}: {reject.detail}")
        return reject

    def _close(self) -> None:
        """Closes the shard, and ends its command, for which `close` would wait up to two hours."""
        if self.stream is not None:
            process = getattr(self.stream, "proc", None)
            if process is not None and process.poll() is None:
                process.kill()
            with suppress(OSError):  # of a command that was ended
                self.stream.close()


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return archive.extractfile(member).read()  # type: ignore[union-attr]
