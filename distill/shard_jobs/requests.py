"""What each draw is to show: the conditions of data, the lines of a file, or the teacher's classes, in turn."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.shards import Kind
from distill.denoiser import Denoiser
from distill.numbered_draws import NumberedDraws
from distill.shard_jobs.job import ShardJob
from distill.types import Batch, DataSpec, label_conditions

NOT_THE_SAMPLES = ("batch_size", "num_workers", "seed", "batches_per_epoch", "eval_samples", "eval_batch_size", "verify")


class Requests:
    """What each draw is to show: ``requests[numbers]`` is a batch of conditions and prompts, with samples only to be inverted.

    Args:
        kind: of what is drawn, to name it.
        draws: by what it is drawn.
        job: what is drawn.
        settings: of the data, for the header.
        invert: whether the data's own samples are wanted, each once.

    Attributes:
        spec: what the batches are; without data, ``shape`` is that of samples in model space.
        record: where they come from, for the header.
        count: how many are drawn.

    Raises:
        ValueError: no prompts in the file, no data where it is needed, a count that contradicts the data.
    """

    def __init__(self, kind: Kind, draws: NumberedDraws, job: ShardJob, settings: Any, invert: bool):
        self.invert, self.data, self.lines = invert, job.data, read_lines(job.prompts)
        if self.lines or self.data is None:
            shape = native_shape(draws.teacher) if self.data is None else draws.space.spec(self.data.spec).shape
            codec = (draws.space.identity["codec"] or {}).get("sha256")
            self.spec = DataSpec(shape, None if self.lines else draws.teacher.num_classes, bool(self.lines), codec=codec)
            self.record = {"prompts": hashlib.sha256("\n".join(self.lines).encode()).hexdigest()} if self.lines else {}
            self.period = len(self.lines)
        else:
            self.rows, self.items, self.spec = self.data.rows(), self.data.training_items(), self.data.spec
            kept = {key: value for key, value in settings.get("init_args", {}).items() if key not in NOT_THE_SAMPLES}
            self.record, self.period = {"class": type(self.data).__name__, **kept}, len(self.items)
        self.count = job.count or self.period
        if self.invert and (self.lines or self.data is None or self.count != self.period):
            remedy = "give data, prompts=null and count=null"
            raise ValueError(f"invert=true: {kind} are of the data's samples, each once; {remedy}.")
        if not self.count:
            raise ValueError(f"count=null: give the number of {kind}, or data.")

    def __getitem__(self, numbers: Tensor) -> Batch:
        if self.lines:
            return Batch(None, {}, {}, prompts=[self.lines[number % self.period] for number in numbers.tolist()])
        if self.data is None:
            classes = self.spec.num_classes
            return Batch(None, *(({}, {}) if classes is None else label_conditions(numbers % classes, classes)))
        batch = self.rows[self.items[numbers % self.period]]
        return batch if self.invert else replace(batch, x0=None)


def read_lines(file: str | None) -> list[str]:
    """The lines of a file that are not empty. Raises ValueError if there are none."""
    lines = [] if file is None else [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    if file is not None and not lines:
        raise ValueError(f"prompts={file!r}: the file holds no line of text.")
    return lines


def native_shape(teacher: Denoiser) -> tuple[int, ...]:
    """Shape of the samples that a teacher was made for. Raises ValueError if it does not say."""
    shape = getattr(getattr(teacher, "network", None), "native_shape", teacher.shape)
    if shape is None or None in shape:
        raise ValueError(f"data=null: the teacher works on samples of any size ({shape}); give data of the size wanted.")
    return tuple(shape)
