"""Where the images of a set are read from: an array, a folder of pictures, shards. By number, in any process."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from datamodules.kept_indices import read_index
from datamodules.pictures import PICTURES
from datamodules.shards import OpenFiles
from datamodules.streams.decoding import FORMATS, LARGEST_MAX_PIXELS, decode_picture
from datamodules.streams.patterns import expand
from datamodules.streams.rejects import Reject
from datamodules.tar_index import TarIndex

Pixels = Any
"""Bytes of one image, uint8 ``(h, w, c)``."""
PICTURE, TEXT, LABEL = 1, 3, 5
"""Columns of a shard's table in which the places of its members begin."""


class ImageSource(ABC):
    """Numbered images."""

    @property
    def labels(self) -> numpy.ndarray | None:
        """Whole numbers ``(n,)``, or None."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, number: int) -> Pixels:
        """An image, in its own channels. Raises ValueError, naming it, if it cannot be read."""

    def name(self, number: int) -> str:
        """What a message calls an image."""
        return f"image {number}"

    def text(self, number: int) -> str | None:
        """The text that lies beside an image, or None."""
        return None


class ArraySource(ImageSource):
    """Images of an array ``(n, h, w, c)``, uint8."""

    def __init__(self, images: numpy.ndarray, labels: numpy.ndarray | None = None):
        self.images, self._labels = images, labels

    @property
    def labels(self) -> numpy.ndarray | None:
        return self._labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Pixels:
        return self.images[number]


class EncodedSource(ImageSource):
    """Images that are encoded: one channel where the picture is grey, else three; upright, transparent parts white."""

    @abstractmethod
    def encoded(self, number: int) -> bytes:
        """The bytes of a picture. Raises OSError."""

    def __getitem__(self, number: int) -> Pixels:
        try:
            content = self.encoded(number)
            image = decode_picture(content, 3 if _has_colour(content) else 1, LARGEST_MAX_PIXELS)
        except (OSError, Reject) as error:
            raise ValueError(f"{self.name(number)} cannot be read ({error}); write it again, or leave it out") from error
        pixels = numpy.array(image)
        return pixels[..., None] if pixels.ndim == 2 else pixels


class PictureSource(EncodedSource):
    """The pictures of a folder and its sub-folders, in the order of their names.

    Args:
        folder: the folder.
        leave_out: names of pictures in it that are no members of the set.
        labels: theirs, in their order.
    """

    def __init__(self, folder: Path, leave_out: Sequence[str] = (), labels: numpy.ndarray | None = None):
        endings = set(PICTURES) - {".bmp"}
        found = (file for file in folder.rglob("*") if file.suffix.lower() in endings)
        self.files = sorted(file for file in found if str(file.relative_to(folder)) not in leave_out)
        self._labels = labels

    @property
    def labels(self) -> numpy.ndarray | None:
        return self._labels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return str(self.files[number])

    def text(self, number: int) -> str | None:
        file = self.files[number].with_suffix(".txt")
        return file.read_text().strip() if file.is_file() else None

    def encoded(self, number: int) -> bytes:
        return self.files[number].read_bytes()


class ShardSource(EncodedSource):
    """The pictures of WebDataset shards, plain tars in files, in the order of the tars: one of each sample.

    Labels are those of ``cls``, if all samples have one. They are read when they are asked for.

    Args:
        patterns: as of `datamodules.webdataset.WebDatasetDataModule`.

    Raises:
        FileNotFoundError, ValueError: see `datamodules.streams.patterns.expand`; a damaged tar, a sample without a picture.
    """

    def __init__(self, patterns: str | list[str]):
        self.files, places = expand("shards", patterns), []
        for number, file in enumerate(self.files):
            index = read_index(file)
            if index.problems:
                found = index.problems[0]
                raise ValueError(f"{file}: {found.reason} {found.key} ({found.detail}); see tools/check_shards.py")
            columns = [column for column, name in enumerate(index.names) if name in FORMATS]
            pictures = index.places[:, columns] if columns else numpy.full((len(index.keys), 1, 2), -1)
            bare = numpy.flatnonzero((pictures[:, :, 0] < 0).all(1))
            if len(bare):
                raise ValueError(f"{file}: sample {index.keys[bare[0]]} holds no picture ({', '.join(FORMATS)}); give images")
            first = numpy.take_along_axis(pictures, (pictures[:, :, :1] >= 0).argmax(1)[:, None], 1)[:, 0]
            beside = [self._column(index, ending) for ending in ("txt", "cls")]
            places.append(numpy.column_stack([numpy.full(len(first), number), first, *beside]))
        self.places, self._open = numpy.concatenate(places), OpenFiles()

    @staticmethod
    def _column(index: TarIndex, ending: str) -> numpy.ndarray:
        """Places ``(n, 2)`` of the members of an ending; -1 where there is none."""
        return index.places[:, index.names.index(ending)] if ending in index.names else numpy.full((len(index.keys), 2), -1)

    @cached_property
    def labels(self) -> numpy.ndarray | None:  # type: ignore[override]
        if (self.places[:, LABEL] < 0).any():
            return None
        texts = [self._member(number, LABEL) for number in range(len(self))]
        return numpy.array(texts, dtype="S").astype(numpy.int64) if all(text.isdigit() for text in texts) else None

    def __len__(self) -> int:
        return len(self.places)

    def name(self, number: int) -> str:
        return f"{self.files[self.places[number, 0]]}, sample {number} of the set"

    def encoded(self, number: int) -> bytes:
        return self._member(number, PICTURE)

    def text(self, number: int) -> str | None:
        return None if self.places[number, TEXT] < 0 else self._member(number, TEXT).decode().strip()

    def _member(self, number: int, column: int) -> bytes:
        """The bytes whose place is in a column, and their number in the next."""
        offset, size = self.places[number, column : column + 2].tolist()
        return self._open.read(Path(self.files[self.places[number, 0]]), offset, size)


def _has_colour(content: bytes) -> bool:
    """Whether a picture has more than one channel, transparency apart, as its header says. Raises Reject."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
            return image.mode not in ("1", "L", "LA", "I", "I;16", "F")
    except Exception as error:  # of damaged bytes PIL raises a dozen kinds
        raise Reject("bad image", f"{type(error).__name__}: {error}") from error
