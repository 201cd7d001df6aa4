"""How fast pairs are read beside a bare loop that decodes the same bytes, held in memory, and does nothing else.

    python tools/bench_pairs.py --case latents --batches 40

Cases: ``digits`` (1x8x8 arrays), ``pixels`` (3x32x32 PNG), ``latents`` (4x64x64 arrays in float16), of random content, in two
shards of a temporary folder that the system has in its cache. To decode is to parse the record, the array (``numpy.load``) or
the picture, to draw the noise again and to stack a batch; reading adds the order, the files and the check sums. ``unparsed`` is
a bare loop that knows the arrays' types and shapes and looks at no header. They take batches in turn.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

from datamodules.members import to_npy, to_png
from datamodules.pairs import PairsDataModule, noise_hash
from datamodules.shard_writing import save_shard
from datamodules.shards import FORMAT
from distill.checkpoints import atomic_writer
from distill.command_line import Parser
from distill.noise import SeededNoise

CASES: dict[str, dict[str, Any]] = {
    "digits": {"shape": [1, 8, 8], "store": "array", "dtype": "float32"},
    "pixels": {"shape": [3, 32, 32], "store": "png", "dtype": "float32"},
    "latents": {"shape": [4, 64, 64], "store": "array", "dtype": "float16"},
}
NPY_HEADER = 128
"""Bytes of NumPy's header before small arrays."""


def header(case: str, total: int) -> dict[str, Any]:
    """What a header must say to be read."""
    shape = CASES[case]["shape"]
    made_by = {"codec": None, "conditioner": None, "guidance": None, "guidance_range": None, "anchored": None}
    sizes = {"num_classes": 10, "widths": {}, "own_null": [], "prompts": False, "total": total, "of": 2}
    noise = {"seed": 0, "noise_check": noise_hash(0, shape)}
    return {"kind": "pairs", "format": FORMAT, "teacher": {"sha256": "0" * 64}, **CASES[case], **made_by, **sizes, **noise}


def random_pair(case: str, number: int) -> dict[str, bytes]:
    """The members of a pair; pictures are smooth, as real ones are: noise would not compress."""
    (channels, height, width), generator = CASES[case]["shape"], numpy.random.default_rng(number)
    record = {"json": json.dumps({"noise": [0, number], "labels": number % 10}).encode()}
    if CASES[case]["store"] == "array":
        return {"x0.npy": to_npy(generator.standard_normal((channels, height, width)).astype(CASES[case]["dtype"])), **record}
    small = Image.fromarray(generator.integers(0, 256, (8, 8, channels), numpy.uint8))
    return {"png": to_png(numpy.array(small.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)), **record}


def decode(members: list[dict[str, bytes]], case: str, parse: bool) -> tuple[torch.Tensor, ...]:
    """A bare loop: samples, noise and labels of a batch. Unless it is to ``parse`` arrays' headers, it knows what they say."""
    shape, dtype = CASES[case]["shape"], CASES[case]["dtype"]
    records, arrays = [], []
    for pair in members:
        records.append(json.loads(pair["json"]))
        if "png" in pair:
            arrays.append(numpy.asarray(Image.open(io.BytesIO(pair["png"]))).transpose(2, 0, 1))
        elif parse:
            arrays.append(numpy.load(io.BytesIO(pair["x0.npy"]), allow_pickle=False))
        else:
            arrays.append(numpy.frombuffer(pair["x0.npy"], dtype, offset=NPY_HEADER).reshape(shape))
    x0 = torch.from_numpy(numpy.stack(arrays)).float()
    x0 = x0 / 127.5 - 1 if "png" in members[0] else x0
    noise = SeededNoise(0, [record["noise"][1] for record in records], shape).draw()
    return x0, noise, torch.tensor([record["labels"] for record in records])


def write_pairs(folder: Path, case: str, pairs: int) -> list[dict[str, bytes]]:
    """Two shards of ``pairs`` random pairs, and the members of each pair."""
    made = [random_pair(case, number) for number in range(pairs)]
    for shard, first in enumerate((0, pairs // 2)):
        part, null = made[first : first + pairs // 2], {"labels": torch.tensor([10])}
        save_shard(folder, atomic_writer, header(case, pairs) | {"shard": shard}, null, first, part)
    return made


def measure(case: str, batches: int, batch_size: int, pairs: int = 2000) -> dict[str, Any]:
    """The rates by CPU time of reading and of the bare loops, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        made = write_pairs(Path(folder), case, pairs)
        module = PairsDataModule(folder, batch_size=batch_size, batches_per_epoch=batches + 2)
        reading: Iterator[Any] = iter(module.train_dataloader())
        numbers = numpy.random.default_rng(0)
        times: dict[str, list[float]] = {"read": [], "bare": [], "unparsed": []}
        for batch in range(batches + 2):
            chosen = [made[number] for number in numbers.integers(0, pairs, batch_size)]
            parts = {"read": partial(next, reading)}
            parts |= {"bare": partial(decode, chosen, case, True), "unparsed": partial(decode, chosen, case, False)}
            # Whoever comes later finds the caches warm: each comes first, second and third.
            for name in [*parts, *parts][batch % 3 : batch % 3 + 3]:
                times[name].append(seconds(parts[name]))
    # A busy machine only ever adds: the lower quartile is nearer to what each costs than the median.
    cost = {name: statistics.quantiles(values[2:])[0] for name, values in times.items()}
    rates = {f"{name}_pairs_per_second": round(batch_size / value) for name, value in cost.items()}
    ratios = {"ratio": round(cost["bare"] / cost["read"], 3), "unparsed_ratio": round(cost["unparsed"] / cost["read"], 3)}
    return {"case": case, "batch_size": batch_size, "batches": batches, **rates, **ratios}


def seconds(part: Callable[[], Any]) -> float:
    """CPU time of a call."""
    started = time.process_time()
    part()
    return time.process_time() - started


def main() -> None:
    """Prints a JSON line for each case."""
    parser = Parser(__doc__)
    parser.add_argument("--case", choices=CASES, help="one of the three; default all")
    parser.add_argument("--batches", type=int, default=40, help="batches that are timed")
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in [arguments.case] if arguments.case else CASES:
        print(json.dumps(measure(case, arguments.batches, arguments.batch_size)))


if __name__ == "__main__":
    main()
