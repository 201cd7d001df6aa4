"""Preemption: a signal becomes a checkpoint, ``RUN/REQUEUE`` and exit code 75, on every rank after the same step.

A run that is complete, the validation of its last step included, leaves ``RUN/DONE`` instead and ends with 0, so that a job
script need not guess: 75 and REQUEUE, start again with ``--ckpt_path last``; 0 and DONE, finished; anything else, failed.

Lightning's own handling is off. It answers SIGTERM with a broadcast inside of the signal handler, whatever the rank is in the
middle of, polls a flag on the device before each batch (a synchronisation) and hides the errors of that poll; its requeue lost
2 of 6 runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_info

from distill.callbacks.missed_validation import is_missed, validate
from distill.callbacks.signals import LISTENER
from distill.checkpoints import RunCheckpoint, atomic_writer

EXIT_PREEMPTED = os.EX_TEMPFAIL
"""75: the exit code of every rank of a run that was told to leave and can be continued."""

DONE, REQUEUE = "DONE", "REQUEUE"
"""Files of the run folder: JSON with the step and the time, and the signal in REQUEUE."""


TEARDOWN_SECONDS = 20.0
"""A process that failed, or was told to leave, ends within this time though a data worker or a collective be stuck."""


class Preempted(SystemExit):
    """Ends a process with `EXIT_PREEMPTED`."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Preemption(Checkpoint):
    """Leaves training for a signal, and says in the run folder how training ended.

    Signals are looked at when a step has ended, all ranks together: one that comes during the start, a validation or a save is
    acted on when the next step is done (or, before the first, when training would start), one that comes after the last step
    is not, for the run is about to finish. So a notice must be longer than a validation, or else steps since the last save are
    lost; by default each validation has a save just before it. A second signal changes nothing. The validation of a step that
    a run was left or killed at is made when it starts again, before training goes on and before DONE: see `is_missed`.

    Ranks agree through a gloo group of their own: on a GPU's group each step would wait for the device. (If gloo finds no
    way between the nodes, name the network interface in ``GLOO_SOCKET_IFNAME``.)

    A `Checkpoint` to Lightning, so that it comes after the callbacks whose state is saved.

    Args:
        timeout: how long a rank waits for the others.
    """

    def __init__(self, timeout: timedelta):
        self.timeout = timeout
        self.group: Any = None
        self.listening = self.ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens, and clears away how the start before ended."""
        if stage != "fit":
            return
        self.listening, self.ended = LISTENER.start(), False
        without_signal_handling(trainer)
        setattr(trainer.fit_loop, "run", lambda: self._fit(trainer))
        self.group = None
        if trainer.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)
        self._remove(trainer, REQUEUE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There are steps to do; is there time to?"""
        self._remove(trainer, DONE)
        if number := self._largest(LISTENER.received):
            self._leave(trainer, number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and leaves if any rank was told to."""
        if getattr(pl_module, "within_step", False) or trainer.global_step == trainer.max_steps:
            return
        if number := self._largest(LISTENER.received):
            run_checkpoint(trainer).save(trainer)
            self._leave(trainer, number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The steps, or the time, are used up, on every rank."""
        self._largest(0)
        self.ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes DONE, the other callbacks (exports) having ended. Nobody waits for rank zero, whose exports may take long."""
        LISTENER.ignore()
        complete = self.ended or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if complete and not (Path(trainer.default_root_dir) / DONE).is_file():
            self._write(trainer, DONE, "finished")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The signals are the caller's again, if they were before."""
        if self.listening:
            LISTENER.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise: Lightning calls no teardown then. Where the process is the run's own, its end is made sure of."""
        if self.listening:
            LISTENER.stop()
        else:
            end_within(TEARDOWN_SECONDS, exception)

    # ------------------------------------------------------------------------------------------------------------------

    def _fit(self, trainer: Trainer) -> None:
        """What Lightning runs instead of its loop, which comes after. No hook is called where there are no steps left to do."""
        loop, done = trainer.fit_loop, Path(trainer.default_root_dir) / DONE
        complete = done.is_file() and json.loads(done.read_text()).get("step") == trainer.global_step
        if self._largest(int(not complete and is_missed(trainer, run_checkpoint(trainer).validated_step))):
            if number := self._largest(LISTENER.received):
                self._leave(trainer, number)
            validate(trainer)
        type(loop).run(loop)

    def _largest(self, number: int) -> int:
        """The largest over the ranks; each waits for all others."""
        if self.group is None:
            return number
        largest = torch.tensor(number)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(largest)

    def _leave(self, trainer: Trainer, number: int) -> None:
        LISTENER.ignore()
        name = signal.Signals(number).name
        self._write(trainer, REQUEUE, "time", signal=name)
        leave_children_alone(trainer)
        step = trainer.global_step
        rank_zero_info(f"{name}: leaving at step {step} with exit code {EXIT_PREEMPTED}; --ckpt_path last continues")
        self._largest(0)  # a rank that ends before REQUEUE is there may have srun end the one that writes it
        raise Preempted

    def _write(self, trainer: Trainer, name: str, time: str, **others: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            with atomic_writer(Path(trainer.default_root_dir) / name) as file:
                file.write(json.dumps({"step": trainer.global_step, **others, time: now}).encode())

    def _remove(self, trainer: Trainer, name: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            (Path(trainer.default_root_dir) / name).unlink(missing_ok=True)


def run_checkpoint(trainer: Trainer) -> RunCheckpoint:
    """What keeps the run's checkpoints."""
    return next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint))


def without_signal_handling(trainer: Trainer) -> None:
    """Turns off how Lightning 2.6 itself deals with signals; see above for what is wrong with it."""
    setattr(trainer._signal_connector, "register_signal_handlers", lambda: None)
    setattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)


def leave_children_alone(trainer: Trainer) -> None:
    """Has Lightning watch no more over the ranks that it started: it would kill this process because they end with 75."""
    getattr(trainer.strategy.launcher, "procs", []).clear()


def end_within(seconds: float, exception: BaseException) -> None:
    """Ends this process if it is still there after so long, and prints the exception, which Python would do at the very end."""
    said = "".join(traceback.format_exception(exception))  # holds nothing of the run, which is to be freed
    code = EXIT_PREEMPTED if isinstance(exception, Preempted) else 1

    def end() -> None:
        sys.stderr.write(said)
        sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
