"""What a command draws and how it is stored, but for the teacher and its sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from datamodules.ordered import OrderedDataModule


@dataclass
class ShardJob:
    """What is drawn, how it is stored, and which part of it this command makes.

    Attributes:
        out: folder of the shards.
        data: whose conditions are drawn with, those of its training samples in turn; null for the teacher's classes in turn.
        prompts: a text file, a prompt a line, taken in turn instead of what the data says.
        count: how many are drawn; null for as many as the data has training samples, or the file lines.
        dtype: of samples that are stored as arrays.
        embeddings: how encoded prompts are stored; null to store the text alone, to be encoded in training.
        of: number of shards in all.
        shard: the one to make, 0 to OF - 1 (an array task's number); null for all.
        device: where to compute; null for the GPU, if there is one.
        batch_size: how many are drawn at once.

    Raises:
        ValueError: a number out of its range.
    """

    out: str
    data: OrderedDataModule | None = None
    prompts: str | None = None
    count: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    embeddings: Literal["float32", "float16"] | None = None
    of: int = 1
    shard: int | None = None
    device: str | None = None
    batch_size: int = 500

    def __post_init__(self) -> None:
        for key in ("count", "of", "batch_size"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key}={value}: give at least 1.")
        if self.shard is not None and not 0 <= self.shard < self.of:
            raise ValueError(f"--shard={self.shard}: give 0 to {self.of - 1}, there are {self.of} shards (--of).")

    @property
    def computing_device(self) -> str:
        """``device``, or what it stands for."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")
