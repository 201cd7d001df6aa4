"""Checkpoints: whole or not at all under kills and full disks; read as data; last, step and best files of a run."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import random
import resource
import signal
import stat
import time
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

from distill import checkpoints
from distill.checkpoints import AtomicCheckpointIO, RunCheckpoint, atomic_writer, find_checkpoint, read_checkpoint


def content(value: float = 1.0) -> dict:
    return {"state_dict": {"weight": torch.full((1000,), value)}}


def leftovers(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(checkpoints.TEMPORARY)]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1.0), path)
    return path


def assert_intact(path) -> None:
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.full((1000,), 1.0))
    assert not leftovers(path.parent)


def test_a_kill_at_a_random_point_of_a_save_leaves_the_newest_whole_file(tmp_path, monkeypatch):
    """TMPDIR is on another file system where there is one. A step that was announced as saved is never lost."""
    monkeypatch.setenv("TMPDIR", "/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path))
    path, draw, interrupted = tmp_path / "last.ckpt", random.Random(0), 0
    for _ in range(12):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            for step in itertools.count(1):
                state = {"weight": torch.full((1_000_000,), float(step))}
                AtomicCheckpointIO().save_checkpoint({"state_dict": state, "step": step}, path)
                os.write(writing, b"%d\n" % step)
        os.close(writing)
        with os.fdopen(reading) as announcements:
            first = announcements.readline()
            time.sleep(draw.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            announced = int((announcements.read().split() or [first])[-1])
        loaded = read_checkpoint(path)
        assert loaded["step"] in (announced, announced + 1)
        assert loaded["state_dict"]["weight"].eq(loaded["step"]).all()
        interrupted += bool(leftovers(tmp_path))
    assert interrupted, "no kill fell into a save: the test shows nothing"


def test_every_point_of_a_save_may_be_the_last(saved, monkeypatch):
    """A kill is simulated before each call to the system that a save makes, without any clean-up running."""
    calls: list[str] = []

    def recorded(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    AtomicCheckpointIO().save_checkpoint(content(2.0), saved)
    assert calls == ["fsync", "replace", "fsync"]  # the bytes, the name, the folder
    monkeypatch.undo()
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        AtomicCheckpointIO().save_checkpoint(content(3.0), saved)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert read_checkpoint(saved)["state_dict"]["weight"][0] == 2.0
    assert leftovers(saved.parent)
    AtomicCheckpointIO().save_checkpoint(content(4.0), saved)
    assert not leftovers(saved.parent) and read_checkpoint(saved)["state_dict"]["weight"][0] == 4.0


def test_full_disk_is_loud_and_harmless(saved):
    """A limit on file sizes, which the system enforces in the middle of the write."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        with pytest.raises(OSError, match="last.ckpt.*intact") as caught:
            AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(100_000)}}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert_intact(saved)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_the_system_is_loud_and_harmless(saved, monkeypatch, call):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space left on device; could not write .*last.ckpt.*intact") as caught:
        AtomicCheckpointIO().save_checkpoint(content(2.0), saved)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert_intact(saved)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_read_only_folder_is_loud_and_harmless(saved):
    saved.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(PermissionError, match="last.ckpt.*intact"):
            AtomicCheckpointIO().save_checkpoint(content(2.0), saved)
    finally:
        saved.parent.chmod(stat.S_IRWXU)
    assert_intact(saved)


def test_permission_denied_is_loud_and_harmless(saved, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(PermissionError, match="Permission denied; could not write .*last.ckpt.*intact"):
        AtomicCheckpointIO().save_checkpoint(content(2.0), saved)
    monkeypatch.undo()
    assert_intact(saved)


def test_a_missing_folder_is_made_and_one_that_cannot_be_is_named(tmp_path):
    AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "a" / "b" / "last.ckpt")
    assert read_checkpoint(tmp_path / "a" / "b" / "last.ckpt")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file/last.ckpt.*nothing was left"):
        AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "file" / "last.ckpt")


def test_an_interrupted_block_keeps_the_old_file(saved):
    with pytest.raises(KeyboardInterrupt), atomic_writer(saved) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert_intact(saved)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["torch", "torch_state", "pickle"])
def test_a_malicious_pickle_runs_nothing(tmp_path, how):
    path, mark = tmp_path / "last.ckpt", tmp_path / "executed"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Evil(mark)))
    else:
        torch.save(Evil(mark) if how == "torch" else content() | {"extra": Evil(mark)}, path)
    for load in (read_checkpoint, lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False)):
        with pytest.raises(ValueError, match="last.ckpt"):
            load(path)
    assert not mark.exists()
    if how == "torch_state":
        torch.load(path, weights_only=False)  # the trap works where it is let
        assert mark.exists()


