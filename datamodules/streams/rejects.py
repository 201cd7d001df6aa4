"""Samples that cannot be used: each is skipped, counted by its reason and named once; too many of them end the run."""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from distill.types import Batch

IN_A_ROW = 1000
"""Rejected samples, one after another, after which no good one is expected any more."""
CHECKED_AFTER = 100
"""Samples, from which on a rate is one."""
WINDOW = 10_000
"""Samples, the last of which have a rate of their own: in a long run an outage would hardly change that of all."""
LINES_OF_A_REASON = 5
LINES_IN_FILE = 10_000
log = logging.getLogger("pytorch_lightning")


class Reject(Exception):
    """A sample, or what is left of a shard, that cannot be used.

    Args:
        reason: what it is counted under, a few words without names or figures.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, str(detail)[:300]


@dataclass(frozen=True)
class Rejected:
    """Where that was: shard, the sample's key (empty where the shard as a whole is meant), reason and detail."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass
class Fetched:
    """What a worker sends: a batch, or None where no good sample was left; samples looked at, and those that were rejected."""

    batch: Batch | None
    seen: int
    rejected: list[Rejected]


class Rejects:
    """Counts the rejected samples of one rank since its process began.

    Each is a line of ``RUN/rejected.jsonl`` (of ranks above 0 ``rejected_RANK.jsonl``) and, the first few of a reason, of the
    log, both once a process. Rank 0's total is logged under ``name``.

    Args:
        max_rate: share that may be rejected, of all samples and of the last ``WINDOW``.
        name: of the metric.

    Raises:
        ValueError: a share that is none.
    """

    def __init__(self, max_rate: float, name: str = "data/rejected"):
        if not 0 <= max_rate <= 1:
            raise ValueError(f"max_reject_rate={max_rate}: give a share of all samples, 0 to 1.")
        self.max_rate, self.name, self.seen, self.since_start = max_rate, name, 0, 0
        self.latest: deque[tuple[int, int]] = deque()
        self.latest_seen = self.latest_rejected = 0
        self.counts: Counter[str] = Counter()
        self.named: set[tuple[str, str, str]] = set()
        self.logged = (0, 0)

    def add(self, seen: int, rejected: list[Rejected], trainer: Trainer | None) -> None:
        """Counts the samples of a batch.

        Raises:
            RuntimeError: more than ``max_rate`` of all samples were rejected, of at least 100, or of the last ``WINDOW``.
        """
        self.seen, self.since_start = self.seen + seen, self.since_start + len(rejected)
        self._slide(seen, len(rejected))
        if rejected:
            self.note(rejected, trainer)
        if trainer is not None:
            self._log(trainer)
        if self.seen >= CHECKED_AFTER and self.since_start > self.max_rate * self.seen:
            raise self.error(f"more than data.max_reject_rate={self.max_rate}", trainer)
        if self.latest_seen >= CHECKED_AFTER and self.latest_rejected > self.max_rate * self.latest_seen:
            latest = f"{self.latest_rejected} of the last {self.latest_seen}"
            raise self.error(f"{latest}, more than data.max_reject_rate={self.max_rate}", trainer)

    def _slide(self, seen: int, rejected: int) -> None:
        """Takes a batch into the window, and out of it those before the last ``WINDOW`` samples."""
        self.latest.append((seen, rejected))
        self.latest_seen, self.latest_rejected = self.latest_seen + seen, self.latest_rejected + rejected
        while self.latest_seen - self.latest[0][0] >= WINDOW:
            gone = self.latest.popleft()
            self.latest_seen, self.latest_rejected = self.latest_seen - gone[0], self.latest_rejected - gone[1]

    def note(self, rejected: list[Rejected], trainer: Trainer | None) -> None:
        """Counts and names samples, without a look at the rate."""
        rank = 0 if trainer is None else trainer.global_rank
        fresh = []
        for one in rejected:
            self.counts[one.reason] += 1
            place = (one.shard, one.key, one.reason)
            if place not in self.named and len(self.named) < LINES_IN_FILE:
                self.named.add(place)
                fresh.append(one)
                if (count := self.counts[one.reason]) <= LINES_OF_A_REASON:
                    last = "; further ones are not shown here" if count == LINES_OF_A_REASON else ""
                    log.warning(f"rank {rank}: rejected {one.key or 'shard'} of {one.shard}: {one.reason} ({one.detail}){last}")
        if trainer is None:
            return
        if fresh:
            path = Path(trainer.default_root_dir) / (f"rejected_{rank}.jsonl" if rank else "rejected.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in fresh)

    def _log(self, trainer: Trainer) -> None:
        """Logs a total that has grown, not more often than the trainer logs."""
        (last, before), total, step = self.logged, self.counts.total(), trainer.global_step
        every = getattr(trainer, "log_every_n_steps")  # noqa: B009  (Lightning adds it where no type checker sees it)
        if total > before and (not before or step >= last + every):
            self.logged = (step, total)
            for logger in trainer.loggers:
                logger.log_metrics({self.name: float(total)}, step=step)

    def error(self, why: str, trainer: Trainer | None) -> RuntimeError:
        """The error to raise, which names the counts."""
        rank: Any = 0 if trainer is None else trainer.global_rank
        return RuntimeError(
            f"rank {rank}: {self.since_start} of {self.seen} samples were rejected ({summary(self.counts)}), {why}: look at "
            "rejected.jsonl in the run folder and at what tools/check_shards.py says of the shards, repair them, or raise "
            "data.max_reject_rate."
        )


def summary(counts: Counter[str]) -> str:
    """``9 bad image, 2 no caption``."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
