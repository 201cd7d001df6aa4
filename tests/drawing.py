"""What the tests of the tools that draw of a teacher share: a teacher, runs that are refused, runs that are killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.denoiser import NetworkDenoiser
from distill.networks.unet2d import UNet2D
from distill.pretrained import save_denoiser
from distill.schedules import RectifiedFlow


def write_teacher(folder: Path, channels: int = 1, size: int = 8, num_classes: int | None = 10, seed: int = 0) -> Path:
    """A small random flow; not too near to zero, for guidance to be seen."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(channels=(8,), layers_per_block=1, attention=(False,), heads_width=8, groups=2)
    network = UNet2D(channels, size, num_classes, **settings)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), folder)
    return folder


def refused(tool, capsys, recipe: Path, out: Path, *arguments) -> str:
    """The line that the tool ends with."""
    with pytest.raises(SystemExit) as end:
        tool.main(["--config", str(recipe), "--out", str(out), *map(str, arguments)])
    return f"{end.value} {capsys.readouterr().err}"


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def start(tool, arguments: list[str]) -> int:
    """A process of its own that runs the tool; forked, so that nothing is imported again."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        try:
            tool.main(arguments)
        finally:
            os._exit(0)
    raise AssertionError


def wait_until(happened, child: int) -> None:
    """Until something happened, or the process has ended."""
    while not happened() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def kill_at_random(tool, arguments: list[str], out: Path, chance: random.Random) -> bool:
    """Runs the tool and kills it: while it starts, or at some time after it has begun to write. Whether it still ran."""
    child, began = start(tool, arguments), time.monotonic()
    if chance.random() < 0.2:
        pause = chance.uniform(0, 0.5)
        wait_until(lambda: time.monotonic() - began > pause, child)
    else:
        wait_until(lambda: any(str(child) in path.name for path in out.glob("*.partial")), child)
        ends = time.monotonic() + chance.uniform(0, 0.15)
        wait_until(lambda: time.monotonic() > ends, child)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def check_killed_and_restarted(tool, arguments: list[str], folder: Path, times: int) -> None:
    """Killed so many times and restarted, the folder is the same to the byte as that of a run that was left alone.

    ``arguments`` end in ``--out``. Some runs die while they write.
    """
    tool.main([*arguments, str(folder / "whole")])
    whole, chance, kills, left, folders = contents(folder / "whole"), random.Random(0), 0, 0, 0
    while kills < times:  # a folder that is finished too soon is compared, and another one begun
        out, folders = folder / str(folders), folders + 1
        while kills < times and kill_at_random(tool, [*arguments, str(out)], out, chance):
            kills += 1
            left += len(list(out.glob("*.partial")))
        tool.main([*arguments, str(out)])
        assert contents(out) == whole
    assert left > 0
