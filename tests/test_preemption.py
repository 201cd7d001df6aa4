"""Runs that are told to leave, or killed, through the real command line: what they leave behind, and how they go on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_ranks import Ranks
from interruptions import finish_and_compare, kill_often
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning_fabric.utilities.distributed import _destroy_dist_connection
from pytorch_lightning import Trainer
from resuming import same
from tiny_run import process, write_recipe
from torch.utils.data import DataLoader, Dataset

from datamodules.workers import iterate, outlive_signals
from distill import checkpoints, cli
from distill.callbacks import preemption
from distill.callbacks.preemption import EXIT_PREEMPTED, Preempted, end_within, leave_children_alone
from distill.callbacks.signals import LISTENER, SIGNALS
from distill.checkpoints import read_checkpoint

AT = "--trainer.callbacks=forked_ranks.SignalAt"


def command(folder) -> list[str]:
    """The command line that trains twelve steps, with a validation after the fifth and tenth."""
    words = ["--ckpt_path=last", "--trainer.logger=false", "--trainer.default_root_dir=run", "--sample_grid.lines=1"]
    return ["fit", "--config", str(write_recipe(folder)), *words]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fit(tmp_path):
    return command(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder of an uninterrupted run, in this process: what it imports, forked ones need not."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill"])
        patch.chdir(folder)
        cli.main(command(folder))
    return folder / "run"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def at(hook: str, step: int, **others: object) -> list[str]:
    """The words that have the run send itself a signal."""
    given = {"hook": hook, "step": step, **others}
    return [AT, *(f"--trainer.callbacks.init_args.{key}={value}" for key, value in given.items())]


def left_behind(run) -> tuple[dict | None, dict | None, int | None]:
    """REQUEUE, DONE and the step of last.ckpt."""
    files = [json.loads((run / name).read_text()) if (run / name).is_file() else None for name in ("REQUEUE", "DONE")]
    last = run / "checkpoints" / "last.ckpt"
    return files[0], files[1], read_checkpoint(last)["global_step"] if last.is_file() else None


def told_to_leave(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == EXIT_PREEMPTED == 75


def same_training(first, second) -> bool:
    first, second = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (first, second))
    return all(same(first[key], second[key]) for key in ("state_dict", "optimizer_states", "random_states", "global_step"))


# ------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    "name, times, hook, step, left_at",
    [
        ("SIGUSR1", 1, "on_train_batch_start", 2, 3),  # in the middle of a step
        ("SIGTERM", 1, "on_train_batch_end", 7, 7),
        ("SIGTERM", 3, "on_save_checkpoint", 4, 4),
        ("SIGUSR1", 2, "on_validation_batch_start", 5, 6),
    ],
)
def test_a_run_that_is_told_to_leave_has_saved_the_step_and_goes_on_as_if_it_never_left(
    fit, run, whole, name, times, hook, step, left_at
):
    before = [signal.getsignal(number) for number in SIGNALS]
    told_to_leave([*fit, *at(hook, step, signal_name=name, times=times)])
    requeue, done, saved = left_behind(run)
    assert requeue.pop("time") and requeue == {"step": left_at, "signal": name}
    assert done is None and saved == left_at
    assert [signal.getsignal(number) for number in SIGNALS] == before
    cli.main(fit)
    requeue, done, saved = left_behind(run)
    assert requeue is None and done.pop("finished") and done == {"step": 12} and saved == 12
    assert same_training(run, whole)


def test_a_signal_before_training_leaves_what_there_was(fit, run):
    told_to_leave([*fit, *at("on_fit_start", 0)])
    requeue, done, saved = left_behind(run)
    assert requeue["step"] == 0 and done is saved is None
    cli.main([*fit, "--trainer.max_steps=3"])
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    told_to_leave([*fit, *at("on_fit_start", 0)])
    assert left_behind(run)[0]["step"] == 3
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("hook, step", [("on_train_batch_end", 12), ("on_validation_start", 12), ("on_train_end", 12)])
def test_a_signal_after_the_last_step_changes_nothing(fit, run, hook, step):
    cli.main([*fit, "--trainer.val_check_interval=4", *at(hook, step, signal_name="SIGTERM")])
    requeue, done, saved = left_behind(run)
    assert requeue is None and done["step"] == saved == 12


def test_a_step_of_several_batches_is_ended_first(fit, run):
    told_to_leave([*fit, "--model.init_args.optimization.accumulate_batches=3", *at("on_train_batch_start", 2)])
    requeue, _, saved = left_behind(run)
    assert requeue["step"] == saved == 3
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["distill"]["batches_seen"] == 9


def grids(run) -> set[int]:
    """Steps whose validation has ended: each leaves a picture."""
    return {int(path.stem.removeprefix("step_")) for path in (run / "samples").glob("step_*.png")}


METRIC = "--model.init_args.evaluation.metrics=[FrechetDistance]"
MONITOR = (METRIC, "--checkpoint.monitor=val/frechet_pixels/1", "--checkpoint.mode=max")


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_validation_that_a_run_was_killed_within_is_made_when_it_starts_again(fit, run, step):
    words = [*fit, "--trainer.val_check_interval=4", *MONITOR]
    assert Ranks([*words, *at("on_validation_batch_start", step, signal_name="SIGKILL")], 1, run.parent).wait() == [-9]
    assert left_behind(run) == (None, None, step) and grids(run) == set(range(4, step, 4))
    told_to_leave([*words, *at("on_fit_start", 0)])  # before it, which may be long
    assert left_behind(run)[0]["step"] == step and step not in grids(run)
    cli.main(words)
    assert left_behind(run)[1]["step"] == 12 and grids(run) == {4, 8, 12}
    cli.main([*words, "--trainer.default_root_dir=uncut"])
    assert same_training(run, run.parent / "uncut")
    best = [read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] for folder in (run, run.parent / "uncut")]
    assert best[0] == best[1]


def test_a_validation_at_the_step_that_a_run_is_left_at_is_made_when_it_starts_again(fit, run, whole):
    told_to_leave([*fit, *at("on_train_batch_start", 4)])
    assert left_behind(run)[0]["step"] == 5 and not grids(run)
    cli.main([*fit, "--trainer.limit_val_batches=0", "--trainer.max_steps=6"])
    assert not grids(run), "none was due"
    shutil.rmtree(run)
    told_to_leave([*fit, *at("on_train_batch_start", 4)])
    cli.main(fit)
    assert grids(run) == {5, 10} == grids(whole) and same_training(run, whole)


def test_a_validation_that_the_checkpoint_knows_of_is_not_made_again(fit, run):
    words = [*fit, "--trainer.val_check_interval=6", *MONITOR]
    cli.main([*words, "--trainer.max_steps=6"])  # the first figure is the best, and saved
    shutil.rmtree(run / "samples")
    (run / "DONE").unlink()
    cli.main(words)
    assert grids(run) == {12}
    shutil.rmtree(run / "samples")
    cli.main(words)
    assert not grids(run), "DONE says that it was"


def test_all_ranks_make_the_validation_that_was_missed(fit, run):
    words = [*fit, "--trainer.val_check_interval=4"]
    together = Ranks([*words, "--trainer.max_steps=4"], 2, run.parent)
    assert together.wait() == [0, 0], together.output()
    shutil.rmtree(run / "samples")
    (run / "DONE").unlink()  # as if killed after the last save
    together = Ranks([*words, "--trainer.max_steps=4"], 2, run.parent)
    assert together.wait() == [0, 0], together.output()
    assert grids(run) == {4} and left_behind(run)[1]["step"] == 4


def test_done_stays_until_there_are_steps_to_do(fit, run, whole):
    shutil.copytree(whole, run)
    written = (run / "DONE").stat().st_mtime_ns
    (run / "REQUEUE").write_text("of a start before")
    cli.main(fit)
    assert (run / "DONE").stat().st_mtime_ns == written and not (run / "REQUEUE").exists()
    (run / "DONE").unlink()  # as if killed between the last save and its end
    cli.main(fit)
    assert left_behind(run)[1]["step"] == 12
    told_to_leave([*fit, "--trainer.max_steps=14", *at("on_train_batch_start", 12)])
    requeue, done, saved = left_behind(run)
    assert requeue["step"] == saved == 13 and done is None


def test_a_run_that_fails_is_not_done(fit, run, monkeypatch):
    monkeypatch.setattr(checkpoints.RunCheckpoint, "on_train_end", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(fit)
    assert left_behind(run)[:2] == (None, None)


def test_a_run_that_ends_by_time_is_done(fit, run):
    cli.main([*fit, "--trainer.max_steps=-1", "--trainer.max_time=00:00:00:01"])
    requeue, done, saved = left_behind(run)
    assert requeue is None and done["step"] == saved > 0


def test_a_trial_run_leaves_no_files(fit, run):
    cli.main([*fit, "--trainer.fast_dev_run=2"])
    assert left_behind(run) == (None, None, None)


def test_a_program_that_leaves_ignores_further_signals_and_is_sure_to_end(fit, monkeypatch):
    ends: list[tuple] = []
    monkeypatch.setattr(preemption, "end_within", lambda *given: ends.append(given))
    assert LISTENER.start()  # what `python -m distill` does
    try:
        told_to_leave([*fit, *at("on_fit_start", 0)])
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2
        assert [(seconds, type(exception)) for seconds, exception in ends] == [(preemption.TEARDOWN_SECONDS, Preempted)]
    finally:
        LISTENER.stop()


def test_a_signal_while_python_still_imports_is_not_lost(fit, run):
    program = process(*fit, folder=run.parent)
    while not caught(program.pid) & 1 << (signal.SIGUSR1 - 1):
        time.sleep(0.001)
    program.send_signal(signal.SIGUSR1)
    output = program.communicate(timeout=120)
    assert program.returncode == EXIT_PREEMPTED, output
    assert left_behind(run)[0]["step"] == 0


def caught(program: int) -> int:
    """The signals that a process has handlers for, as bits."""
    with open(f"/proc/{program}/status") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))


def test_workers_that_prepare_batches_outlive_signals():
    loader = DataLoader(range(40), num_workers=1, worker_init_fn=outlive_signals)  # type: ignore[arg-type]
    batches = iter(loader)
    first = int(next(batches))
    for number in SIGNALS:
        os.kill(batches._workers[0].pid, number)  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert [first, *map(int, batches)] == list(range(40))


class Stuck(Dataset):
    """Its second item takes for ever."""

    def __getitem__(self, item: int) -> int:
        if item:
            time.sleep(600)
        return item


def stuck_worker() -> tuple[Iterator[int], BaseProcess]:
    items = iterate(Stuck(), [0, 1, 1], 1)
    assert next(items) == 0
    (worker,) = multiprocessing.active_children()
    time.sleep(0.2)  # it has gone on to the second
    return items, worker


def test_a_worker_that_is_stuck_ends_with_what_it_works_for():
    items, worker = stuck_worker()
    del items  # torch waits a few seconds
    worker.join(10)
    try:
        assert worker.exitcode == -signal.SIGKILL
    finally:
        worker.kill()


def test_a_worker_that_is_stuck_does_not_hold_up_the_end_of_a_process():
    def ends():
        items, worker = stuck_worker()
        threading.Timer(20, lambda: os._exit(3)).start()
        multiprocessing.util._exit_function()  # what Python calls at its end; waits for all workers
        os._exit(0 if worker.exitcode == -signal.SIGKILL else 4)

    assert forked(ends) == 0


def forked(action) -> int:
    """The exit code of a process that does this."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        action()
    finally:
        os._exit(0)


