"""An order of training that is a pure function of (seed, position), and reads few shards at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy

from datamodules.order import permutation


class GroupedOrder:
    """The permutations of all samples, one after another without end, each of which reads few shards at a time.

    A pass permutes the shards and takes ``group`` of them at a time, whose samples it mixes.

    Args:
        sizes: samples of each shard, at least one in all.
        group: shards whose samples are mixed.
        seed: of the order.
    """

    def __init__(self, sizes: list[int], group: int, seed: int):
        self.sizes, self.group, self.seed = numpy.array(sizes, numpy.int64), group, seed
        self.starts = numpy.cumsum(self.sizes) - self.sizes
        self.size, self.groups = int(self.sizes.sum()), -(-len(sizes) // group)
        self._shards = lru_cache(maxsize=2)(self._shards_of)
        self._items = lru_cache(maxsize=4)(self._items_of)

    def __reduce__(self) -> tuple[type[GroupedOrder], tuple[list[int], int, int]]:
        return GroupedOrder, (self.sizes.tolist(), self.group, self.seed)

    def items(self, positions: Iterable[int]) -> list[int]:
        """The samples at these positions."""
        return [self._item(position) for position in positions]

    def _item(self, position: int) -> int:
        number, offset = divmod(position, self.size)
        _, ends = self._shards(number)
        group = int(numpy.searchsorted(ends, offset, side="right"))
        return int(self._items(number, group)[offset - (ends[group - 1] if group else 0)])

    def _shards_of(self, number: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Pass ``number``: the shards ``(n,)`` in their order, and at which offset each group ends."""
        shards = permutation(len(self.sizes), self.seed, number * (self.groups + 1)).numpy()
        sizes = numpy.add.reduceat(self.sizes[shards], numpy.arange(0, len(shards), self.group))
        return shards, numpy.cumsum(sizes)

    def _items_of(self, number: int, group: int) -> numpy.ndarray:
        """The samples of a group in their order."""
        shards = self._shards(number)[0][group * self.group : (group + 1) * self.group]
        items = numpy.concatenate([self.starts[shard] + numpy.arange(self.sizes[shard]) for shard in shards])
        return items[permutation(len(items), self.seed, number * (self.groups + 1) + 1 + group).numpy()]
