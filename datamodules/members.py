"""The members of samples in shards, arrays, records, pictures and texts as bytes, never as pickles; decoded a batch at once."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy

BLOCK, LARGE = 1024, 8192
VERSION_1 = b"\x93NUMPY\x01\x00"
Members = Sequence[bytes | memoryview]
"""Members of one name, one a sample."""


def checksum(member: bytes | memoryview) -> int:
    """CRC-32 of a member; of a large one that of the sum of its blocks and its rest, which takes a quarter of the time.

    Any damage to one block is found. What it misses are damages whose sum is zero, such as two blocks in each other's place.
    """
    whole = len(member) - len(member) % BLOCK
    if whole < LARGE:
        return crc32(member)
    words = numpy.frombuffer(member, "<u8", whole // 8).reshape(-1, BLOCK // 8)
    return crc32(member[whole:], crc32(numpy.add.reduce(words, axis=0)))


def to_npy(array: Any) -> bytes:
    """An array in NumPy's format. Raises ValueError for one of objects."""
    stream = io.BytesIO()
    numpy.lib.format.write_array(stream, numpy.asarray(array), allow_pickle=False)
    return stream.getvalue()


def from_npy(members: Members) -> numpy.ndarray:
    """The arrays ``(b, ...)`` of bytes in NumPy's format; the samples need not lie side by side in memory.

    Raises:
        ValueError: a pickle, what is no array, arrays of different shapes or types.
    """
    first = bytes(members[0][:10])
    if first[:8] != VERSION_1:
        return numpy.stack([numpy.lib.format.read_array(io.BytesIO(member), allow_pickle=False) for member in members])
    start = 10 + int.from_bytes(first[8:], "little")
    dtype, shape, order = _header(bytes(members[0][:start]))
    size = start + dtype.itemsize * math.prod(shape)
    if any(len(member) != size for member in members):
        raise ValueError(f"not the bytes of an array of shape {shape} of {dtype}")
    rows = numpy.frombuffer(bytearray().join(members), numpy.uint8).reshape(len(members), size)
    if (rows[:, :start] != rows[0, :start]).any():
        raise ValueError(f"arrays of another shape or type than the first, {shape} of {dtype}")
    if order == "F":
        return numpy.stack([row[start:].view(dtype).reshape(shape, order="F") for row in rows])
    return rows[:, start:].view(dtype).reshape(len(members), *shape)


@lru_cache(maxsize=256)  # a shard's arrays have the same few headers, and to parse one takes longer than to read an array
def _header(head: bytes) -> tuple[numpy.dtype, tuple[int, ...], str]:
    """Type, shape and order of elements. Raises ValueError for objects, or what is no header."""
    stream = io.BytesIO(head)
    numpy.lib.format.read_magic(stream)
    shape, fortran, dtype = numpy.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise ValueError("an array of objects is a pickle, which is not read")
    return dtype, shape, "F" if fortran else "C"


def to_png(pixels: numpy.ndarray) -> bytes:
    """A picture of ``(1 or 3, h, w)`` bytes."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(stream, "png")
    return stream.getvalue()


def from_png(members: Members) -> numpy.ndarray:
    """Pixels ``(b, 1 or 3, h, w)``, uint8. Raises ValueError for what is no picture, or pictures of different sizes."""
    from PIL import Image

    pictures = []
    for member in members:
        try:
            with Image.open(io.BytesIO(member), formats=["PNG"]) as image:
                pictures.append(numpy.asarray(image))
        except (OSError, SyntaxError) as error:
            raise ValueError(error) from error
    pixels = numpy.stack(pictures)
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def from_json(members: Members) -> list[dict[str, Any]]:
    """Records. Raises ValueError for what is no JSON."""
    return json.loads(b"[" + b",".join(members) + b"]")


def from_text(members: Members) -> list[str]:
    """Texts in UTF-8. Raises ValueError for what is none."""
    return [str(member, "utf-8") for member in members]


DECODERS: dict[str, Callable[[Members], Any]] = {"npy": from_npy, "json": from_json, "png": from_png, "txt": from_text}
"""By the ending of a member's name."""
