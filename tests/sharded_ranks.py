"""Processes that work together over gloo, forked from a program that is started for them and imports for all of them; and
draws of one process as those of several ranks.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = (torch.rand, torch.randn, torch.randint, torch.randn_like)


def run_alone(program: str, folder: Path, seconds: float = 1500.0) -> None:
    """``program FOLDER`` in a process that has used no threads yet: they would be missing in its forks."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, program, str(folder)]
    ended = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    assert ended.returncode == 0, ended.stdout[-6000:]


def found(folder: Path, count: int) -> list[Any]:
    """What each of ``count`` ranks left by `fork_ranks`."""
    return [torch.load(folder / f"{rank}_of_{count}.pt") for rank in range(count)]


def fork_ranks(function: Callable[[int], Any], count: int, folder: Path, seconds: float = 1400.0) -> None:
    """Leaves in ``folder`` what ``function(rank)`` returns on each of ``count`` ranks, all forked from this process.

    One that fails, or is not done in time, is an error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "NODE_RANK": 0}
    processes = [_fork(function, {**names, "LOCAL_RANK": rank}, folder) for rank in range(count)]
    end, running = time.monotonic() + seconds, set(processes)
    try:
        while running:
            for process in tuple(running):
                ended, status = os.waitpid(process, os.WNOHANG)
                running -= {ended}
                assert status == 0, (folder / f"{processes.index(process)}.log").read_text()[-4000:]
            assert time.monotonic() < end, [(folder / f"{rank}.log").read_text()[-2000:] for rank in range(count)]
            time.sleep(0.01)
    finally:
        for process in running:
            os.kill(process, 9)
            os.waitpid(process, 0)


def _fork(function: Callable[[int], Any], names: dict[str, Any], folder: Path) -> int:
    if process := os.fork():
        return process
    code, rank = 1, int(names["LOCAL_RANK"])
    try:
        output = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ.update({key: str(value) for key, value in names.items()})
        torch.save(function(rank), folder / f"{rank}_of_{names['WORLD_SIZE']}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class DrawsOfRanks(TorchFunctionMode):
    """Within it one process draws for the rows of a joined batch what ``ranks`` of ``rows`` rows draw for theirs.

    `watch` a method: it then seeds a generator for each rank where it seeds its own.
    """

    def __init__(self, ranks: int, rows: int):
        super().__init__()
        self.ranks, self.rows, self.generators = ranks, rows, [torch.Generator() for _ in range(ranks)]

    def watch(self, method: Any) -> Any:
        seed_draws = method.seed_draws

        def seed(stream: str = "") -> None:
            seed_draws(stream)
            for rank, generator in enumerate(self.generators):
                generator.manual_seed(method.draw_key(f"{rank}/{stream}"))

        method.seed_draws = seed
        return method

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = keywords or {}
        if function not in DRAWS or "generator" in keywords:
            return function(*arguments, **keywords)
        if function is torch.randn_like:
            like = arguments[0]
            function, arguments, keywords = torch.randn, tuple(like.shape), {"dtype": like.dtype}
        bounds, shape = arguments[:-1], arguments[-1]
        if function is not torch.randint:
            bounds, shape = (), arguments if isinstance(arguments[0], int) else arguments[0]
        # A rank's rows for samples come before those for data, and the joined batch has all samples before all data.
        each = [
            function(*bounds, (shape[0] // self.ranks, *shape[1:]), **keywords, generator=generator).split(self.rows)
            for generator in self.generators
        ]
        return torch.cat([part[chunk] for chunk in range(len(each[0])) for part in each])
