"""A run that is killed, or told to leave, at random points; prints how often that went well.

    python tests/interruptions.py --kills 200 --signals 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from forked_ranks import Ranks, last_save
from resuming import same
from tiny_run import write_recipe

from distill import cli
from distill.callbacks.preemption import DONE, EXIT_PREEMPTED, REQUEUE
from distill.checkpoints import TEMPORARY, find_checkpoint, read_checkpoint

QUIET = ("--trainer.logger=false", "--sample_grid.lines=1", "--trainer.val_check_interval=50")


def saved_step(run: Path) -> int:
    """The step of the newest checkpoint, -1 for none; an error if it does not load."""
    path = find_checkpoint(run)
    return -1 if path is None else read_checkpoint(path)["global_step"]


def finish_and_compare(fit: list[str], run: Path, ranks: int, steps: int) -> None:
    """Ends ``run`` at ``steps``, and asserts that it is to the bit what an uninterrupted one is."""
    found = []
    for name in (run.name, "whole"):
        words = [*fit, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={name}", "--checkpoint.every_n_steps=1000"]
        together = Ranks(words, ranks, run.parent)
        assert together.wait(seconds=600) == [0] * ranks, together.output()[-3000:]
        assert (run.parent / name / DONE).is_file() and not (run.parent / name / REQUEUE).exists()
        found.append(read_checkpoint(run.parent / name / "checkpoints" / "last.ckpt"))
    assert all(same(found[0][key], found[1][key]) for key in ("global_step", "state_dict", "optimizer_states", "random_states"))


def kill_often(folder: Path, kills: int, ranks: int = 1, seed: int = 0) -> tuple[int, int]:
    """Kills a run that saves each step so many times; (kills after which the newest checkpoint loaded, kills within a save)."""
    fit, draw = ["fit", "--config", str(write_recipe(folder)), "--ckpt_path=last", *QUIET], random.Random(seed)
    run, loaded, within, step = folder / "killed", 0, 0, -1
    words = [*fit, "--trainer.max_steps=1000000", f"--trainer.default_root_dir={run}", "--checkpoint.every_n_steps=1"]
    for _ in range(kills):
        before = last_save(run)
        together = Ranks(words, ranks, folder)
        together.wait_for_save(run, before)
        time.sleep(draw.uniform(0, 0.1))
        together.kill()
        within += any((run / "checkpoints").glob(f"*{TEMPORARY}"))
        now = saved_step(run)
        assert now > step, f"step {now} after step {step} had been saved"
        loaded, step = loaded + 1, now
    finish_and_compare(fit, run, ranks, step + 3)
    return loaded, within


def signal_often(folder: Path, ranks: int, number: signal.Signals, everyone: bool, cuts: int, seed: int = 0) -> list[int]:
    """Tells a run so many times to leave, one rank or all, from its first instant on; the steps that it was left at."""
    fit, draw = ["fit", "--config", str(write_recipe(folder)), "--ckpt_path=last", *QUIET], random.Random(seed)
    run, steps = folder / "told", []
    words = [*fit, "--trainer.max_steps=1000000", f"--trainer.default_root_dir={run}", "--checkpoint.every_n_steps=7"]
    for _ in range(cuts):
        before = last_save(run)
        together = Ranks(words, ranks, folder)
        if draw.random() < 0.75:
            together.wait_for_save(run, before)
        time.sleep(draw.uniform(0, 1))
        together.send(number, None if everyone else [draw.randrange(ranks)])
        codes = together.wait()
        assert codes == [EXIT_PREEMPTED] * ranks, (codes, together.output()[-3000:])
        left = json.loads((run / REQUEUE).read_text())
        assert left["signal"] == number.name and not (run / DONE).exists()
        assert left["step"] == max(saved_step(run), 0) >= max(steps, default=0)
        steps.append(left["step"])
    finish_and_compare(fit, run, ranks, steps[-1] + 3)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of a run that saves each step")
    parser.add_argument("--signals", type=int, default=10, help="SIGUSR1s and SIGTERMs, to one rank and to all, each so many")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks that are told to leave")
    parser.add_argument("--seed", type=int, default=0, help="of the points in time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TMPDIR"] = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=".", prefix="interruptions-") as name:
        folder = Path(name).resolve()
        sys.argv = sys.argv[:1]
        cli.main(["fit", "--config", str(write_recipe(folder)), *QUIET, "--trainer.fast_dev_run=1"])  # imports what it needs
        if options.kills:
            loaded, within = kill_often(folder / "kills", options.kills, seed=options.seed)
            print(f"{options.kills} kills, {within} of them within a save: the newest checkpoint loaded {loaded} times")
        for ranks in options.ranks if options.signals else []:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                for everyone in (False, True):
                    part = folder / f"{ranks}-{number.name}-{everyone}"
                    steps = signal_often(part, ranks, number, everyone, options.signals, options.seed)
                    who = "all" if everyone else "one"
                    print(f"{ranks} ranks, {number.name} to {who}: left {len(steps)} times with {EXIT_PREEMPTED}, at {steps}")


if __name__ == "__main__":
    main()
