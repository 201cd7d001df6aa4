"""A function on several processes that find each other as torchrun's do, forked from this one: nothing is imported anew."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Launcher = Callable[[int, int, int], dict[str, Any]]
"""What the environment of a rank says, of so many, that meet at a port."""


def torchrun(rank: int, count: int, port: int) -> dict[str, Any]:
    return {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def srun(rank: int, count: int, port: int) -> dict[str, Any]:
    """As slurm/common.sh leaves it, which knows the address; the port is made of the job's number."""
    names = {"SLURM_PROCID": rank, "SLURM_NTASKS": count, "SLURM_STEP_ID": 0, "SLURM_JOB_ID": 7_0000 + port % 10_000}
    return names | {"MASTER_ADDR": "127.0.0.1"}


def on_processes(count: int, folder: Path, work: Callable[[], Any], launcher: Launcher = torchrun) -> list[Any]:
    """What ``work()`` returns on each of ``count`` processes; AssertionError with the traceback of one that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(rank, launcher(rank, count, port), folder, work) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    failures = [file.read_text() for file in sorted(folder.glob("*.error"))]
    assert codes == [0] * count, "\n".join(failures)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _fork(rank: int, names: dict[str, Any], folder: Path, work: Callable[[], Any]) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ.update({key: str(value) for key, value in names.items()})
        torch.save(work(), folder / f"{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
