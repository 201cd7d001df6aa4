"""What a sample of foreign shards is: images with captions or labels, or prompts alone."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.streams.decoding import (
    FORMATS,
    LARGEST_MAX_PIXELS,
    MAX_PIXELS,
    Bytes,
    Draws,
    crop_and_resize,
    decode_array,
    decode_picture,
)
from datamodules.streams.rejects import Reject
from distill.types import Batch, DataSpec, label_conditions

Row = dict[str, Any]
"""One decoded sample."""


class Contents(ABC):
    """How the members of a sample become a row, and rows a batch.

    Attributes:
        spec: what the batches are.
        random: whether `decode` makes use of draws.
        exact_by: the data module that reads these samples in an exact order, if it is another one.
    """

    spec: DataSpec
    random: bool = False
    exact_by: str | None = None

    @abstractmethod
    def wants(self, ending: str) -> bool:
        """Whether members with this ending, in lower case, are read."""

    @abstractmethod
    def decode(self, members: Mapping[str, Bytes], draws: Draws | None) -> Row:
        """A sample.

        Args:
            members: the bytes by ending; those that are wanted and there.
            draws: of this sample's augmentation, None for the middle of a picture as it is.

        Raises:
            Reject: it cannot be used; says why.
        """

    @abstractmethod
    def batch(self, rows: list[Row]) -> Batch:
        """The batch of these samples, at least one, as workers send it."""

    def delivered(self, batch: Batch) -> Batch:
        """The batch as training is given it, of one that `batch` made, in the process that trains."""
        return batch

    def bind(self, shard: str, leading: Mapping[str, bytes]) -> None:
        """Takes what the first shard says of itself (``__header__``, ``__null__``). Raises ValueError if it does not do."""

    def check_header(self, header: bytes | None) -> None:
        """Takes the ``__header__`` of a shard, None where there is none. Raises Reject for one of other contents."""


class Place:
    """Where a caption or label is: a member (``txt``), or a key of the JSON member (``json.caption``).

    Args:
        name: of what is there, for messages.
        where: as above.

    Raises:
        ValueError: ``json`` without a key.
    """

    def __init__(self, name: str, where: str):
        self.name, (self.ending, _, self.key) = name, where.lower().partition(".")
        if self.ending == "json":
            self.key = where.partition(".")[2]
            if not self.key:
                raise ValueError(f"{name}s={where}: which key of the record? Give json.KEY, such as json.{name}.")
        else:
            self.ending, self.key = where.lower(), ""

    def read(self, members: Mapping[str, Bytes]) -> Any:
        """The text, or the value in the record. Raises Reject: ``no NAME``, ``bad NAME``, ``bad json``."""
        if self.ending not in members:
            raise Reject(f"no {self.name}", f"there is no {self.ending}")
        try:
            text = str(members[self.ending], "utf-8")
        except ValueError as error:
            raise Reject(f"bad {self.name}", error) from error
        if not self.key:
            return text.strip()
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Reject("bad json", error) from error
        value = record.get(self.key) if isinstance(record, dict) else None
        if value is None:
            raise Reject(f"no {self.name}", f"the record has no {self.key}")
        return value


def caption_at(place: Place, members: Mapping[str, Bytes]) -> str:
    """A caption. Raises Reject: ``no caption``, also for an empty one, ``bad caption`` for what is no text."""
    text = place.read(members)
    if not isinstance(text, str):
        raise Reject("bad caption", f"{text!r:.80} is no text")
    if not text.strip():
        raise Reject("no caption", "it is empty")
    return text.strip()


class ImageContents(Contents):
    """Pictures (``jpg``, ``jpeg``, ``png``, ``webp``), or images as arrays (``npy``), with captions and labels or without.

    The shorter side is resized to ``resize`` pixels (Lanczos) and a square cut. Pictures are turned upright as their EXIF data
    say, palettes, CMYK and 16 bits converted, transparent parts are white. Arrays ``(channels, size, size)``, float32 in
    [-1, 1] (others are rejected) or uint8, are taken as they are but for the flip.

    Args:
        size: height and width that are delivered.
        resize: the shorter side before a square is cut, at least ``size``; null for ``size``.
        crop: where the square is cut, in training; validation cuts the middle.
        flip: whether one training image in two is mirrored.
        channels: 3, or 1 for grey.
        levels: values a channel that the pictures have, spread over 0..255; delivered evenly spaced in [-1, 1]. The digits of
            tools/make_shards.py have 17.
        captions: where they are, ``txt`` or ``json.KEY``; null for none. One that is missing or blank is rejected.
        labels: where the class is, ``cls`` or ``json.KEY``; null for none.
        num_classes: labels are 0 to num_classes - 1, all others are rejected.
        max_pixels: pictures of more are rejected, before they are decoded.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        size: int,
        resize: int | None = None,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        channels: Literal[1, 3] = 3,
        levels: int = 256,
        captions: str | None = None,
        labels: str | None = None,
        num_classes: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        if size < 1 or max_pixels < 1:
            raise ValueError(f"size={size}, max_pixels={max_pixels}: give numbers of at least 1.")
        if max_pixels > LARGEST_MAX_PIXELS:
            raise ValueError(f"max_pixels={max_pixels}: PIL opens none of more than {LARGEST_MAX_PIXELS}; give at most that.")
        if not 2 <= levels <= 256:
            raise ValueError(f"levels={levels}: give 2 to 256.")
        if resize is not None and resize < size:
            raise ValueError(f"resize={resize}: give at least size={size}, or null.")
        if (labels is None) != (num_classes is None) or (num_classes or 1) < 1:
            raise ValueError(f"labels={labels}, num_classes={num_classes}: give both, or neither.")
        self.size, self.resize, self.crop, self.flip, self.channels = size, resize or size, crop, flip, channels
        self.levels, self.num_classes, self.max_pixels = levels, num_classes, max_pixels
        self.captions = None if captions is None else Place("caption", captions)
        self.labels = None if labels is None else Place("label", labels)
        self.random = crop == "random" or flip
        self.spec = DataSpec((channels, size, size), num_classes, prompts=captions is not None)
        self.endings = {"npy", *FORMATS} | {place.ending for place in (self.captions, self.labels) if place is not None}

    def wants(self, ending: str) -> bool:
        return ending in self.endings

    def decode(self, members: Mapping[str, Bytes], draws: Draws | None) -> Row:
        row: Row = {}  # texts first: a picture is decoded in vain if its caption is missing
        if self.captions is not None:
            row["prompt"] = caption_at(self.captions, members)
        if self.labels is not None:
            row["label"] = self._label(self.labels.read(members))
        return row | {"image": self._image(members, draws)}

    def _label(self, value: Any) -> int:
        assert self.num_classes is not None
        try:
            label = int(value)
        except (ValueError, TypeError, OverflowError):
            label = -1
        if isinstance(value, bool | float) or not 0 <= label < self.num_classes:
            raise Reject("bad label", f"{value!r:.80} is not one of 0 to {self.num_classes - 1}")
        return label

    def _image(self, members: Mapping[str, Bytes], draws: Draws | None) -> numpy.ndarray:
        """Pixels ``(c, h, w)``, uint8 or float32, contiguous."""
        ending = next((ending for ending in (*FORMATS, "npy") if ending in members), None)
        if ending is None:
            raise Reject("no image", f"there is no {', '.join(FORMATS)} or npy")
        if ending == "npy":
            array = decode_array(members[ending], self.spec.shape)
            return numpy.ascontiguousarray(array[..., ::-1] if self.flip and draws is not None and draws[2] < 0.5 else array)
        if draws is not None and self.crop == "center":
            draws = (0.5, 0.5, draws[2])
        image = decode_picture(members[ending], self.channels, self.max_pixels)
        return numpy.ascontiguousarray(crop_and_resize(image, self.size, self.resize, draws, self.flip).transpose(2, 0, 1))

    def batch(self, rows: list[Row]) -> Batch:
        images = [torch.from_numpy(row["image"]) for row in rows]
        if len({image.dtype for image in images}) > 1:
            images = [in_range(image, self.levels) for image in images]
        x0 = default_collate(images)  # bytes where all are: workers send a quarter of what float32 takes
        labels = torch.tensor([row["label"] for row in rows]) if self.num_classes is not None else None
        cond, null = ({}, {}) if labels is None else label_conditions(labels, self.num_classes or 0)
        return Batch(x0, cond, null, prompts=[row["prompt"] for row in rows] if self.captions is not None else None)

    def delivered(self, batch: Batch) -> Batch:
        assert batch.x0 is not None
        return replace(batch, x0=in_range(batch.x0, self.levels))


