"""The fourteen kinds of bad shards that streaming must survive: one tar of each, of pictures with captions or of latents.

Pictures: the good samples ``good0`` to ``good3`` and, between the second and the third, what is bad, ``bad`` where it is a
sample of its own. Latents: five samples, the third of which is bad.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from datamodules.members import to_npy
from datamodules.shard_writing import write_shard
from datamodules.shards import shard_name

SIZE = 16
GOOD = [f"good{number}" for number in range(4)]
HUGE = 12000
"""Height and width of a picture of 20 KB that takes 144 million pixels."""
LATENT = (2, 4, 4)
Member = tuple[str, bytes]
HEADER = {
    "format": 1,
    "codec": {"path": "a/vae", "sha256": "c" * 64},
    "conditioner": None,
    "posterior": "mode",
    "shape": list(LATENT),
    "num_classes": None,
    "widths": {},
    "own_null": [],
    "embeddings": "float32",
    "dataset": {"images": "photos", "size": SIZE},
    "seed": 0,
    "total": 5,
    "of": 1,
    "shard": 0,
}


@dataclass(frozen=True)
class Kind:
    """What is expected of one kind.

    Attributes:
        good: good samples that can be read in a walk through the tar.
        indexed: what `datamodules.tar_index` calls it; None where the headers are right.
        checked: what tools/check_shards.py calls it; None where nothing is wrong with it.
        encoded: whether it is a shard of latents, with its manifest, rather than of pictures with captions.
    """

    good: int
    indexed: str | None
    checked: str | None
    encoded: bool = False


KINDS = {
    "truncated": Kind(3, "truncated", "truncated"),
    "empty": Kind(0, "empty", "empty"),
    "garbage": Kind(0, "garbage", "garbage"),
    "bad header": Kind(2, "bad header", "bad header"),
    "bad image": Kind(4, None, "bad image"),
    "no caption": Kind(4, None, "no caption"),
    "duplicate key": Kind(4, "duplicate key", "duplicate key"),
    "dotted key": Kind(4, "dotted key", "dotted key"),
    "missing": Kind(0, None, "missing"),
    "grayscale and CMYK": Kind(6, None, None),
    "zero size": Kind(4, "zero size", "zero size"),
    "huge": Kind(4, None, "huge"),
    "NaN latent": Kind(4, None, "not finite", encoded=True),
    "wrong latent shape": Kind(4, None, "other shape", encoded=True),
}


def picture(seed: int, mode: str = "RGB", format: str = "png", size: int = SIZE) -> bytes:
    """A picture of coarse noise in this mode and format."""
    pixels = numpy.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=numpy.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).convert(mode).save(stream, format)
    return stream.getvalue()


def bomb() -> bytes:
    """A right PNG of ``HUGE`` x ``HUGE`` black pixels of one bit."""
    rows = zlib.compress(bytes(HUGE * (HUGE // 8 + 1)), 1)
    head = struct.pack(">IIBBBBB", HUGE, HUGE, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


def captioned(key: str, seed: int = 0) -> list[Member]:
    """The members of a good sample."""
    return [(f"{key}.png", picture(seed)), (f"{key}.txt", f"caption of {key}".encode())]


def write_tar(file: Path, members: list[Member]) -> Path:
    """A tar of these members, in this order."""
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def good_shard(file: Path, keys: list[str] | None = None) -> Path:
    """A tar of good samples, all of one length."""
    return write_tar(file, [member for seed, key in enumerate(keys or GOOD) for member in captioned(key, seed)])


def bad_members(kind: str) -> list[Member]:
    """What stands between the good samples of a kind whose tar is right."""
    text = ("bad.txt", b"caption of bad")
    return {
        "bad image": [("bad.png", picture(9)[:60]), text],
        "no caption": [("bad.png", picture(9))],
        "duplicate key": captioned(GOOD[0], 9),
        "dotted key": captioned("bad.v2", 9),
        "grayscale and CMYK": [
            *[("gray.png", picture(9, "L")), ("gray.txt", b"in grey")],
            *[("print.jpg", picture(9, "CMYK", "jpeg")), ("print.txt", b"in four inks")],
        ],
        "zero size": [("bad.png", b""), text],
        "huge": [("bad.png", bomb()), text],
    }[kind]


def write_bad(kind: str, folder: str | Path, shard: int = 0) -> Path:
    """The tar of a kind, ``folder/00000.tar``; not written for ``missing``. Latents are in ``folder/00000-of-00001.tar``.

    Args:
        kind: one of `KINDS`.
        folder: is made if need be.
        shard: number in the name, of pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if KINDS[kind].encoded:
        return bad_latents(kind, folder)
    file = folder / f"{shard:05d}.tar"
    if kind in ("truncated", "bad header", "empty", "garbage"):
        content = bytearray(good_shard(file).read_bytes())
        with tarfile.open(file) as archive:
            offsets = [member.offset for member in archive]
        if kind == "bad header":
            content[offsets[4] : offsets[4] + 512] = b"\xa5" * 512
        damaged = {"truncated": content[: offsets[7] + 515], "empty": b"", "garbage": numpy.random.RandomState(0).bytes(9000)}
        file.write_bytes(damaged.get(kind, content))
    elif kind != "missing":
        members = [member for seed, key in enumerate(GOOD) for member in captioned(key, seed)]
        write_tar(file, members[:4] + bad_members(kind) + members[4:])
    return file


def bad_latents(kind: str, folder: Path) -> Path:
    """A shard as tools/encode_latents.py writes them, with the manifest; its third sample ``000000002`` is bad."""
    samples = []
    for number in range(5):
        x0 = numpy.random.RandomState(number).randn(*LATENT).astype(numpy.float32)
        if number == 2:
            x0 = numpy.where(x0 > 0, numpy.float32("nan"), x0) if kind == "NaN latent" else x0[:, :3]
        samples.append({"x0.npy": to_npy(x0)})
    file = folder / f"{shard_name(0, 1)}.tar"
    with open(file, "wb") as stream:
        manifest = write_shard(stream, HEADER, {}, 0, samples)
    file.with_suffix(".json").write_text(json.dumps(manifest))
    return file
