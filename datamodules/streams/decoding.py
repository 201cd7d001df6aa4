"""Pictures from foreign bytes, whatever they are: upright, in one or three channels, resized and cropped."""

from __future__ import annotations

import io
from typing import Any

import numpy

from datamodules.members import from_npy
from datamodules.streams.rejects import Reject

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""PIL's formats by the endings of members. No other is tried, whatever the bytes look like."""
MAX_PIXELS = 89_478_485
"""From here on PIL warns of a decompression bomb: a quarter of a gigabyte of RGB."""
ORIENTATION = 0x0112
"""EXIF's tag."""
LARGEST_MAX_PIXELS = 2 * MAX_PIXELS
"""From here on PIL refuses to open."""
ROUNDING = 1e-3
"""By which float images may exceed [-1, 1]: that of half precision."""
Bytes = bytes | memoryview
Draws = tuple[float, float, float]
"""Three numbers in [0, 1): where a random crop lies in width and height, whether a picture is flipped (below one half)."""


def decode_picture(content: Bytes, channels: int, max_pixels: int) -> Any:
    """A PIL image in mode ``L`` or ``RGB``, turned upright as its EXIF data say; transparent parts are white.

    Raises:
        Reject: ``bad image`` for what is none of JPEG, PNG and WebP or is damaged, ``huge`` for more pixels than
            ``max_pixels``, seen in the header before anything is decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content), formats=sorted(set(FORMATS.values()))) as image:
            if image.width * image.height > max_pixels:
                raise Reject("huge", f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
            image.load()
            upright = image.getexif().get(ORIENTATION, 1) == 1
            return _in_mode(image if upright else ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    except Reject:
        raise
    except Image.DecompressionBombError as error:
        raise Reject("huge", error) from error
    except Exception as error:  # of damaged bytes, PIL raises a dozen kinds, struct.error and IndexError among them
        raise Reject("bad image", f"{type(error).__name__}: {error}") from error


def _in_mode(image: Any, mode: str) -> Any:
    """A PIL image in ``L`` or ``RGB``."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits a pixel, of which PIL's own conversion clips all but the lowest 8
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def crop_and_resize(image: Any, size: int, resize: int, draws: Draws | None, flip: bool) -> numpy.ndarray:
    """Pixels ``(size, size, c)``, uint8, of a square of a PIL image whose shorter side is resized to ``resize`` pixels.

    The square is cut in the image's own pixels and resized at once (Lanczos).

    Args:
        image: in mode ``L`` or ``RGB``.
        size: of the square.
        resize: at least ``size``.
        draws: where the square lies, and of the flip; None for the middle and no flip.
        flip: whether one in two is mirrored.
    """
    from PIL import Image

    width, height = image.size
    side = min(width, height) * size / resize
    across, down, turn = (0.5, 0.5, 1.0) if draws is None else draws
    left, top = (width - side) * across, (height - side) * down
    if (width, height) != (size, size) or side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    pixels = numpy.array(image).reshape(size, size, -1)
    return pixels[:, ::-1] if flip and turn < 0.5 else pixels


def decode_array(content: Bytes, shape: tuple[int, ...]) -> numpy.ndarray:
    """An image ``shape`` = ``(c, h, w)`` that was stored as an array, in [-1, 1]: as float32, or as uint8 of 0..255.

    Raises:
        Reject: ``bad array``, ``other shape``, ``not finite``, ``out of range``.
    """
    array = read_array(content)
    if array.shape != shape:
        raise Reject("other shape", f"{array.shape} instead of {shape}")
    if array.dtype == numpy.uint8:
        return array
    if not numpy.issubdtype(array.dtype, numpy.floating):
        raise Reject("bad array", f"an image of {array.dtype}: store float32 in [-1, 1], or uint8")
    if (largest := numpy.abs(check_finite(array)).max(initial=0)) > 1 + ROUNDING:
        raise Reject("out of range", f"{largest:g}: store float32 in [-1, 1], or 0..255 as uint8")
    return array.astype(numpy.float32)


def read_array(content: Bytes) -> numpy.ndarray:
    """An array in NumPy's format, never a pickle. Raises Reject: ``bad array``."""
    try:
        return from_npy([content])[0]
    except Exception as error:  # ValueError, and of damaged headers what the parser of python's literals raises
        raise Reject("bad array", error) from error


def check_finite(array: numpy.ndarray) -> numpy.ndarray:
    """The array. Raises Reject: ``not finite``."""
    if numpy.issubdtype(array.dtype, numpy.floating) and not numpy.isfinite(array).all():
        raise Reject("not finite", "NaN or infinite values")
    return array