@pytest.mark.parametrize("exception, code", [(ValueError("what was wrong"), 1), (Preempted(), EXIT_PREEMPTED)])
def test_a_process_that_does_not_end_is_ended_and_says_why(capfd, exception, code):
    def stuck():
        end_within(0.2, exception)
        time.sleep(20)

    assert forked(stuck) == code
    assert str(exception) in capfd.readouterr().err


class SimpleTrainer(SimpleNamespace):
    """A Trainer to whoever asks."""

    __class__ = Trainer  # type: ignore[assignment]


def test_lightning_does_not_kill_a_process_whose_children_were_told_to_leave():
    def parent(alone: bool):
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(0.2); raise SystemExit({EXIT_PREEMPTED})"])
        launcher = SimpleNamespace(procs=[child])
        _ChildProcessObserver(child_processes=launcher.procs, main_pid=os.getpid(), sleep_period=0.05).start()  # type: ignore
        if alone:
            leave_children_alone(SimpleTrainer(strategy=SimpleNamespace(launcher=launcher)))
        child.wait()
        time.sleep(0.5)

    assert forked(lambda: parent(False)) == -signal.SIGKILL
    assert forked(lambda: parent(True)) == 0


# ------------------------------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize(
    "name, hook, step, left_at", [("SIGUSR1", "on_fit_start", 0, 0), ("SIGTERM", "on_train_batch_start", 2, 3)]
)
def test_all_ranks_leave_when_one_is_told_to(fit, run, name, hook, step, left_at):
    together = Ranks([*fit, *at(hook, step, signal_name=name, rank=1)], 2, run.parent)
    assert together.wait() == [EXIT_PREEMPTED] * 2, together.output()
    requeue, done, saved = left_behind(run)
    assert (requeue["step"], requeue["signal"], done) == (left_at, name, None) and saved == (left_at or None)
    if left_at:
        finish_and_compare(fit, run, 2, 6)


