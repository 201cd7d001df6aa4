"""Samples of plain tars by number over all of them, and batches in which none is missing."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from datamodules.kept_indices import kept_keys
from datamodules.shards import OpenFiles
from datamodules.streams.contents import Contents, Row
from datamodules.streams.decoding import Bytes, Draws
from datamodules.streams.grouped_order import GroupedOrder
from datamodules.streams.rejects import IN_A_ROW, Fetched, Reject, Rejected
from datamodules.tar_index import TarIndex
from distill.types import Batch

MOST_BYTES = 1 << 29
"""Of one member: a larger one is rejected unread."""
KEYS_KEPT = 16
"""Shards whose keys are held, once they were looked up: as many as are mixed by default."""
AUGMENTATION = 1
"""Sets the draws of augmentations apart from those of the order, whose SeedSequence has no spawn key."""


class IndexedSamples:
    """The samples of plain tars, numbered over all of them and read at any time.

    Of the indices the places of wanted members alone are held; the key of a sample is looked up when it is to be named.

    Args:
        indices: of the tars; taken one by one.
        contents: what a sample is.
        cache: folder of the indices, see `datamodules.kept_indices.read_index`.

    Attributes:
        digest: a hash of names, sizes and keys of the shards, wherever they lie.
    """

    def __init__(self, indices: Iterable[TarIndex], contents: Contents, cache: str | Path | None = None):
        self.contents, self.cache, self.files = contents, cache, OpenFiles()
        self.indices: list[TarIndex] = []
        self.sizes: list[int] = []
        digest = hashlib.sha256()
        for index in indices:
            heading = f"{index.file.name} {index.size} {len(index.keys)}\n"
            digest.update((heading + "\n".join(index.keys)).encode(errors="surrogateescape"))  # names need be no UTF-8
            self.indices.append(_wanted(index, contents))
            self.sizes.append(len(index.keys))
        self.digest = digest.hexdigest()[:12]
        self.ends = numpy.cumsum(self.sizes).tolist()
        self.columns = [[(name, column) for column, name in enumerate(index.names)] for index in self.indices]
        self.opened = torch.full((1,), -1)
        self._keys: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def key(self, shard: int, row: int) -> str:
        """The key of a sample of a shard, or its number in it, if neither the shard nor its index is there any more."""
        if shard not in self._keys:
            if len(self._keys) == KEYS_KEPT:
                del self._keys[next(iter(self._keys))]
            try:
                self._keys[shard] = kept_keys(self.indices[shard].file, self.cache)
            except (OSError, ValueError):
                self._keys[shard] = []
        keys = self._keys[shard]
        return keys[row] if row < len(keys) else f"number {row}"

    def problems(self) -> list[Rejected]:
        """What the tars lack, but for members without bytes, which are rejected when they are read."""
        return [
            Rejected(str(index.file), problem.key, problem.reason, problem.detail)
            for index in self.indices
            for problem in index.problems
            if problem.reason != "zero size"
        ]

    def decode(self, item: int, draws: Draws | None) -> Row | Rejected:
        """The sample with this number, or why it cannot be used."""
        shard = bisect_right(self.ends, item)
        index, row = self.indices[shard], item - self.ends[shard] + self.sizes[shard]
        worker = get_worker_info()
        self.opened[0 if worker is None else worker.id] = shard
        try:
            return self.contents.decode(self._members(shard, row), draws)
        except Reject as reject:
            return Rejected(str(index.file), self.key(shard, row), reject.reason, reject.detail)

    def _members(self, shard: int, row: int) -> dict[str, Bytes]:
        index = self.indices[shard]
        members: dict[str, Bytes] = {}
        places = index.places[row].tolist()
        for name, column in self.columns[shard]:
            begin, size = places[column]
            if begin < 0:
                continue
            if not 0 < size <= MOST_BYTES:
                raise Reject("huge" if size else "zero size", f"{name} has {size} bytes")
            try:
                members[name] = content = self.files.read(index.file, begin, size)
            except OSError as error:
                raise Reject("missing" if isinstance(error, FileNotFoundError) else "unreadable", error) from error
            if len(content) < size:
                raise Reject("truncated", f"{name}: {len(content)} of {size} bytes are there")
        return members


def _wanted(index: TarIndex, contents: Contents) -> TarIndex:
    """The index without keys, and without the members that are not read."""
    columns = [column for column, name in enumerate(index.names) if contents.wants(name)]
    places = index.places[:, columns].astype(numpy.int32 if index.size < 2**31 else numpy.int64)
    return replace(index, keys=[], names=[index.names[column] for column in columns], places=places)


class NumberedBatches(Dataset):
    """Batches of `IndexedSamples`, with the next good sample of the order in the place of each that is rejected.

    Hence the sample that is delivered for a position, and how it is augmented, depends on nothing but the position: neither on
    ranks nor workers nor the size of a batch.

    Args:
        samples: that are numbered.
        order: the samples at positions; None for the samples as they are numbered.
        seed: of augmentations; None for none.
    """

    def __init__(self, samples: IndexedSamples, order: GroupedOrder | None = None, seed: int | None = None):
        self.samples, self.order = samples, order
        self.seed = seed if samples.contents.random else None

    def __getitem__(self, positions: Tensor) -> Fetched:
        """The batch at the positions ``(b,)``."""
        wanted = positions.tolist()
        found = list(self.decoded(wanted))
        rejected = [one for one in found if isinstance(one, Rejected)]
        beyond: list[Rejected] = []
        following: Row | None = None
        if isinstance(found[-1], Rejected):
            for one in self.decoded(range(wanted[-1] + 1, wanted[-1] + 1 + IN_A_ROW)):
                if not isinstance(one, Rejected):
                    following = one
                    break
                beyond.append(one)
            if following is None:
                return Fetched(None, len(found) + len(beyond), rejected + beyond)
        rows: list[Row] = []
        for one in reversed(found):
            following = following if isinstance(one, Rejected) else one
            assert following is not None
            rows.append(following)
        return Fetched(self.samples.contents.batch(rows[::-1]), len(found), rejected)

    def decoded(self, positions: Iterable[int]) -> Iterator[Row | Rejected]:
        """The samples at these positions, or why they cannot be used."""
        for position in positions:
            item = position % len(self.samples) if self.order is None else self.order.items([position])[0]
            yield self.samples.decode(item, None if self.seed is None else draws_at(self.seed, position))


class NamedErrors(Dataset):
    """Batches of samples by number, for tools: one that cannot be used is an error.

    Args:
        samples: called for `IndexedSamples` when the first batch is asked for.
    """

    def __init__(self, samples: Callable[[], IndexedSamples]):
        self.samples = samples

    def __getitem__(self, items: Tensor) -> Batch:
        """The batch of the samples ``items`` ``(b,)``. Raises ValueError, naming shard, key and reason."""
        samples, rows = self.samples(), []
        for item in items.tolist():
            one = samples.decode(item, None)
            if isinstance(one, Rejected):
                raise ValueError(
                    f"{one.shard}: sample {one.key}: {one.reason} ({one.detail}); see tools/check_shards.py and repair it."
                )
            rows.append(one)
        return samples.contents.delivered(samples.contents.batch(rows))


def draws_at(seed: int, position: int) -> Draws:
    """The numbers by which the sample at a position is augmented."""
    words = numpy.random.SeedSequence((seed, position), spawn_key=(AUGMENTATION,)).generate_state(3)
    across, down, turn = (words / 2**32).tolist()
    return across, down, turn
