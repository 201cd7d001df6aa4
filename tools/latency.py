"""How long a sample of a student takes, and of its teacher: milliseconds, evaluations as counted, memory; a table and JSON.

    python tools/latency.py --teacher runs/digits/teacher/export --guidance 2 --run runs/digits/cd --steps 1 2 4
    python tools/latency.py --teacher runs/sd15/teacher --run runs/sd15/lcm --prompts "a dog" --batch-size 1 8 --out ms.json

A draw goes from labels or prompts to pixels on the device: text encoders, network and codec. After ``--warm-up`` draws,
``--repeats`` are timed one by one, the device waited for at both ends; the figures are the median and the quartiles of these.
Memory is known on CUDA alone: the weights that the draw needs (not what else is in a run, such as its teacher), and the most
that it allocates besides.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.checkpoints import atomic_writer
from distill.command_line import Parser
from distill.sample_folders import SOLVERS, RunSource, TeacherSource, conditions, counted, requests
from distill.shard_jobs.header import device_name

UNUSED = {"labels": None, "negative_prompt": None, "adapters": None, "seed": 0, "run": None, "teacher": None}

TITLES = ("name", "steps", "guidance", "batch", "evaluations", "ms a sample (quartiles)", "speed-up", "parameters", "memory")


def read_options(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", help="diffusers folder of a teacher")
    add("--run", nargs="+", default=[], help="run folders of students")
    add("--steps", type=int, nargs="+", default=[1, 2, 4], help="sampler steps of the students")
    add("--teacher-steps", type=int, nargs="+", default=[32], help="those of the teacher; speed is compared with the first")
    add("--solver", choices=sorted(SOLVERS), default="euler", help="of the teacher (default euler)")
    add("--guidance", type=float, help="guidance scale of the teacher, 1 is none")
    add("--student-guidance", type=float, help="that of the students")
    add("--checkpoint", default="last", help="of the runs: last, best, or a file")
    add("--weights", default="ema", choices=["ema", "student"], help="of the runs: averaged or present")
    add("--prompts", nargs="+", help="prompts to run through")
    add("--batch-size", type=int, nargs="+", default=[1], help="samples of a draw")
    add("--repeats", type=int, default=10, help="draws that are timed")
    add("--warm-up", type=int, default=2, help="draws before these")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--out", type=Path, help="a file for the JSON")
    options = parser.parse_args(argv)
    for name in ("steps", "teacher_steps", "batch_size", "repeats", "warm_up"):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: give at least 1")
    if not options.run and options.teacher is None:
        parser.error("--run and --teacher are missing: give at least one of the two")
    if options.guidance is not None and options.teacher is None:
        parser.error("--guidance is for --teacher; students have --student-guidance")
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out {options.out}: give the name of a file, in a folder that is there")
    return parser, options


def measure(kind: str, folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a ``run`` or a ``teacher``. Raises ValueError, FileNotFoundError."""
    guidance = options.guidance if kind == "teacher" else options.student_guidance
    given = {kind: folder, "guidance": guidance, "num": max(options.batch_size)}
    arguments = argparse.Namespace(**vars(options) | UNUSED | given)
    source: Any = (TeacherSource if kind == "teacher" else RunSource)(arguments)
    wanted, found = requests(source, arguments), []
    for size in options.batch_size:
        for arguments.steps in options.teacher_steps if kind == "teacher" else options.steps:

            @torch.no_grad()
            def draw(size: int = size) -> Tensor:
                ready = conditions(source, arguments, wanted, range(size))
                return source.space.decode(source.draw(arguments, range(size), ready))

            with counted(source.network) as evaluations:
                draw()
            row = {"name": folder, "kind": kind, "steps": arguments.steps, "guidance": guidance, "batch_size": size}
            row |= {"evaluations": evaluations.samples / size, "forwards": evaluations.forwards}
            times, working = timed(draw, options)
            row |= {"ms": spread([seconds * 1000 / size for seconds in times])}
            found.append(row | weights_of(source, options.device) | {"working_bytes": working})
    return found


def timed(draw: Callable[[], Tensor], options: argparse.Namespace) -> tuple[list[float], int | None]:
    """Seconds of each timed draw, and the most bytes that any of them allocates; None where that is not known."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    for _ in range(options.warm_up):
        draw()
    wait = torch.cuda.synchronize if cuda else lambda device: None
    wait(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        draw()
        wait(device)
        times.append(time.perf_counter() - started)
    return times, torch.cuda.max_memory_allocated(device) - before if cuda else None


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def weights_of(source: RunSource | TeacherSource, device: str) -> dict[str, Any]:
    """Parameters of the network and their precision, and the bytes of all weights on the device that a draw needs."""
    denoiser = source.module if isinstance(source, RunSource) else source.denoiser
    parameters = list(source.network.parameters())
    held = {id(value): value for part in (denoiser, source.space) for value in [*part.parameters(), *part.buffers()]}
    there = [value for value in held.values() if value.device.type == torch.device(device).type]
    return {
        "parameters": sum(value.numel() for value in parameters),
        "precision": str(parameters[0].dtype).removeprefix("torch."),
        "weights_bytes": sum(value.numel() * value.element_size() for value in there),
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds ``speed_up``, the teacher's time by the row's in batches of the same size; None without a teacher."""
    teachers: dict[int, float] = {}
    for row in rows:
        if row["kind"] == "teacher":
            teachers.setdefault(row["batch_size"], row["ms"]["median"])
    for row in rows:
        row["speed_up"] = teachers[row["batch_size"]] / row["ms"]["median"] if teachers else None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---|" + "---:|" * (len(TITLES) - 1)]
    for row in rows:
        ms, speed, working = row["ms"], row["speed_up"], row["working_bytes"]
        cells = [row["name"], row["steps"], "-" if row["guidance"] is None else row["guidance"], row["batch_size"]]
        cells += [f"{row['evaluations']:g}", f"{ms['median']:.3g} ({ms['low']:.3g}..{ms['high']:.3g})"]
        cells += ["-" if speed is None else f"{speed:.2f}x", f"{row['parameters'] / 1e6:.2f} M"]
        cells += ["-" if working is None else f"{(row['weights_bytes'] + working) / 2**20:.0f} MiB"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the table, writes the JSON."""
    parser, options = read_options(argv)
    rows: list[dict[str, Any]] = []
    sources = [("teacher", options.teacher)] * (options.teacher is not None) + [("run", folder) for folder in options.run]
    for kind, folder in sources:
        try:
            rows += measure(kind, folder, options)
        except (ValueError, FileNotFoundError) as error:
            parser.error(f"--{kind} {folder}: {error}")
        gc.collect()  # of two sources, one is in memory at a time
    compare(rows)
    made = {"device": device_name(options.device), "threads": torch.get_num_threads(), "repeats": options.repeats}
    made["versions"] = {"distill": version("distill"), "torch": torch.__version__}
    if options.out is not None:
        with atomic_writer(options.out) as file:
            file.write((json.dumps({"rows": rows, **made}, indent=2) + "\n").encode())
    print(table(rows))
    print(f"\n{made['device']}, {made['threads']} threads, {options.repeats} draws each, torch {torch.__version__}")


if __name__ == "__main__":
    main()
