"""A stream of batches without end: shards drawn with replacement, read from front to back, mixed in a buffer."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.streams.contents import Contents, Row
from datamodules.streams.decoding import Draws
from datamodules.streams.rejects import IN_A_ROW, Fetched, Reject, Rejected
from datamodules.streams.tar_stream import Raw, Shard
from datamodules.tar_index import PARTS


def decoded(raw: Raw, contents: Contents, draws: Draws | None) -> Row | Rejected:
    """A sample, or why it cannot be used."""
    try:
        if empty := [name for name, content in raw.members.items() if not content]:
            raise Reject("zero size", f"{empty[0]} has no bytes")
        return contents.decode(raw.members, draws)
    except Reject as reject:
        dotted = [name for name in raw.others if "." in name and name.rpartition(".")[2] in PARTS]
        if reject.reason.startswith("no ") and dotted:
            reject = Reject("dotted key", f"{raw.key}.{dotted[0]}: a key ends at its first dot; rename it without dots")
        return Rejected(raw.shard, raw.key, reject.reason, reject.detail)


def first_samples(shards: list[str], contents: Contents, count: int, opened: Tensor) -> Fetched:
    """The first good samples of the shards, without augmentation, again and again if there are fewer than ``count``.

    After ``IN_A_ROW`` rejected ones no more are looked for; None where there is no good one.
    """
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for one in _in_turn(shards, contents, opened):
        if isinstance(one, Rejected):
            rejected.append(one)
        else:
            rows.append(one)
        if len(rows) == count or len(rejected) == IN_A_ROW:
            break
    batch = contents.batch([rows[number % len(rows)] for number in range(count)]) if rows else None
    return Fetched(batch, len(rows) + len(rejected), rejected)


def _in_turn(shards: list[str], contents: Contents, opened: Tensor) -> Iterator[Row | Rejected]:
    for number, shard in enumerate(shards):
        opened[0] = number
        for one in Shard(shard, contents):
            yield decoded(one, contents, None) if isinstance(one, Raw) else one


class _NothingGood(Exception):
    """No shard gives a sample."""


class ResampledBatches(IterableDataset):
    """Batches without end, of shards drawn with replacement. Each rank and worker draws its own.

    Args:
        shards: paths and URLs.
        contents: what a sample is.
        batch_size: samples a batch.
        buffer: undecoded samples among which the next one is drawn.
        seed: words that seed the draws, with the worker's number: the run's seed, the rank, the batches trained so far.
        opened: receives the number of the shard that each worker reads.
    """

    def __init__(
        self,
        shards: list[str],
        contents: Contents,
        batch_size: int,
        buffer: int,
        seed: tuple[int, ...],
        opened: Tensor,
    ):
        self.shards, self.contents, self.batch_size, self.buffer = shards, contents, batch_size, buffer
        self.seed, self.opened = seed, opened

    def __iter__(self) -> Iterator[Fetched]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        words = numpy.random.SeedSequence((*self.seed, worker)).generate_state(4)
        draws = random.Random(int.from_bytes(words.tobytes(), "little"))
        rejected: list[Rejected] = []
        rows: list[Row] = []
        samples, bad = self._mixed(draws, worker, rejected), 0
        while bad < IN_A_ROW:
            try:
                one = decoded(next(samples), self.contents, (draws.random(), draws.random(), draws.random()))
            except _NothingGood:
                break
            if isinstance(one, Rejected):
                rejected.append(one)
                bad += 1
                continue
            rows.append(one)
            bad = 0
            if len(rows) == self.batch_size:
                yield Fetched(self.contents.batch(rows), len(rows) + len(rejected), list(rejected))
                rows.clear()
                rejected.clear()
        yield Fetched(None, len(rows) + len(rejected), rejected)

    def _mixed(self, draws: random.Random, worker: int, rejected: list[Rejected]) -> Iterator[Raw]:
        """Undecoded samples, drawn from a buffer that the shards fill; what is wrong with shards goes to ``rejected``."""
        buffer: list[Raw] = []
        for raw in self._read(draws, worker, rejected):
            if len(buffer) < self.buffer:  # filled before the first one leaves: a batch of one shard's neighbours is no draw
                buffer.append(raw)
                continue
            if buffer:
                place = draws.randrange(len(buffer))
                buffer[place], raw = raw, buffer[place]
            yield raw

    def _read(self, draws: random.Random, worker: int, rejected: list[Rejected]) -> Iterator[Raw]:
        """Undecoded samples, shard by shard. Raises _NothingGood if shards have given none for long."""
        bad = 0
        while True:
            number = draws.randrange(len(self.shards))
            self.opened[worker] = number
            for one in Shard(self.shards[number], self.contents):
                if isinstance(one, Raw):
                    bad = 0
                    yield one
                    continue
                rejected.append(one)
                bad += 1
                if bad == IN_A_ROW:
                    raise _NothingGood