def threads() -> list[str]:
    """Names of the threads of this process, those of C++ too."""
    return sorted(file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.parametrize("words, code", [([], 0), (at("on_train_batch_start", 2), EXIT_PREEMPTED)], ids=["whole", "told"])
def test_no_thread_of_a_run_is_left_when_python_ends(fit, run, words, code):
    """At exit Lightning destroys process groups, which ends those that nothing holds any more."""

    def program():
        sys.argv = [*sys.argv, *fit, "--trainer.devices=2", "--trainer.strategy=ddp", *words]
        try:
            cli.run()
        except SystemExit as left:
            during = threads()
            _destroy_dist_connection()
            Path(f"threads{os.environ['LOCAL_RANK']}").write_text(json.dumps([left.code, during, threads()]))
            os._exit(0)

    together = Ranks([], 2, run.parent, program)
    assert together.wait() == [0, 0], together.output()
    for rank in range(2):
        left, during, after = json.loads((run.parent / f"threads{rank}").read_text())
        assert left == code and "pt_gloo_runloop" in during and not [name for name in after if "gloo" in name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_a_rank_is_killed_or_stopped(fit, run, number, victim):
    together = Ranks(
        [*fit, "--process_group_timeout=4", *at("on_train_batch_start", 5, signal_name=number.name, rank=victim)], 2, run.parent
    )
    (code,) = together.wait([1 - victim], seconds=34 + 20)  # the timeout and 30 s, after a start
    together.kill()
    assert code not in (0, EXIT_PREEMPTED)
    assert left_behind(run) == (None, None, 4)


def test_kills_leave_a_checkpoint_that_loads(run, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert kill_often(run, kills=3)[0] == 3


# -------------------------------------------------------------------------------------------------------- failed saves


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The run folder of one that was left after four steps."""
    folder = tmp_path_factory.mktemp("four")
    assert Ranks([*command(folder), *at("on_train_batch_end", 4)], 1, folder).wait() == [EXIT_PREEMPTED]
    return folder / "run"


def full_disk() -> None:
    """A limit on file sizes, which the system enforces in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = os.stat("run/checkpoints/last.ckpt").st_size - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def refusal(number: int):
    """No new file may be opened for a checkpoint: nothing else keeps root from writing."""

    def refuse() -> None:
        def opened(path, mode="r", *others, **named):
            if "w" in mode and str(path).endswith(checkpoints.TEMPORARY) and ".ckpt" in str(path):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, mode, *others, **named)

        real, checkpoints.open = open, opened  # type: ignore[attr-defined]

    return refuse


@pytest.mark.parametrize(
    "prepare, words",
    [
        (full_disk, "File too large"),
        (refusal(errno.EACCES), "Permission denied"),
        (refusal(errno.EROFS), "Read-only file system"),
        (refusal(errno.ENOSPC), "No space left on device"),
    ],
)
def test_a_save_that_fails_ends_the_run_loudly_and_keeps_the_old_checkpoint(fit, run, four_steps, prepare, words):
    shutil.copytree(four_steps, run)
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    failed = Ranks(fit, 1, run.parent, prepare)
    assert failed.wait() == [1]
    assert words in failed.output() and "could not write" in failed.output() and "last.ckpt" in failed.output()
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert left_behind(run) == (None, None, 4)
