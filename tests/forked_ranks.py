"""Runs of the command line on several ranks, in processes forked from this one: what is imported need not be imported again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer

from distill import cli
from distill.callbacks.signals import LISTENER
from distill.checkpoints import find_checkpoint


def last_save(run: Path) -> int:
    """When the newest checkpoint was written; 0 for none."""
    path = find_checkpoint(run)
    return 0 if path is None else path.stat().st_mtime_ns


class SignalAt(Callback):
    """Sends ``signal_name`` to its own process, ``times`` over, when ``hook`` is called after ``step`` steps, on one rank."""

    def __init__(self, hook: str, step: int, signal_name: str = "SIGUSR1", times: int = 1, rank: int = 0):
        self.left = times

        def send(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step and trainer.global_rank == rank:
                for _ in range(self.left):
                    os.kill(os.getpid(), signal.Signals[signal_name])
                self.left = 0

        setattr(self, hook, send)


class Ranks:
    """``python -m distill WORDS`` on ``count`` ranks in ``folder``, each a forked process whose output is in ``rank0.log`` ...

    ``prepare`` is called in each before it starts.
    """

    def __init__(self, words: Iterable[str], count: int, folder: Path, prepare: Callable[[], object] = lambda: None):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "NODE_RANK": 0}
        # Plain DDP lays its buckets out anew after the first step of each start. The sums of three ranks or more are then taken
        # in another order, so that a run that was cut differs in the last bit; under this strategy the layout stays.
        strategy = "ddp" if count <= 2 else "ddp_find_unused_parameters_true"
        words = [*words, f"--trainer.devices={count}", *([f"--trainer.strategy={strategy}"] if count > 1 else [])]
        self.codes: dict[int, int] = {}
        listening = LISTENER.start()  # before the fork: a signal that comes first of all must not kill
        self.processes = [self._fork(words, {**names, "LOCAL_RANK": rank}, prepare) for rank in range(count)]
        if listening:
            LISTENER.stop()

    def _fork(self, words: list[str], names: dict[str, Any], prepare: Callable[[], object]) -> int:
        if process := os.fork():
            return process
        code = 1
        try:
            os.chdir(self.folder)
            output = os.open(f"rank{names['LOCAL_RANK']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            os.environ.update({key: str(value) for key, value in names.items()})
            sys.argv = ["distill"]
            prepare()
            cli.main(words)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def send(self, number: int, ranks: Iterable[int] | None = None) -> None:
        """A signal to these ranks, or to all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.kill(self.processes[rank], number)

    def wait(self, ranks: Iterable[int] | None = None, seconds: float = 120.0) -> list[int]:
        """Exit codes, for who was killed the negative number of the signal. After ``seconds``, kills all: a TimeoutError."""
        ranks, end = list(range(len(self.processes)) if ranks is None else ranks), time.monotonic() + seconds
        while missing := [rank for rank in ranks if rank not in self.codes]:
            ended, status = os.waitpid(self.processes[missing[0]], os.WNOHANG)
            if ended:
                self.codes[missing[0]] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"rank {missing[0]} did not end: {self.output(missing[0])[-2000:]}")
            else:
                time.sleep(0.005)
        return [self.codes[rank] for rank in ranks]

    def wait_for_save(self, run: Path, before: int) -> None:
        """Until these processes have saved, which `last_save` of the run had been ``before``."""
        while last_save(run) == before:
            assert os.waitpid(self.processes[0], os.WNOHANG) == (0, 0), f"ended before it saved: {self.output()[-3000:]}"
            time.sleep(0.001)

    def kill(self) -> None:
        """Ends who is left."""
        for rank in set(range(len(self.processes))) - set(self.codes):
            os.kill(self.processes[rank], signal.SIGKILL)
            self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self.processes[rank], 0)[1])

    def output(self, rank: int = 0) -> str:
        """What a rank has printed."""
        return (self.folder / f"rank{rank}.log").read_text()
