"""Draws of a teacher, in the same whole batches however many shards there are, and what shards hold of them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from tqdm import tqdm

from datamodules.members import to_npy
from datamodules.shard_writing import check_finite, save_shard, shared_null
from datamodules.shards import EMBEDDINGS, Kind
from distill.checkpoints import atomic_writer
from distill.numbered_draws import NumberedDraws
from distill.shard_jobs.header import DRAWN_OWN_NULL, batch_range, make_header
from distill.shard_jobs.job import ShardJob
from distill.shard_jobs.requests import Requests
from distill.types import Batch, Cond

REMEDY = "compute in float32 (teacher.init_args.dtype), store in float32 (dtype), or take more steps"


class ShardWriter(ABC):
    """Draws batches and writes what shards hold of them.

    Args:
        draws: what is drawn by.
        job: how much, and how it is stored.
        settings: the whole config, as JSON has it.

    Attributes:
        kind: of the shards, also the plural of what is drawn; ``unit`` is one of them.
        stored_settings: the keys of a config that the header holds as they are.
        header: of the shards.

    Raises:
        ValueError: what is asked for contradicts itself; see `Requests` and `make_header`.
    """

    kind: ClassVar[Kind]
    unit: ClassVar[str]
    stored_settings: ClassVar[tuple[str, ...]]

    def __init__(self, draws: NumberedDraws, job: ShardJob, settings: dict[str, Any]):
        self.draws, self.job = draws, job
        self.requests = Requests(self.kind, draws, job, settings["data"], settings.get("invert", False))
        kept = {key: settings[key] for key in self.stored_settings}
        self.header = make_header(self.kind, draws, job, self.requests, kept)
        self.header |= self.own_header()

    @abstractmethod
    def own_header(self) -> dict[str, Any]:
        """What the header of this kind has besides. Raises ValueError for what cannot be stored as asked."""

    @abstractmethod
    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """What is stored of a batch by name, besides its conditions; numbers ``(b,)`` go into the record of each sample."""

    def record(self, number: int) -> dict[str, Any]:
        """What the record of a sample has besides numbers and prompt."""
        return {}

    def precision(self, name: str) -> str | None:
        """The type in which a floating array is stored that is no number a sample; None for float32."""
        return self.job.embeddings if name in EMBEDDINGS else None

    def encoder(self, name: str) -> tuple[str, Callable[[Tensor], bytes]]:
        """The name of an array's member, and what makes its bytes."""
        return f"{name}.npy", lambda value: to_npy(value.numpy())

    def draw(self, numbers: Tensor) -> Batch:
        """The samples of these draws ``(b,)`` on the CPU, with the conditions that are stored, and their prompts."""
        asked = self.requests[numbers]
        drawn = self.draws.draw(numbers, asked, tuple(self.header["shape"]))
        stored = {*asked.cond, "guidance"} if self.header["prompts"] else {*drawn.cond}
        cond, null = ({name: value for name, value in side.items() if name in stored} for side in (drawn.cond, drawn.null))
        prompts = asked.prompts and [prompt for prompt in asked.prompts for _ in range(self.draws.each)]
        return move_data_to_device(replace(drawn, cond=cond, null=null, prompts=prompts), torch.device("cpu"))

    def members(self, numbers: Tensor, batch: Batch) -> Iterator[dict[str, bytes]]:
        """The members of each sample of a batch, those with these numbers. Raises ValueError for a value that is not finite."""
        columns = {name: self.stored(name, value) for name, value in (self.columns(batch) | batch.cond).items()}
        check_finite(columns, numbers, REMEDY)
        arrays = [(*self.encoder(name), value) for name, value in columns.items() if value.ndim > 1]
        scalars = {name: value.tolist() for name, value in columns.items() if value.ndim == 1}
        for row, number in enumerate(numbers.tolist()):
            record = self.record(number) | {name: values[row] for name, values in scalars.items()}
            record |= {} if batch.prompts is None else {"prompt": batch.prompts[row]}
            yield {name: encode(value[row]) for name, encode, value in arrays} | {"json": json.dumps(record).encode()}

    def stored(self, name: str, value: Tensor) -> Tensor:
        """A column in the precision in which it is stored."""
        if not value.is_floating_point():
            return value
        return value.to(getattr(torch, (self.precision(name) if value.ndim > 1 else None) or "float32"))

    def null(self, batch: Batch, first: Cond | None = None) -> Cond:
        """The null conditions that all samples share, of any batch; see `shared_null`."""
        cond, null = ({key: self.stored(key, value) for key, value in side.items()} for side in (batch.cond, batch.null))
        return shared_null(cond, null, DRAWN_OWN_NULL, first)

    def draws_in(self, shard: int) -> range:
        """The numbers of the draws of a shard."""
        size, (first, end) = self.job.batch_size, batch_range(self.header, shard)
        return range(first * size, min(end * size, self.header["total"]))

    def write(self, shard: int, bar: tqdm) -> None:
        """Writes a shard and, when it is whole, its manifest."""
        numbers = self.draws_in(shard)
        batches = ((part, self.draw(part)) for part in torch.arange(numbers.start, numbers.stop).split(self.job.batch_size))
        opening = next(batches)
        null = self.null(opening[1])
        rows, first = self.rows(chain([opening], batches), null, bar), numbers.start * self.draws.each
        save_shard(self.job.out, atomic_writer, self.header | {"shard": shard}, null, first, rows)

    def rows(self, batches: Iterable[tuple[Tensor, Batch]], null: Cond, bar: tqdm) -> Iterator[dict[str, bytes]]:
        """The members of the samples of batches, whose shared null conditions must be those given."""
        each = torch.arange(self.draws.each)
        for numbers, batch in batches:
            self.null(batch, null)
            yield from self.members((numbers[:, None] * len(each) + each).flatten(), batch)
            bar.update(len(numbers))
