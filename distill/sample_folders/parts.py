"""Samples that are drawn already: a file a batch, whole or not there, until all are and the set is written."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from jaxtyping import UInt8

from distill.checkpoints import TEMPORARY, atomic_writer
from distill.command_line import Refusal
from distill.metrics.image_sets import PARTS

Pixels = UInt8[numpy.ndarray, "n h w c"]
RECORD = "settings.json"
PART = re.compile(r"\d{9}\.npz")


class Parts:
    """The batches of a set in ``OUT/parts``, ``000000300.npz`` being the one whose first sample is number 300.

    Args:
        folder: OUT.
        num: samples of the set.
        size: of a batch; the last one may be smaller.
    """

    def __init__(self, folder: Path, num: int, size: int):
        self.folder, self.num, self.size = folder / PARTS, num, size

    @property
    def batches(self) -> list[range]:
        """The numbers of the samples of each batch."""
        return [range(first, min(first + self.size, self.num)) for first in range(0, self.num, self.size)]

    def settings(self) -> dict[str, Any] | None:
        """What the batches that are there were drawn by; None if there is none. Raises Refusal for another's folder."""
        if not self.folder.is_dir() or not (names := {path.name for path in self.folder.iterdir()}):
            return None
        strange = sorted(name for name in names if not (PART.fullmatch(name) or name == RECORD or name.endswith(TEMPORARY)))
        if strange:
            raise Refusal(f"{self.folder}: holds {strange[0]}, which is no part of samples; give another --out")
        if not any(PART.fullmatch(name) for name in names):
            return None
        try:
            return dict(json.loads((self.folder / RECORD).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise Refusal(f"{self.folder}: its {RECORD} cannot be read ({error}); give another --out") from error

    def open(self, settings: dict[str, Any]) -> None:
        """Makes the folder for batches of these settings; what a killed process left unfinished is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        with atomic_writer(self.folder / RECORD) as file:
            file.write(json.dumps(settings, indent=2).encode())

    def missing(self) -> list[range]:
        """The batches that are not there. Names are listed, not looked up: network file systems remember what was not there."""
        names = {path.name for path in self.folder.iterdir()}
        return [batch for batch in self.batches if self._file(batch).name not in names]

    def _file(self, batch: range) -> Path:
        return self.folder / f"{batch.start:09d}.npz"

    def save(self, batch: range, images: Pixels, evaluations: int) -> None:
        """Keeps a batch, and how many evaluations its samples have cost in all. Raises OSError."""
        with atomic_writer(self._file(batch)) as file:
            numpy.savez(file, images=images, evaluations=evaluations)

    def load(self, batch: range) -> tuple[Pixels, int]:
        """What `save` kept. Raises Refusal if it is not there or damaged."""
        file = self._file(batch)
        try:
            with numpy.load(file, allow_pickle=False) as content:
                images, evaluations = content["images"], int(content["evaluations"])
            if len(images) != len(batch):
                raise ValueError(f"{len(images)} images instead of {len(batch)}")
        except FileNotFoundError as error:
            raise Refusal(f"{file}: is gone; give an --out that all processes share, and start no two jobs in it") from error
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise Refusal(f"{file}: is damaged ({error}); remove it and start the same command again") from error
        return images, evaluations

    def images(self, numbers: range) -> Iterator[numpy.ndarray]:
        """Images ``(h, w, c)`` one after another, of which one batch is in memory. Raises Refusal, see `load`."""
        for batch in self.batches[numbers.start // self.size : -(-numbers.stop // self.size)]:
            images, _ = self.load(batch)
            yield from images[max(numbers.start - batch.start, 0) : numbers.stop - batch.start]

    def remove(self) -> None:
        """Removes the batches, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for path in [*self.folder.iterdir()]:
            if PART.fullmatch(path.name) or path.name.endswith(TEMPORARY):
                path.unlink(missing_ok=True)
        (self.folder / RECORD).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
