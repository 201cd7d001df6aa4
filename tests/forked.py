"""A function on several processes that find each other as torchrun's do, forked from this one: nothing is imported anew."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_processes(count: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """What ``work()`` returns on each of ``count`` processes; AssertionError with the traceback of one that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(rank, count, port, folder, work) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    failures = [file.read_text() for file in sorted(folder.glob("*.error"))]
    assert codes == [0] * count, "\n".join(failures)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _fork(rank: int, count: int, port: int, folder: Path, work: Callable[[], Any]) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        names = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in names.items()})
        torch.save(work(), folder / f"{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