def in_range(pixels: Tensor, levels: int) -> Tensor:
    """Pixels, uint8, as float32 in [-1, 1]; what is float32 stays as it is."""
    if pixels.dtype != torch.uint8:
        return pixels
    values = pixels.float()
    if levels < 256:
        values = values.mul_((levels - 1) / 255).round_()
    return values.div_((levels - 1) / 2).sub_(1)


class PromptContents(Contents):
    """Prompts alone: batches without ``x0``, for methods that need no data. Pictures beside them are not read.

    Args:
        shape: of the images that the prompts stand for, ``[channels, height, width]`` in pixels.
        captions: where they are, ``txt`` or ``json.KEY``.

    Raises:
        ValueError: a shape that is none.
    """

    def __init__(self, shape: list[int], captions: str = "txt"):
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape={shape}: give channels, height and width, such as [3, 512, 512].")
        self.captions, self.spec = Place("caption", captions), DataSpec(tuple(shape), prompts=True)

    def wants(self, ending: str) -> bool:
        return ending == self.captions.ending

    def decode(self, members: Mapping[str, Bytes], draws: Draws | None) -> Row:
        return {"prompt": caption_at(self.captions, members)}

    def batch(self, rows: list[Row]) -> Batch:
        return Batch(None, {}, {}, prompts=[row["prompt"] for row in rows])
