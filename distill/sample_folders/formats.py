"""How a set lies in its folder: one .npz file, PNG files, or WebDataset shards. Any of them is written from parts, streaming.

The bytes written depend on the images, labels and prompts alone: not on the processes, the time or what was there.
"""

from __future__ import annotations

import json
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from datamodules.members import to_png
from datamodules.shard_writing import save_shard
from datamodules.shards import shard_name
from distill.checkpoints import atomic_writer
from distill.command_line import Refusal
from distill.metrics.image_sets import LABELS, PICTURES
from distill.metrics.processes import Processes
from distill.sample_folders.parts import Parts
from distill.types import Batch


class Format(ABC):
    """One way in which samples are stored.

    Args:
        folder: of the set.
        parts: where images are read from.
        wanted: what the samples show; labels and prompts are stored where the format has a place for them.
        settings: see `distill.sample_folders.settings.describe`.
    """

    def __init__(self, folder: Path, parts: Parts, wanted: Batch, settings: dict[str, Any]):
        self.folder, self.parts, self.settings, self.num = folder, parts, settings, parts.num
        labels = wanted.cond.get("labels")
        self.labels = None if labels is None else labels.cpu().numpy()
        self.prompts = wanted.prompts

    @abstractmethod
    def write(self, processes: Processes, shape: tuple[int, int, int]) -> None:
        """Writes this process's share of a set of images ``(h, w, c)``. Raises Refusal, OSError."""

    @abstractmethod
    def is_whole(self) -> bool:
        """Whether the files are there, as far as their names and headers tell."""

    @classmethod
    @abstractmethod
    def files(cls, folder: Path) -> Iterator[Path]:
        """The files in a folder that are of this format, finished or not."""


class Arrays(Format):
    """``samples.npz``: ``arr_0`` uint8 ``(n, h, w, c)``, and ``arr_1`` labels if there are any."""

    def write(self, processes: Processes, shape: tuple[int, int, int]) -> None:
        if processes.rank:
            return
        with atomic_writer(self.folder / "samples.npz") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            with _entry(archive, "arr_0", (self.num, *shape), numpy.dtype(numpy.uint8)) as entry:
                for batch in self.parts.batches:
                    entry.write(numpy.ascontiguousarray(self.parts.load(batch)[0]).data)
            if self.labels is not None:
                with _entry(archive, "arr_1", self.labels.shape, self.labels.dtype) as entry:
                    entry.write(self.labels.tobytes())

    def is_whole(self) -> bool:
        try:
            with zipfile.ZipFile(self.folder / "samples.npz") as archive, archive.open("arr_0.npy") as entry:
                numpy.lib.format.read_magic(entry)
                return numpy.lib.format.read_array_header_1_0(entry)[0][0] == self.num
        except (OSError, ValueError, LookupError, zipfile.BadZipFile):
            return False

    @classmethod
    def files(cls, folder: Path) -> Iterator[Path]:
        return folder.glob("samples.npz*")


def _entry(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: numpy.dtype) -> Any:
    """An array in an .npz file, whose bytes are to follow."""
    info = zipfile.ZipInfo(f"{name}.npy")  # of no date
    info.compress_type = zipfile.ZIP_DEFLATED
    entry = archive.open(info, "w", force_zip64=True)
    header = {"descr": numpy.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    numpy.lib.format.write_array_header_1_0(entry, header)
    return entry


def _check_channels(option: str, channels: int) -> None:
    """Raises Refusal for images that are no pictures."""
    if channels not in (1, 3):
        raise Refusal(f"--format {option}: samples have {channels} channels, pictures 1 or 3; give --format npz")


class Pictures(Format):
    """``images/000000.png`` ..., 1,000 a folder (``images/000/000000.png``) if they are more, and ``labels.json``."""

    def name(self, number: int) -> Path:
        """Where a sample is; names sort by number."""
        digits = f"{number:0{max(6, len(str(self.num - 1)))}d}"
        return self.folder / PICTURES / (digits[:-3] if self.num > 1000 else "") / f"{digits}.png"

    def write(self, processes: Processes, shape: tuple[int, int, int]) -> None:
        _check_channels("png", shape[2])
        for batch in processes.batches(self.num, self.parts.size):
            for number, image in zip(batch, self.parts.images(batch), strict=True):
                self.name(number).parent.mkdir(parents=True, exist_ok=True)
                self.name(number).write_bytes(to_png(image.transpose(2, 0, 1)))
        if self.labels is not None and processes.rank == 0:
            with atomic_writer(self.folder / LABELS) as file:
                file.write(json.dumps(self.labels.tolist()).encode())

    def is_whole(self) -> bool:
        labels = self.labels is None or (self.folder / LABELS).is_file()
        return labels and {path for path in self.files(self.folder) if path.suffix == ".png"} == {
            self.name(number) for number in range(self.num)
        }

    @classmethod
    def files(cls, folder: Path) -> Iterator[Path]:
        yield from folder.glob(f"{LABELS}*")
        for path in (folder / PICTURES).rglob("*.png"):
            if re.fullmatch(r"\d{6,}", path.stem):
                yield path


class Shards(Format):
    """``00000-of-00004.tar`` ...: a picture (``png``), its label (``cls``) or its prompt (``txt``) a sample, keys in order."""

    @property
    def size(self) -> int:
        """Samples of a shard; the last one may be smaller."""
        return self.settings["shard_size"]

    @property
    def of(self) -> int:
        """Number of shards."""
        return -(-self.num // self.size)

    def write(self, processes: Processes, shape: tuple[int, int, int]) -> None:
        _check_channels("shards", shape[2])
        for shard in range(self.of)[processes.rank :: processes.size]:
            header = {"format": 1, "kind": "images", "samples": self.settings, "total": self.num, "of": self.of, "shard": shard}
            numbers = range(shard * self.size, min((shard + 1) * self.size, self.num))
            save_shard(self.folder, atomic_writer, header, {}, numbers.start, self.members(numbers))

    def members(self, numbers: range) -> Iterator[dict[str, bytes]]:
        """The files of each sample."""
        for number, image in zip(numbers, self.parts.images(numbers), strict=True):
            sample = {"png": to_png(image.transpose(2, 0, 1))}
            if self.labels is not None:
                sample["cls"] = str(int(self.labels[number])).encode()
            if self.prompts is not None:
                sample["txt"] = self.prompts[number].encode()
            yield sample

    def is_whole(self) -> bool:
        names = [f"{shard_name(shard, self.of)}.tar" for shard in range(self.of)]
        return sorted(path.name for path in self.folder.glob("*.tar")) == names

    @classmethod
    def files(cls, folder: Path) -> Iterator[Path]:
        for path in folder.glob("*-of-*"):
            if re.match(r"\d{5}-of-\d{5}\.(tar|json)", path.name):
                yield path


FORMATS: dict[str, type[Format]] = {"npz": Arrays, "png": Pictures, "shards": Shards}
