"""The smallest network and data that a whole run can be made of, for tests of everything around the methods."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.base import DataModule
from distill.types import Batch, Cond, DataSpec, label_conditions


class TinyNetwork(nn.Module):
    """A convolution, scaled by the time, plus an embedding of the label."""

    def __init__(self, channels: int = 1, size: int = 8, num_classes: int = 10):
        super().__init__()
        self.shape, self.num_classes = (channels, size, size), num_classes
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
        self.labels = nn.Embedding(num_classes + 1, channels)

    def forward(self, x: Tensor, time: Tensor, cond: Cond, r: Tensor | None = None) -> Tensor:
        return self.convolution(x) * time.to(x.dtype)[:, None, None, None] + self.labels(cond["labels"])[:, :, None, None]


class TinyData(DataModule):
    """Labelled noise of one channel, 8x8, in batches of 4, eight batches an epoch."""

    def __init__(self, num_classes: int = 10, rows: int = 32):
        super().__init__()
        if rows < 1:
            raise ValueError(f"rows={rows}: give a positive number.")
        self.spec = DataSpec((1, 8, 8), num_classes)
        self.rows = rows

    @property
    def eval_batch_size(self) -> int:
        return 4

    def examples(self, count: int) -> Batch:
        return Batch(None, *label_conditions(torch.arange(count) % 10, 10))

    def collate(self, rows: list[int]) -> Batch:
        generator = torch.Generator().manual_seed(rows[0])
        images = torch.randn(len(rows), 1, 8, 8, generator=generator)
        return Batch(images, *label_conditions(torch.tensor(rows) % 10, 10))

    def train_dataloader(self) -> ResumableRows:
        return ResumableRows(self)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(self.rows), 4, collate_fn=self.collate)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


class ResumableRows:
    """The batches of an epoch, whose position Lightning keeps in the checkpoint."""

    def __init__(self, data: TinyData):
        self.data, self.position = data, 0

    def __len__(self) -> int:
        return self.data.rows // 4

    def __iter__(self) -> Iterator[Batch]:
        self.position %= len(self)
        while self.position < len(self):
            self.position += 1
            yield self.data.collate(list(range(4 * self.position - 4, 4 * self.position)))
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
