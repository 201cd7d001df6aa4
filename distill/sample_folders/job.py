"""A set of samples drawn into a folder by any number of processes, in the same batches, continued where it was left."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from tqdm import tqdm

from distill.callbacks.sample_grid import save_grid
from distill.checkpoints import atomic_writer
from distill.command_line import Refusal
from distill.metrics.features import from_uint8, to_uint8
from distill.metrics.image_sets import SETTINGS, content_hash
from distill.metrics.processes import Processes
from distill.sample_folders.drawing import draw_batch, requests
from distill.sample_folders.formats import FORMATS
from distill.sample_folders.parts import Parts
from distill.sample_folders.settings import describe, difference
from distill.sample_folders.sources import RunSource, TeacherSource

GRID = "grid.png"
SHOWN = 100
"""Samples in the grid."""
Found = TypeVar("Found")


def together(processes: Processes, work: Callable[[], Found]) -> list[Found]:
    """What ``work()`` gives on each process. If it fails on one, all raise Refusal alike, and none waits for it."""
    result, problem = None, None
    try:
        result = work()
    except (Refusal, ValueError, OSError) as error:
        problem = str(error)
    values, problems = zip(*processes.gather((result, problem)), strict=True)
    if told := [each for each in problems if each is not None]:
        raise Refusal(told[0])
    return list(values)


class SampleJob:
    """Draws a set into a folder.

    Args:
        arguments: options of tools/sample.py.
        device: of this process, where ``arguments.device`` is what the user has said.
        processes: share the work.

    Raises:
        Refusal: options that the run or teacher cannot follow; on every process alike.
    """

    def __init__(self, arguments: argparse.Namespace, device: str, processes: Processes):
        self.arguments = argparse.Namespace(**vars(arguments) | {"device": device})
        self.processes, self.out = processes, Path(arguments.out)
        settings = together(processes, lambda: self.load(arguments))
        if any(found := difference(each, settings[0]) for each in settings):
            raise Refusal(f"processes have read different things ({found}); wait until training ends, or copy the checkpoint")
        self.settings = settings[0]
        self.parts = Parts(self.out, arguments.num, arguments.batch_size)
        self.format = FORMATS[arguments.format](self.out, self.parts, self.wanted, self.settings)

    def load(self, stated: argparse.Namespace) -> dict[str, Any]:
        """Reads the weights, and returns the settings of the set."""
        self.source: Any = (RunSource if stated.run else TeacherSource)(self.arguments)
        self.wanted = requests(self.source, self.arguments)
        return describe(self.source, stated, self.wanted)

    def run(self) -> bool:
        """Draws what is not there yet and writes the set; False if it was there already. Raises Refusal."""
        if together(self.processes, lambda: self.processes.rank == 0 and self.is_there())[0]:
            return False
        missing = together(self.processes, lambda: self.begin() if self.processes.rank == 0 else [])[0]
        try:
            self.draw(missing)
        except Refusal:
            if self.processes.rank == 0 and len(self.parts.missing()) == len(self.parts.batches):
                self.parts.remove()  # nothing was drawn: there is nothing to go on with
            raise
        shares = together(self.processes, self.look)
        seen = [shares[i % len(shares)][i // len(shares)] for i in range(len(self.parts.batches))]
        shape = seen[0][0]
        together(self.processes, lambda: self.format.write(self.processes, shape))
        digests = [digest for _, own, _ in seen for digest in own]
        evaluations = sum(count for _, _, count in seen) / self.parts.num
        found = {"evaluations": evaluations, "sha256": content_hash(digests, shape)}
        together(self.processes, lambda: self.finish(found) if self.processes.rank == 0 else None)
        return True

    def is_there(self) -> bool:
        """Whether the folder holds this set. Raises Refusal if it holds another one, or a part of one."""
        remedy = "give another --out, or --overwrite to begin anew"
        finished = (self.out / SETTINGS).is_file()
        there = _read(self.out / SETTINGS) if finished else self.parts.settings()
        if there is None:
            if files := [file for kind in FORMATS.values() for file in kind.files(self.out)]:
                raise Refusal(f"--out {self.out}: holds {files[0].name}, and no {SETTINGS} says of what; give another --out")
        elif self.arguments.overwrite:
            clear(self.out)
            return False
        elif found := difference(there, self.settings):
            raise Refusal(f"--out {self.out}: holds samples of other settings, {found}; {remedy}")
        if whole := finished and self.format.is_whole():
            self.parts.remove()  # a process that was killed at the very end may have left them
        return whole

    def begin(self) -> list[range]:
        """Opens the folder, and returns the batches that are missing."""
        self.parts.open(self.settings)
        # Until all is there, nothing says that it is.
        (self.out / SETTINGS).unlink(missing_ok=True)
        return self.parts.missing()

    def draw(self, missing: list[range]) -> None:
        """Draws and keeps batches, each process every so many-th, in step: what fails on one ends all."""
        rank, size = self.processes.rank, self.processes.size
        drawn = self.parts.num - sum(map(len, missing))
        with tqdm(total=self.parts.num, initial=drawn, desc="sampling", unit="image", disable=rank > 0) as bar:
            for first in range(0, len(missing), size):
                own = missing[first : first + size][rank : rank + 1]
                bar.update(sum(together(self.processes, partial(self.draw_parts, own))))

    def draw_parts(self, batches: list[range]) -> int:
        """Draws and keeps batches, and returns how many samples they are."""
        for batch in batches:
            self.draw_part(batch)
        return sum(map(len, batches))

    def draw_part(self, batch: range) -> None:
        """Draws and keeps one batch. Raises Refusal for samples that are not finite, or too many for the memory."""
        try:
            pixels, evaluations = draw_batch(self.source, self.arguments, self.wanted, batch)
        except torch.OutOfMemoryError as error:
            size = self.arguments.batch_size
            raise Refusal(f"--batch-size={size}: too much for the memory of {self.arguments.device}; give less") from error
        try:
            images = to_uint8(pixels).permute(0, 2, 3, 1).contiguous().numpy()
        except ValueError as error:
            remedy = "another --checkpoint" if self.arguments.run else "another --solver or --guidance, or more --steps"
            raise Refusal(f"samples {batch.start} to {batch.stop - 1}: {str(error).rstrip('.')}; give {remedy}") from error
        self.parts.save(batch, images, evaluations)

    def look(self) -> list[tuple[tuple[int, int, int], list[bytes], int]]:
        """Shape, digests and evaluations of each of this process's share of batches."""
        seen = []
        for batch in self.processes.batches(self.parts.num, self.parts.size):
            images, evaluations = self.parts.load(batch)
            seen.append((images.shape[1:], [hashlib.sha256(image.tobytes()).digest() for image in images], evaluations))
        return seen

    def finish(self, found: dict[str, Any]) -> None:
        """Writes the picture of the first samples and, last of all, the settings."""
        shown = numpy.stack(list(self.parts.images(range(min(SHOWN, self.parts.num)))))
        name = f"{self.arguments.run or self.arguments.teacher}, steps: {self.arguments.steps}"
        save_grid({name: from_uint8(torch.from_numpy(shown).permute(0, 3, 1, 2))}, self.out / GRID)
        with atomic_writer(self.out / SETTINGS) as file:
            file.write((json.dumps(self.settings | found, indent=2) + "\n").encode())
        self.parts.remove()


def _read(file: Path) -> dict[str, Any]:
    """The content of ``samples.json``. Raises Refusal."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(f"{file}: cannot be read ({error}); give another --out") from error


def clear(out: Path) -> None:
    """Removes what a set consists of, and nothing else; last what says that the rest may be removed."""
    for kind in FORMATS.values():
        for file in [*kind.files(out)]:
            file.unlink(missing_ok=True)
    (out / GRID).unlink(missing_ok=True)
    Parts(out, 0, 1).remove()
    (out / SETTINGS).unlink(missing_ok=True)
