"""WebDataset shards: images, stored latents, pairs or prompts, in an exact order or as a stream of resampled shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.kept_indices import read_indices
from datamodules.order import OrderedLoader, ResumableLoader, trained_batches
from datamodules.ordered import OrderedDataModule
from datamodules.streams.contents import Contents
from datamodules.streams.decoding import Bytes
from datamodules.streams.exact import IndexedSamples, NamedErrors, NumberedBatches
from datamodules.streams.grouped_order import GroupedOrder
from datamodules.streams.loading import CheckedLoader, Watched
from datamodules.streams.patterns import URL, expand
from datamodules.streams.rejects import CHECKED_AFTER, IN_A_ROW, Fetched, Rejected, Rejects, summary
from datamodules.streams.resampled import ResampledBatches, first_samples
from datamodules.streams.stored import LEARNT_FROM, StoredContents
from datamodules.streams.tar_stream import Raw, Shard
from distill.types import Batch, label_conditions

EVALUATED = 10_000
"""Samples of validation where it reads what is trained on."""


class WebDatasetDataModule(OrderedDataModule):
    """Samples of WebDataset shards as batches of `distill.types.Batch`.

    ``mode: exact``, for plain tars in files. Samples are numbered by an index of each tar, which is kept beside it. Each pass
    permutes the shards by (seed, pass) and mixes the samples of ``shuffle_shards`` of them at a time, so that reads stay within
    few files. For the rest see `OrderedDataModule`: the position is in the checkpoint, nothing is lost or repeated, also on
    another number of ranks, workers or with another batch size; augmentations depend on (seed, position) alone. In the place of
    a sample that is rejected comes the next good one of the order, which is hence seen once more in that pass. There may be
    fewer shards than ranks and workers.

    ``mode: resampled``, for any shards, pipes and URLs among them. Each worker of each rank draws shards with replacement,
    reads them from front to back and mixes them in a buffer: a pass has no end, and samples come once on average only, those of
    small shards more often. The draws are seeded by (seed, rank, worker, batches trained when the process began): a resumed run
    does not repeat what it began with, and does not go on with what the uninterrupted one would have seen.

    Rejected samples are counted by reason, see `datamodules.streams.rejects.Rejects`. Nothing is unpickled.

    Args:
        shards: braces (``{00000..00099}``), ``*``, local paths, ``pipe:COMMAND``, ``https://...``, or a list of such.
        contents: what a sample is.
        mode: see above.
        batch_size: training samples a batch on each rank.
        num_workers: processes that read and decode.
        seed: of the order, the draws, and the augmentations.
        batches_per_epoch: training batches of each rank in what Lightning calls an epoch, in both modes. In ``exact`` workers
            are started anew in each: give 1000 or more for large data.
        shuffle_shards: shards whose samples are mixed (exact).
        shuffle_buffer: undecoded samples of each worker among which the next one is drawn (resampled).
        max_reject_rate: share of rejected samples on a rank beyond which the run ends, once 100 were seen: of all, or of the
            last 10,000. Validation counts on its own.
        timeout: seconds without a batch after which the run ends, also for the examples; null for never.
        validation: data of validation, test, prediction and examples, whose settings are its own.
        validation_shards: or local shards of the same contents for these; null for evenly spaced samples of ``shards``.
        eval_samples: samples of validation, evenly spaced; null for all of ``validation_shards``, but for at most 10,000 of
            ``shards``. Not used with ``validation``.
        eval_batch_size: at most so many samples a batch on each rank in validation. Not used with ``validation``.
        index_cache: folder of the indices; null for beside the tars. tools/make_shards.py and tools/check_shards.py write them;
            those that are missing are made at the start.

    Raises:
        FileNotFoundError: a shard that is not there.
        ValueError: an argument out of its range, a mode that cannot read these shards or contents, shards without samples,
            more problems in their indices than ``max_reject_rate`` allows, ``validation`` of another kind than the samples.
    """

    def __init__(
        self,
        shards: str | list[str],
        contents: Contents,
        mode: Literal["exact", "resampled"],
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        batches_per_epoch: int = 100,
        shuffle_shards: int = 16,
        shuffle_buffer: int = 1000,
        max_reject_rate: float = 0.05,
        timeout: float | None = 600.0,
        validation: OrderedDataModule | None = None,
        validation_shards: str | list[str] | None = None,
        eval_samples: int | None = None,
        eval_batch_size: int = 300,
        index_cache: str | None = None,
    ):
        super().__init__(batch_size, num_workers, seed, batches_per_epoch, eval_batch_size)
        for key, value, least in (("shuffle_shards", shuffle_shards, 1), ("shuffle_buffer", shuffle_buffer, 0)):
            if value < least:
                raise ValueError(f"{key}={value}: give a number of at least {least}.")
        if timeout is not None and timeout <= 0 or eval_samples is not None and eval_samples < 1:
            raise ValueError(f"timeout={timeout}, eval_samples={eval_samples}: give positive numbers, or null.")
        if validation is not None and validation_shards is not None:
            raise ValueError("validation and validation_shards: give one of them; the other is null.")
        self.files, self.contents, self.mode, self.timeout = expand("shards", shards), contents, mode, timeout
        self.shuffle_shards, self.shuffle_buffer, self.index_cache = shuffle_shards, shuffle_buffer, index_cache
        self.validation, self.eval_samples = validation, eval_samples
        self.own_files = [] if validation_shards is None else expand("validation_shards", validation_shards)
        self.rejects, self._told = Rejects(max_reject_rate), False
        self.eval_rejects = Rejects(max_reject_rate, "data/validation_rejected")
        self._examples: dict[int, Batch] = {}
        self.problems: list[Rejected] = []
        if mode == "exact":
            self._refuse_what_has_no_numbers("mode=exact", "shards", self.files)
        self._bind()
        self.spec = contents.spec
        if mode == "exact":
            self.spread = GroupedOrder(self.indexed.sizes, shuffle_shards, seed)
        if validation is not None:
            self._check_validation(validation)

    def _bind(self) -> None:
        """Shows the contents what the first shard says of itself and, if that does not say all, its first samples."""
        contents, file = self.contents, self.files[0]
        leading = {} if contents.exact_by is None else self._in_time(Shard(file, contents).leading, lambda: f"reading {file}")
        contents.bind(file, leading)
        if isinstance(contents, StoredContents):

            def first() -> list[Mapping[str, Bytes]]:
                return [one.members for one in islice(Shard(file, contents), LEARNT_FROM) if isinstance(one, Raw)]

            contents.learn(self._in_time(first, lambda: f"reading {file}"))

    def _in_time(self, work: Callable[[], Any], reading: Callable[[], str]) -> Any:
        """What the work gives. Raises RuntimeError after ``timeout`` seconds."""
        return work() if self.timeout is None else next(Watched((work() for _ in range(1)), self.timeout, True, reading))

    def _refuse_what_has_no_numbers(self, what: str, key: str, files: list[str]) -> None:
        """Raises ValueError for shards, or contents, that cannot be read by number."""
        if self.contents.exact_by is not None:
            name = type(self.contents).__name__
            raise ValueError(f"{what}: {name} is a stream's; give {self.contents.exact_by}, or mode=resampled.")
        if url := next((name for name in files if URL.match(name)), None):
            raise ValueError(f"{what}: {key} names {url}, whose samples cannot be read by number; copy it to a file.")

    def _check_validation(self, other: OrderedDataModule) -> None:
        """Raises ValueError if validation data is of another kind than the samples; pixels beside latents are encoded."""
        for key in ("shape", "num_classes", "codec"):
            mine, its = getattr(self.spec, key), getattr(other.spec, key)
            if mine != its and (key == "num_classes" or self.spec.codec is None or other.spec.codec is not None):
                raise ValueError(f"validation delivers {key}={its}, shards {key}={mine}: give data of the same kind.")
        if self.spec.prompts and not other.spec.prompts and not other.spec.widths:
            raise ValueError("validation delivers no prompts, shards do: give data of the same kind.")

    # ------------------------------------------------------------------------------------------------ numbered samples

    @cached_property
    def indexed(self) -> IndexedSamples:
        """The samples of ``shards`` by number."""
        self._refuse_what_has_no_numbers("samples by number", "shards", self.files)
        return self._read_indices("shards", self.files)

    @cached_property
    def evaluated(self) -> IndexedSamples:
        """The samples of which validation reads some."""
        if not self.own_files:
            self._refuse_what_has_no_numbers("validation=null, validation_shards=null", "shards", self.files)
            return self.indexed
        self._refuse_what_has_no_numbers("validation", "validation_shards", self.own_files)
        return self._read_indices("validation_shards", self.own_files)

    def _read_indices(self, key: str, files: list[str]) -> IndexedSamples:
        """The samples of local tars. Raises ValueError if there are none, or too much is wrong."""
        samples = IndexedSamples(read_indices(files, self.index_cache), self.contents, self.index_cache)
        samples.opened = self._opened()
        problems, count = samples.problems(), len(samples)
        self.problems += problems
        too_many = count + len(problems) >= CHECKED_AFTER and len(problems) > self.rejects.max_rate * (count + len(problems))
        if not count or too_many:
            kinds = summary(Counter(one.reason for one in problems))
            more = f"more than max_reject_rate={self.rejects.max_rate}" if count else "no sample is left"
            raise ValueError(
                f"{key}: {count} samples in {len(files)} shards and {len(problems)} problems ({kinds}), "
                f"{more}: look at {problems[0].shard if problems else files[0]} by tools/check_shards.py."
            )
        return samples

    def _opened(self) -> Tensor:
        """The number of the shard that each worker reads, in memory that they share."""
        return torch.full((max(self.num_workers, 1),), -1).share_memory_()

    def rows(self) -> Dataset:
        return NamedErrors(lambda: self.indexed)

    def training_items(self) -> Tensor:
        return torch.arange(len(self.indexed))

    def evaluation_items(self) -> Tensor:
        size = len(self.evaluated)
        count = min(self.eval_samples or (size if self.own_files else EVALUATED), size)
        return torch.arange(count) * size // count

    def order(self) -> dict[str, Any]:
        """The mode; of the exact order what it depends on, the shards among it, wherever they lie."""
        mode = {"mode": self.mode}
        if self.mode == "resampled":
            return mode
        return mode | {"shuffle_shards": self.shuffle_shards, "shards": f"(sha256 {self.indexed.digest})"} | super().order()

    # ---------------------------------------------------------------------------------------------------------- loaders

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.validation is not None:
            self.validation.trainer = self.trainer  # for its rank

    def train_dataloader(self) -> ResumableLoader:
        loader = super().train_dataloader()
        rank, ranks = self.ranks
        if not self._told:
            rank_zero_info(self.shard_map())
            self._told = True
        if self.mode == "exact":
            batches: Dataset = NumberedBatches(self.indexed, self.spread, self.seed)
            return self._checked(batches, loader.order, len(loader), self.indexed.opened, self.files, self.rejects)
        opened, seed = self._opened(), (self.seed, rank, trained_batches(self.trainer))
        batches = ResampledBatches(self.files, self.contents, self.batch_size, self.shuffle_buffer, seed, opened)
        return self._checked(batches, None, len(loader), opened, self.files, self.rejects)

    def _next_batches(self) -> list[Tensor]:
        """The positions in the order of this rank's next ``batches_per_epoch`` batches."""
        rank, ranks = self.ranks
        first, step = self.consumed + rank * self.batch_size, self.batch_size * ranks
        starts = range(first, first + self.batches_per_epoch * step, step)
        return [torch.arange(start, start + self.batch_size) for start in starts]

    def _checked(
        self, batches: Dataset, order: Any, length: int, opened: Tensor, files: list[str], rejects: Rejects
    ) -> CheckedLoader:
        """A loader whose batches are counted; the problems of the indices are named before its first one."""
        if self.ranks[0] == 0:  # all ranks read the same indices
            self.rejects.note(self.problems, self.trainer)
        self.problems = []

        def receive(fetched: Fetched) -> Batch:
            return self._receive(fetched, rejects, f"the last {IN_A_ROW} one after another")

        return CheckedLoader(
            batches, order, length, self.num_workers, receive, self.timeout, lambda: self._reading(opened, files)
        )

    def _reading(self, opened: Tensor, files: list[str]) -> str:
        """Which shard each worker reads."""
        found = {worker: files[number] for worker, number in enumerate(opened.tolist()) if number >= 0}
        names = ", ".join(f"worker {worker} reads {name}" for worker, name in found.items())
        return f"rank {self.ranks[0]}, {names or 'no shard was opened'}"

    def _receive(self, fetched: Fetched, rejects: Rejects, otherwise: str) -> Batch:
        """The batch. Raises RuntimeError beyond the rate of rejects, or, saying ``otherwise``, if there is none."""
        rejects.add(fetched.seen, fetched.rejected, self.trainer)
        if fetched.batch is None:
            raise rejects.error(otherwise, self.trainer)
        return self.contents.delivered(fetched.batch)

    def shard_map(self) -> str:
        """What is read by whom, in one line."""
        ranks, workers = self.ranks[1], max(self.num_workers, 1)
        who = f"{ranks} rank{'s' * (ranks > 1)} with {workers} reader{'s' * (workers > 1)} each"
        files = f"data: {len(self.files)} shards ({self.files[0]} ... {self.files[-1]})"
        if self.mode == "resampled":
            return f"{files}, resampled: {who} draw shards with replacement, {self.batches_per_epoch} batches an epoch"
        mixed = min(self.shuffle_shards, len(self.files))
        return (
            f"{files}, {len(self.indexed)} samples, exact: {who} share batches of {ranks * self.batch_size} in one order, "
            f"{mixed} shards at a time; a pass is {len(self.indexed) / (ranks * self.batch_size):.1f} batches"
        )

    # ------------------------------------------------------------------------------------------------------- evaluation

    @property
    def eval_batch_size(self) -> int:
        return super().eval_batch_size if self.validation is None else self.validation.eval_batch_size

    def val_dataloader(self) -> OrderedLoader:
        return self._evaluation(super().val_dataloader()) if self.validation is None else self.validation.val_dataloader()

    def held_out_dataloader(self) -> OrderedLoader:
        if self.validation is not None:
            return self.validation.held_out_dataloader()
        return self._evaluation(super().held_out_dataloader())

    def _evaluation(self, loader: OrderedLoader) -> CheckedLoader:
        samples, files = self.evaluated, self.own_files or self.files
        numbered = NumberedBatches(samples)
        return self._checked(numbered, loader.order, len(loader), samples.opened, files, self.eval_rejects)

    def examples(self, count: int) -> Batch:
        """The classes in turn, if the class is the only condition; else the conditions of evenly spaced, or first, samples."""
        if self.validation is not None:
            return self.validation.examples(count)
        if self.spec.num_classes is not None and not self.spec.prompts and not self.spec.widths:
            return Batch(None, *label_conditions(torch.arange(count) % self.spec.num_classes, self.spec.num_classes))
        if count not in self._examples:
            batch = self._first(count) if self.mode == "resampled" else self._spaced(count)
            self._examples[count] = Batch(None, batch.cond, batch.null, prompts=batch.prompts)
        return self._examples[count]

    def _spaced(self, count: int) -> Batch:
        """The samples next to evenly spaced numbers that are good."""
        samples, files = self.evaluated, self.own_files or self.files
        items = torch.arange(count) * len(samples) // count
        fetched = self._in_time(lambda: NumberedBatches(samples)[items], lambda: self._reading(samples.opened, files))
        return self._receive(fetched, self.eval_rejects, f"the last {IN_A_ROW} one after another")

    def _first(self, count: int) -> Batch:
        """The first good samples of the shards, again and again if there are too few."""
        opened = torch.full((1,), -1)
        fetched = self._in_time(
            lambda: first_samples(self.files, self.contents, count, opened), lambda: self._reading(opened, self.files)
        )
        return self._receive(fetched, self.rejects, "the first ones of the shards")

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
