"""Trains recipes with several seeds, measures each at several numbers of steps, and prints README's table.

    python tools/table.py --configs configs/digits/{cd,ct,ict,ect,lcm}.yaml --seeds 0 1 2

Every run is a ``python -m distill fit`` of its own in ``runs/table/<recipe>-<seed>``, continued if it was interrupted; its
samples come from ``tools/sample.py``, its figures from ``tools/fid.py``. The figures stay beside the runs as ``table.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from distill.command_line import Parser

TOOLS = Path(__file__).resolve().parent
FIGURES = ("distance", "accuracy")


def call(threads: int, *command: str) -> None:
    """Runs a command of this Python on ``threads`` threads; its output is shown if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def measure(config: Path, seed: int, arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Trains one recipe with one seed and returns its figures by number of steps."""
    run = Path(arguments.out) / f"{config.stem}-{seed}"
    fit = ["-m", "distill", "fit", "--config", str(config), "--ckpt_path", "last", "--seed_everything", str(seed)]
    call(arguments.threads, *fit, f"--trainer.default_root_dir={run}", *arguments.fit)
    figures = {}
    for steps in arguments.steps:
        samples = run / f"steps_{steps}"
        drawn = ["--steps", str(steps), "--num", str(arguments.num), "--seed", "0", "--overwrite", "--out", str(samples)]
        call(arguments.threads, str(TOOLS / "sample.py"), "--run", str(run), *drawn, *arguments.sample)
        result = samples / "fid.json"
        compared = ["--samples", str(samples), "--reference", arguments.reference, "--features", "pixels", "--out", str(result)]
        call(arguments.threads, str(TOOLS / "fid.py"), *compared)
        measured = json.loads(result.read_text())
        figures[steps] = {name: measured[name] for name in FIGURES if name in measured}
    print(config.stem, seed, figures, file=sys.stderr, flush=True)
    return figures


def cell(values: list[float]) -> str:
    """Mean and the range of the seeds."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def main() -> None:
    """Trains, measures, prints."""
    parser = Parser(__doc__)
    parser.add_argument("--configs", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--num", type=int, default=1800, help="samples a measurement")
    parser.add_argument("--reference", default="digits", help="see tools/fid.py")
    parser.add_argument("--out", default="runs/table")
    parser.add_argument("--fit", nargs="*", default=[], help="further arguments of fit, e.g. trainer.max_steps=10")
    parser.add_argument("--sample", nargs="*", default=[], help="further arguments of sample.py")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    arguments = parser.parse_args()
    arguments.fit = [f"--{argument}" for argument in arguments.fit]
    tasks = list(product(arguments.configs, arguments.seeds))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(tasks, pool.map(lambda task: measure(*task, arguments), tasks), strict=True))
    table = [{"config": str(config), "seed": seed, "figures": figures} for (config, seed), figures in results.items()]
    (Path(arguments.out) / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    print("| recipe |" + "".join(f" distance, {n} steps | accuracy |" for n in arguments.steps))
    print("|---|" + "---|---|" * len(arguments.steps))
    for config in arguments.configs:
        cells = [
            cell([results[config, seed][steps][name] for seed in arguments.seeds])
            for steps, name in product(arguments.steps, FIGURES)
        ]
        print(f"| {config.stem} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
