"""How fast shards of pictures are streamed beside a bare loop that reads and decodes the same tars and does nothing else.

    python tools/bench_stream.py --rounds 5

Random pictures of 256 x 256, JPEG and PNG, with captions, in shards of a temporary folder that the system has in its cache. The
bare loop: ``tarfile``, ``PIL``, a random crop of 224 and a flip, batches in float32, in as many processes as there are workers,
each of which reads some of the shards; nothing is sent from process to process. They run in turn. ``share`` is the bare loop's
time over that of streaming; other programs on the machine spoil it, so there are also ``worker_share``, of the CPU time of the
workers alone, which bounds the rate where the training process has a core of its own, and ``cpu_share``, of all processes.
Each is of the best of all rounds. The second table is what a bad sample costs beside a good one.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from datamodules.streams.contents import ImageContents
from datamodules.webdataset import WebDatasetDataModule
from distill.command_line import Parser

SIZE, CROP = 256, 224
Members = list[tuple[str, bytes]]


@cache
def picture(number: int, kind: str) -> bytes:
    """A picture that compresses as photographs do: smooth, with some noise."""
    generator = numpy.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), numpy.uint8))
    pixels = numpy.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) + generator.normal(0, 4, (SIZE, SIZE, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)).save(stream, kind)
    return stream.getvalue()


def sample(number: int, content: bytes, kind: str, caption: bool = True) -> Members:
    """The members of a sample."""
    return [(f"{number:06d}.{kind}", content)] + [(f"{number:06d}.txt", b"a picture of noise")] * caption


def write_shards(folder: Path, samples: list[Members], shards: int) -> list[str]:
    """Tars of these samples."""
    files = []
    for shard in range(shards):
        files.append(str(folder / f"{shard:05d}.tar"))
        with tarfile.open(files[-1], "w") as archive:
            for name, content in (member for members in samples[shard::shards] for member in members):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return files


# ----------------------------------------------------------------------------------------------------------- what is run


def bare_loop(files: list[str], batch_size: int) -> None:
    """Reads and decodes all samples of some tars."""
    pictures, captions, batch, draws = [], [], None, random.Random(0)
    for file in files:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".txt"):
                    captions.append(content.decode())
                    continue
                image = Image.open(io.BytesIO(content)).convert("RGB")
                left, top = draws.random() * (SIZE - CROP), draws.random() * (SIZE - CROP)
                box = (left, top, left + CROP, top + CROP)
                pixels = numpy.asarray(image.resize((CROP, CROP), Image.Resampling.LANCZOS, box))
                pictures.append(pixels[:, ::-1] if draws.random() < 0.5 else pixels)
                if len(pictures) == batch_size:
                    stacked = torch.from_numpy(numpy.ascontiguousarray(numpy.stack(pictures).transpose(0, 3, 1, 2)))
                    batch = stacked.float().div_(127.5).sub_(1)
                    pictures.clear()
    assert batch is not None


def bare(files: list[str], batch_size: int, workers: int) -> None:
    """The bare loop in so many processes."""
    context = multiprocessing.get_context("fork")
    parts = [context.Process(target=bare_loop, args=(files[worker::workers], batch_size)) for worker in range(workers)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()


def stream(files: list[str], mode: Any, batch_size: int, batches: int, workers: int) -> None:
    """Batches of the data module, as training asks for them."""
    contents = ImageContents(size=CROP, resize=SIZE, crop="random", flip=True, captions="txt")
    settings: dict[str, Any] = {"batch_size": batch_size, "batches_per_epoch": batches, "num_workers": workers}
    data = WebDatasetDataModule(files, contents, mode, **settings, shuffle_buffer=100, max_reject_rate=1.0)
    loader = data.train_dataloader()
    assert sum(1 for _ in loader) == batches


Cost = tuple[float, float, float]


def cost(work: Callable[[], None]) -> Cost:
    """The seconds that pass, CPU time of the processes that were started, and of all with this one."""
    passed, used = time.perf_counter(), os.times()
    work()
    passed, now = time.perf_counter() - passed, os.times()
    started = now.children_user + now.children_system - used.children_user - used.children_system
    return passed, started, started + now.user + now.system - used.user - used.system


def rates(kind: str, mode: str, workers: int, count: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Pictures a second of streaming and of the bare loop, and the shares.

    Three passes less one of them: the start of processes, and what workers have prepared when the last batch was taken, cancel.
    """
    times: dict[tuple[str, int], list[Cost]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(Path(folder), [sample(number, picture(number, kind), kind) for number in range(count)], 8)
        works = {
            **{("stream", n): partial(stream, files, mode, batch_size, n * count // batch_size, workers) for n in (1, 3)},
            **{("bare", n): partial(bare, files * n, batch_size, workers) for n in (1, 3)},
        }
        for turn in range(rounds):
            for name in sorted(works, reverse=bool(turn % 2)):
                times[name].append(cost(works[name]))
    least = [{name: min(found[which] for found in times[name]) for name in works} for which in range(3)]
    wall, *of_cpu = ({name: found[name, 3] - found[name, 1] for name in ("stream", "bare")} for found in least)
    ours = {"images_per_second": round(2 * count / wall["stream"]), "bare_images_per_second": round(2 * count / wall["bare"])}
    named = zip(("share", "worker_share", "cpu_share"), (wall, *of_cpu))
    shares = {name: round(found["bare"] / found["stream"], 3) for name, found in named}
    return {"kind": kind, "mode": mode, "workers": workers, **ours, **shares}


# ----------------------------------------------------------------------------------------------------------- bad samples


def bad_sample(what: str, number: int) -> Members:
    """One bad sample; of ``cut image`` three quarters of the bytes are there, which are decoded."""
    content = picture(number, "jpeg")
    if what == "no caption":
        return sample(number, content, "jpeg", caption=False)
    if what == "huge":
        return sample(number, bomb(), "png")
    cut = {"zero size": 0, "bad image": 99, "cut image": len(content) * 3 // 4}[what]
    return sample(number, content[:cut], "jpeg")


@cache
def bomb() -> bytes:
    """A picture of 144 million pixels."""
    stream = io.BytesIO()
    Image.new("1", (12000, 12000)).save(stream, "png")
    return stream.getvalue()


def cost_of_bad(what: str, mode: str, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU time that a bad sample costs: an epoch with one in two bad, less one of the good ones alone."""
    good = [sample(number, picture(number, "jpeg"), "jpeg") for number in range(count)]
    with tempfile.TemporaryDirectory() as clean, tempfile.TemporaryDirectory() as mixed:
        alone = write_shards(Path(clean), good, 1)
        bad = [bad_sample(what, count + number) for number in range(count)]
        both = write_shards(Path(mixed), [one for pair in zip(good, bad) for one in pair], 1)
        batches = count // 16
        longer = 2 * batches if mode == "exact" else batches  # a stream fills its batches with good ones
        times: dict[str, list[float]] = {"good": [], "both": []}
        for _ in range(rounds + 1):
            times["good"].append(cost(partial(stream, alone, mode, 16, batches, 0))[2])
            times["both"].append(cost(partial(stream, both, mode, 16, longer, 0))[2])
    each = 1000 * (min(times["both"][1:]) - min(times["good"][1:])) / count
    return {"bad": what, "mode": mode, "ms": round(each, 2), "good_ms": round(1000 * min(times["good"][1:]) / count, 2)}


def main() -> None:
    """Prints a JSON line for each case."""
    parser = Parser(__doc__)
    parser.add_argument("--images", type=int, default=512, help="pictures of a pass")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="of each case")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", choices=["jpeg", "png"], nargs="+", default=["jpeg", "png"])
    parser.add_argument("--only", choices=["rates", "bad"], help="one of the two tables; default both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.only != "bad":
        for kind, workers, mode in product(arguments.kinds, arguments.workers, ("exact", "resampled")):
            print(json.dumps(rates(kind, mode, workers, arguments.images, arguments.batch_size, arguments.rounds)), flush=True)
    if arguments.only != "rates":
        for what, mode in product(("no caption", "zero size", "bad image", "cut image", "huge"), ("exact", "resampled")):
            print(json.dumps(cost_of_bad(what, mode, 256, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
