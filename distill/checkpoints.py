"""Checkpoints that survive a kill at any moment: written beside the target, flushed, renamed; read as data, never as code.

Lightning's own "atomic" save goes through ``$TMPDIR`` (a move across file systems is a copy, and a kill in the middle of
it leaves a broken ``last.ckpt``), never flushes to disk, and swallows PermissionError. Hence this file.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

TEMPORARY = ".partial"
"""Suffix of a file being written: such a file is never read, and the next save in its folder removes it."""


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of ``path`` when the block ends well, and leaves ``path`` as it was otherwise.

    The folder is created when missing. On return the bytes and the folder entry are on disk (fsync of both).

    Raises:
        OSError: disk full, no permission, a file where the folder should be ...: the same class of error, the
            message naming ``path`` and what is left there.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (failure := _system_error(error)) is None:
            raise
        state = "the file that was there before is intact" if path.is_file() else "nothing was left there"
        raise type(failure)(failure.errno, f"{failure.strerror or failure}; could not write {path} ({state})") from error


def _system_error(error: BaseException) -> OSError | None:
    """The system's refusal behind ``error``: torch's writer covers it with a RuntimeError of its own."""
    origin = error.__context__ if isinstance(error, RuntimeError) else error
    return origin if isinstance(origin, OSError) else None


def _sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable, where the file system allows it (some network ones refuse; nothing is lost)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Removes the unfinished files that a killed process left in ``folder``."""
    for leftover in Path(folder).glob(f"*{TEMPORARY}"):
        with suppress(OSError):
            leftover.unlink()


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mapped: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint file. Tensors and plain types only: a pickle that would run code is refused.

    Args:
        path: the file.
        map_location: where tensors go.
        mapped: whether tensors on the CPU are windows on the file, of which only what is read is in memory, once for all
            processes of a node. They must be copied and let go before anybody removes the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, not a checkpoint, or holds something else than tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; `ls {path.parent}` shows what there is")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a checkpoint of tensors and plain types, so it was not loaded: {error}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint: {error}; use another file of {path.parent}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} holds no `state_dict`, so it is not a checkpoint of this package")
    return content


class AtomicCheckpointIO(CheckpointIO):
    """How the Trainer writes and reads checkpoints: whole or not at all, and ``weights_only`` whatever is asked for.

    Args:
        mapped: see `read_checkpoint`; for a strategy whose ranks take their rows of each tensor.
    """

    def __init__(self, mapped: bool = False):
        self.mapped = mapped

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes ``checkpoint`` to ``path``; see `atomic_writer` for what is promised and raised."""
        if storage_options is not None:
            raise TypeError("storage_options: not supported by AtomicCheckpointIO, which writes to file systems; leave it out")
        remove_leftovers(Path(path).parent)
        with atomic_writer(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU; see `read_checkpoint`. ``weights_only=False`` is not obeyed."""
        return read_checkpoint(path, map_location or "cpu", self.mapped)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes the file, if it is there."""
        Path(path).unlink(missing_ok=True)


class RunCheckpoint(Checkpoint):
    """Keeps ``RUN/checkpoints``: ``last.ckpt``, the newest steps as ``step_00001000.ckpt``, and ``best.ckpt``.

    ``last.ckpt`` is written first and the others are hard links to the same bytes, so that a step costs one write and
    ``last.ckpt`` is the newest state at every moment. The last step of a run is always saved.

    Lightning's ModelCheckpoint is not used: under manual optimisation it warns at each save, it forgets the last steps when
    ``max_steps`` is no multiple of its interval, it puts off ``last`` to the next validation when it has a monitor, and it
    numbers names (``last-v1``) according to how often a run was started.

    Args:
        every_n_steps: optimiser steps between two saves.
        keep: how many ``step_*.ckpt`` stay, the newest; 0 for none, -1 for all.
        monitor: logged validation figure that ``best.ckpt`` follows, e.g. ``val/frechet_pixels/1``; None for no ``best.ckpt``.
        mode: ``min`` if smaller is better, ``max`` if larger.

    Raises:
        ValueError: a count out of range, or another mode.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 1, monitor: str | None = None, mode: str = "min"):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give a positive number of steps, e.g. 1000.")
        if keep < -1:
            raise ValueError(f"keep={keep}: give a number of checkpoints, 0 for none or -1 for all.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: give 'min' (smaller is better) or 'max'.")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self.saved_step = -1
        self.validated_step = -1

    def state_dict(self) -> dict[str, Any]:
        """The best figure so far, so that a resumed run replaces ``best.ckpt`` only by a better one, and the step of the last
        validation that has ended: not yet that of the step saved, which is saved before it is validated.
        """
        return {"best": self.best, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.best, self.validated_step = state_dict["best"], state_dict.get("validated_step", -1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what a killed process left unfinished."""
        if stage == "fit" and trainer.is_global_zero:
            remove_leftovers(checkpoint_folder(trainer.default_root_dir))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at each interval and at the last step."""
        step = trainer.global_step
        if step > 0 and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step of a run that ended by time or by epochs."""
        if trainer.global_step > 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets ``best.ckpt`` follow the monitored figure."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        if self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"checkpoint.monitor={self.monitor}: not among the logged figures ({known}); use one, or null")
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            return  # a figure of samples that are not finite; compared with, it would never be beaten
        sign = 1 if self.mode == "min" else -1
        if self.best is None or sign * value < sign * self.best:
            self.best = value
            if self.save(trainer, again=True) and trainer.is_global_zero:
                folder = checkpoint_folder(trainer.default_root_dir)
                link_or_copy(folder / "last.ckpt", folder / "best.ckpt")

    def save(self, trainer: Trainer, again: bool = False) -> bool:
        """Saves the present step, once unless ``again``, and says whether it did. Every rank must call it.

        Nothing is saved under fast_dev_run, nor within an accumulated step: the next interval saves.
        """
        step = trainer.global_step
        within = getattr(trainer.lightning_module, "within_step", False)
        if trainer.fast_dev_run or within or (step == self.saved_step and not again):  # type: ignore[attr-defined]
            return False
        folder = checkpoint_folder(trainer.default_root_dir)
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        self.saved_step = step
        if trainer.is_global_zero and self.keep != 0:
            link_or_copy(folder / "last.ckpt", folder / f"step_{step:08d}.ckpt")
            steps = sorted(folder.glob("step_*.ckpt"))
            for old in steps[: -self.keep] if self.keep > 0 else []:
                old.unlink()
        return True


def link_or_copy(source: Path, target: Path) -> None:
    """Gives ``target`` the bytes of ``source`` in one indivisible move: by a hard link, or by a copy where there are none."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        linked = False
    else:
        linked = True
    if linked:
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # rename(2) does nothing when both names are already the same file
        _sync_folder(target.parent)
        return
    with open(source, "rb") as old, atomic_writer(target) as new:
        shutil.copyfileobj(old, new)


def checkpoint_folder(run: str | Path) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(run) / "checkpoints"


def find_checkpoint(run: str | Path, which: str = "last") -> Path | None:
    """``last.ckpt`` or ``best.ckpt`` of a run, or None when there is none yet; any other ``which`` is a path itself."""
    if which not in ("last", "best"):
        return Path(which)
    path = checkpoint_folder(run) / f"{which}.ckpt"
    return path if path.is_file() else None