@pytest.mark.parametrize("broken", [b"", b"hello", b"PK\x03\x04 but no archive", "half", "list"])
def test_a_broken_file_is_named(saved, broken):
    if broken == "half":
        broken = saved.read_bytes()[: saved.stat().st_size // 2]
    if broken == "list":
        torch.save([1, 2], saved)
    else:
        saved.write_bytes(broken)
    with pytest.raises(ValueError, match="last.ckpt"):
        read_checkpoint(saved)
    with pytest.raises(FileNotFoundError, match="other.ckpt"):
        read_checkpoint(saved.with_name("other.ckpt"))


# ------------------------------------------------------------------------------------------------------ RunCheckpoint


MODULE = LightningModule()


class FakeTrainer(SimpleNamespace):
    """As much of a Trainer as `RunCheckpoint` looks at, and a Trainer to whoever asks."""

    __class__ = Trainer  # type: ignore[assignment]

    def save_checkpoint(self, path, weights_only=None):
        self.saves += 1
        AtomicCheckpointIO().save_checkpoint(content(self.global_step), path)


@pytest.fixture
def trainer(tmp_path):
    return FakeTrainer(
        default_root_dir=str(tmp_path),
        lightning_module=SimpleNamespace(within_step=False),
        global_step=0,
        max_steps=10,
        saves=0,
        is_global_zero=True,
        fast_dev_run=False,
        sanity_checking=False,
        callback_metrics={},
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )


def train(callback, trainer, steps, losses=()) -> None:
    for step in range(trainer.global_step + 1, steps + 1):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, MODULE, None, None, 0)
        if losses:
            trainer.callback_metrics["loss"] = torch.tensor(losses[step - 1])
            callback.on_validation_end(trainer, MODULE)


def files(trainer) -> dict[str, int]:
    folder = checkpoints.checkpoint_folder(trainer.default_root_dir)
    return {p.name: int(read_checkpoint(p)["state_dict"]["weight"][0]) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "keep, expected",
    [
        (0, {"last.ckpt": 10}),
        (1, {"last.ckpt": 10, "step_00000010.ckpt": 10}),
        (2, {"last.ckpt": 10, "step_00000008.ckpt": 8, "step_00000010.ckpt": 10}),
        (-1, {"last.ckpt": 10, "step_00000004.ckpt": 4, "step_00000008.ckpt": 8, "step_00000010.ckpt": 10}),
    ],
)
def test_saves_at_the_interval_and_at_the_last_step_once(trainer, keep, expected):
    callback = RunCheckpoint(4, keep)
    train(callback, trainer, 10)
    assert trainer.saves == 3
    callback.on_train_end(trainer, MODULE)
    assert files(trainer) == expected
    assert trainer.saves == 3


def test_nothing_is_saved_within_an_accumulated_step(trainer):
    callback = RunCheckpoint(4)
    trainer.global_step, trainer.lightning_module.within_step = 4, True
    assert not callback.save(trainer) and trainer.saves == 0
    trainer.lightning_module.within_step = False
    assert callback.save(trainer) and files(trainer)["last.ckpt"] == 4


def test_a_figure_that_is_not_a_number_is_never_the_best(trainer):
    callback = RunCheckpoint(100, 0, "loss")
    train(callback, trainer, 3, [float("nan"), 5.0, 6.0])
    assert files(trainer)["best.ckpt"] == 2


def test_a_run_that_ends_early_saves_where_it_ended(trainer):
    callback = RunCheckpoint(4)
    train(callback, trainer, 6)
    callback.on_train_end(trainer, MODULE)
    assert files(trainer)["last.ckpt"] == 6


@pytest.mark.parametrize("mode, best", [("min", 3), ("max", 4)])
def test_best_follows_the_figure_and_survives_resume(trainer, mode, best):
    losses = [3.0, 2.0, 1.0, 5.0, float("nan"), 4.0]
    callback = RunCheckpoint(100, 0, "loss", mode)
    train(callback, trainer, 6, losses)
    assert files(trainer)["best.ckpt"] == best
    resumed = RunCheckpoint(100, 0, "loss", mode)
    resumed.load_state_dict(callback.state_dict())
    train(resumed, trainer, 7, [*losses, 2.5])
    assert files(trainer)["best.ckpt"] == best
    assert find_checkpoint(trainer.default_root_dir, "best").name == "best.ckpt"


def test_an_unknown_monitor_is_named(trainer):
    with pytest.raises(ValueError, match="checkpoint.monitor=los.*loss"):
        train(RunCheckpoint(100, 0, "los"), trainer, 1, [1.0])


def test_copies_where_there_are_no_hard_links(trainer, monkeypatch):
    def refuses(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuses)
    train(RunCheckpoint(4), trainer, 4)
    assert files(trainer) == {"last.ckpt": 4, "step_00000004.ckpt": 4}


def test_nothing_is_saved_in_a_trial_run(trainer):
    trainer.fast_dev_run = True
    callback = RunCheckpoint(1, 1, "loss")
    train(callback, trainer, 3, [3.0, 2.0, 1.0])
    assert trainer.saves == 0


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"keep": -2}, {"mode": "least"}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        RunCheckpoint(**settings)
