"""Two processes that work together over gloo, started once for a test file: the file itself, as a program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def start(program: str, rank: int, port: int, folder: Path) -> subprocess.Popen:
    """One of the two: ``program RANK FOLDER``, in an environment in which Lightning takes it for that rank."""
    names = {"MASTER_PORT": port, "WORLD_SIZE": 2, "NODE_RANK": 0, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in names.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    words = [sys.executable, program, str(rank), str(folder)]
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def found_by_two_ranks(program: str, folder: Path) -> list[Any]:
    """What each of the two left in ``FOLDER/RANK.pt``. A rank that fails, or hangs for 200 seconds, is an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(program, rank, port, folder) for rank in (0, 1)]
    try:
        for process in processes:
            output = process.communicate(timeout=200)[0]
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
