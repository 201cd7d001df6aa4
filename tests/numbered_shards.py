"""Small shards whose images are the numbers of their samples, and data modules as ranks of a run see them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy

from datamodules.members import to_npy
from datamodules.streams.contents import ImageContents
from datamodules.webdataset import WebDatasetDataModule
from distill.types import Batch

COUNTS = (9, 4, 11, 7, 6)
"""Samples of the shards: 37, of which no batch is a divisor."""


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of these members, in this order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def member(number: int, bad: bool = False) -> list[tuple[str, bytes]]:
    """The files of a sample; its class is its number."""
    value = numpy.nan if bad else number / 1000
    image = numpy.full((1, 2, 2), value, numpy.float32)
    return [(f"{number:03d}.npy", to_npy(image)), (f"{number:03d}.cls", str(number).encode())]


def write_numbered(folder: Path, counts: tuple[int, ...] = COUNTS, bad: tuple[int, ...] = ()) -> Path:
    """Shards ``00000.tar`` ... of so many samples, those of ``bad`` with an image of NaN."""
    first = 0
    for shard, count in enumerate(counts):
        samples = [member(number, number in bad) for number in range(first, first + count)]
        write_tar(folder / f"{shard:05d}.tar", [one for sample in samples for one in sample])
        first += count
    return folder


def numbered(folder: Path, mode: Any = "exact", **settings: Any) -> WebDatasetDataModule:
    """The module over such shards, in batches of 3, two shards of which are mixed."""
    contents = settings.pop("contents", None) or ImageContents(2, channels=1, labels="cls", num_classes=1000)
    defaults: dict[str, Any] = {"batch_size": 3, "batches_per_epoch": 4, "shuffle_shards": 2, "max_reject_rate": 1.0}
    shards = settings.pop("shards", str(folder / "*.tar"))
    return WebDatasetDataModule(shards, contents, mode, **{**defaults, "shuffle_buffer": 8, "eval_batch_size": 7, **settings})


def numbers(batch: Batch) -> list[int]:
    """The samples in a batch."""
    assert batch.x0 is not None
    found = (batch.x0[:, 0, 0, 0] * 1000).round().int().tolist()
    assert found == batch.cond["labels"].tolist()
    return found


def on_rank(module: Any, rank: int = 0, ranks: int = 1, trained: int = 0, folder: str | Path = ".") -> Any:
    """The module as it is seen by one of several ranks of a run that has trained so many batches."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=trained))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    run = {"overfit_batches": 0, "state": SimpleNamespace(fn="fit"), "loggers": [], "global_step": trained}
    run["log_every_n_steps"] = 0
    trainer = SimpleNamespace(world_size=ranks, global_rank=rank, fit_loop=loop, default_root_dir=str(folder), **run)
    module.trainer = trainer
    module.setup("fit")
    return module


def trained(module: Any, batches: int) -> None:
    """So many batches are worked on, as the trainer counts them."""
    module.trainer.fit_loop.epoch_loop.batch_progress.total.processed = batches
