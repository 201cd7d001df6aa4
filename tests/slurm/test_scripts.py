"""What the job scripts decide, on the real SLURM, with a stand-in for Python that ends as it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED")
Start = Callable[..., str]


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Start:
    """Submits train.sbatch, whose ``python`` is a bash script, and gives the job; its output is ``tmp_path/out``."""

    def submit(body: str, *options: str, script: str = "train.sbatch", **environment: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "python"
        program.write_text(f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/words\n{body}\n')
        program.chmod(0o755)
        path = f"{folder}:{cluster.environment['PATH']}"
        settings = {"CONFIG": "configs/digits/teacher.yaml", "RUN": str(tmp_path / "run"), "PREFLIGHT": "0", "PATH": path}
        words = [f"--output={tmp_path}/out", *options, f"slurm/{script}"]
        return cluster.submit(*words, cwd=ROOT, **settings | environment)

    return submit


def ended(cluster: Cluster, job: str, tmp_path: Path) -> tuple[str, str, str]:
    """How a job ended, how often it was requeued, and what it said."""
    state = cluster.wait(job, *ENDED, seconds=90)
    return state, cluster.field(job, "Restarts"), (tmp_path / "out").read_text()


PREEMPTED = 'echo {} >"$RUN/REQUEUE"; exit 75'
SAVES = 'mkdir -p "$RUN/checkpoints"; date +%N >"$RUN/checkpoints/last.ckpt"'
SECOND_TIME = 'if [ -n "$SLURM_RESTART_COUNT" ]; then echo {} >"$RUN/DONE"; exit 0; fi'


def test_a_complete_run_ends_well(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    job = start('echo {} >"$RUN/DONE"', "--nodes=2")
    assert ended(cluster, job, tmp_path)[:2] == ("COMPLETED", "0")
    words = f"-m distill fit --config configs/digits/teacher.yaml --ckpt_path last --trainer.default_root_dir {tmp_path}/run"
    assert (tmp_path / "words").read_text().splitlines() == [f"{words} --trainer.num_nodes 2 --trainer.devices 1"] * 2


def test_an_end_without_done_is_a_failure(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    state, restarts, said = ended(cluster, start("exit 0"), tmp_path)
    assert (state, restarts) == ("FAILED", "0") and "without" in said and "DONE" in said


def test_a_failure_is_not_started_again_whatever_an_earlier_start_left(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/REQUEUE").write_text("{}")
    state, restarts, said = ended(cluster, start("exit 1"), tmp_path)
    assert (state, restarts) == ("FAILED", "0") and "training failed (exit code 1)" in said


def test_restarts_are_capped(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    state, restarts, said = ended(cluster, start(f"{SAVES}; {PREEMPTED}", MAX_RESTARTS="2"), tmp_path)
    assert (state, restarts) == ("FAILED", "2") and "MAX_RESTARTS=2" in said
    assert len((tmp_path / "words").read_text().splitlines()) == 3


@pytest.mark.parametrize("leaves", [PREEMPTED, "kill -USR1 $$"], ids=["before a step", "before Python listens"])
def test_three_starts_in_a_row_that_save_nothing_are_the_end(
    leaves: str, start: Start, cluster: Cluster, tmp_path: Path
) -> None:
    """A start that saves in between is progress: the third, fourth and fifth are those in a row."""
    body = f'[ "$SLURM_RESTART_COUNT" != 1 ] || {{ {SAVES}; }}; {leaves}'
    state, restarts, said = ended(cluster, start(body), tmp_path)
    assert (state, restarts) == ("FAILED", "4") and "preempted three times in a row before a step was saved" in said


@pytest.mark.parametrize(
    "body",
    [
        # The other rank would go on for ever.
        f'[ "$SLURM_PROCID" = 0 ] || exec sleep 300; {PREEMPTED}',
        f'[ "$SLURM_PROCID" = 1 ] || exec sleep 300; {PREEMPTED}',
        # Killed after all had saved: srun tells of the kill.
        'echo {} >"$RUN/REQUEUE"; kill -KILL $$',
        # Before Python listens: the signal itself is the end.
        '[ "$SLURM_PROCID" = 1 ] || exec sleep 300; kill -USR1 $$',
        '[ "$SLURM_PROCID" = 0 ] || exec sleep 300; kill -TERM $$',
        # Nor has training begun in the preflight.
        '[ "${1#slurm/}" = preflight.py ] || exit 1; kill -USR1 $$',
    ],
    ids=["first rank", "second rank", "killed", "USR1 at the start", "TERM at the start", "preflight"],
)
def test_one_rank_that_leaves_has_the_job_requeued_once(body: str, start: Start, cluster: Cluster, tmp_path: Path) -> None:
    preflight = str(int("preflight" in body))
    job = start(f"{SECOND_TIME}\n{body}", "--nodes=2", PREFLIGHT=preflight)
    assert ended(cluster, job, tmp_path)[:2] == ("COMPLETED", "1")


LISTENS = f'trap \'{PREEMPTED}\' TERM USR1\ntouch "$RUN/started"; while :; do sleep 0.2; done'


def test_the_time_limit_is_announced_to_the_ranks_and_not_the_end(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    """By the script's own --signal: 300 s before the end of three minutes is at once."""
    job = start(f"{SECOND_TIME}\n{LISTENS}", "--nodes=2", "--time=3")
    assert ended(cluster, job, tmp_path)[:2] == ("COMPLETED", "1")


def test_a_cancelled_job_stays_so_though_its_ranks_have_saved(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    job = start(LISTENS)
    wait_until((tmp_path / "run/started").exists, 30, "the step has started")
    cluster.call("scancel", job)
    assert ended(cluster, job, tmp_path)[:2] == ("CANCELLED", "0")
    wait_until((tmp_path / "run/REQUEUE").exists, 30, "the rank has saved")
    wait_until(lambda: "not requeued from here" in (tmp_path / "out").read_text(), 30, "the script has seen it")


def test_a_second_job_in_the_same_run_folder_is_refused(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    first = start('touch "$RUN/started"; exec sleep 300')
    wait_until((tmp_path / "run/started").exists, 30, "the step has started")
    second = start("exit 0", f"--output={tmp_path}/second")
    assert cluster.wait(second, *ENDED, seconds=60) == "FAILED"
    assert f"job {first} trains there" in (tmp_path / "out").read_text() + (tmp_path / "second").read_text()
    cluster.call("scancel", first)
    cluster.wait(first, *ENDED, seconds=60)


def fake_squeue(tmp_path: Path, body: str) -> None:
    """Has jobs of ``start`` find a stand-in for squeue."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/squeue"
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)


def test_a_run_folder_of_a_job_that_is_forgotten_is_taken_over_with_what_it_left(
    start: Start, cluster: Cluster, tmp_path: Path
) -> None:
    run = cluster.folder / "forgotten"  # short enough for a TMPDIR in it
    (run / "tmp/of a worker").mkdir(parents=True)
    (run / "JOB").write_text("999999\n")
    job = start('ls "$TMPDIR" >"$RUN/found"; echo {} >"$RUN/DONE"', RUN=str(run))
    assert ended(cluster, job, tmp_path)[0] == "COMPLETED"
    assert (run / "JOB").read_text() == f"{job}\n" and not (run / "found").read_text() and not list(run.glob("JOB.*"))


@pytest.mark.parametrize(
    ("squeue", "words"),
    [
        ("echo Unable to contact slurm controller >&2; exit 1", "does job 7 still train there? squeue says: Unable to contact"),
        ('echo 8 >"$RUN/JOB"', "job 7 trains there"),  # another job has taken it over meanwhile
    ],
)
def test_a_run_folder_that_may_be_another_jobs_is_left_to_it(
    squeue: str, words: str, start: Start, cluster: Cluster, tmp_path: Path
) -> None:
    fake_squeue(tmp_path, squeue)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/JOB").write_text("7\n")
    state, _, said = ended(cluster, start("exit 0"), tmp_path)
    assert state == "FAILED" and words in said and not (tmp_path / "words").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["JOB"]
    assert (tmp_path / "run/JOB").read_text() == ("8\n" if "JOB" in squeue else "7\n")


def test_srun_waits_for_the_rank_that_ends_last_whatever_the_site_says(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    body = '[ "$SLURM_PROCID" = 1 ] || { sleep 6; echo {} >"$RUN/DONE"; }'
    assert ended(cluster, start(body, "--nodes=2", SLURM_WAIT="2"), tmp_path)[:2] == ("COMPLETED", "0")


def test_what_a_rank_finds_in_its_environment(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.folder / "run"  # short enough for the sockets in its TMPDIR
    names = "$HF_HUB_OFFLINE $TMPDIR $MASTER_ADDR ${MASTER_PORT-none} $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS"
    body = f'echo "{names}"; echo {{}} >"$RUN/DONE"'
    given = {"MASTER_ADDR": "login", "MASTER_PORT": "1", "DISTILL_SITE": "example", "OMP_NUM_THREADS": "7"}
    state, _, said = ended(cluster, start(body, "--cpus-per-task=1", RUN=str(run), **given), tmp_path)
    assert state == "COMPLETED" and f"1 {run}/tmp 127.0.0.1 none 1 1\n" in said


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        ("train.sbatch", {"DISTILL_SITE": "nowhere"}, "DISTILL_SITE=nowhere: there is no slurm/env.d/nowhere.sh"),
        ("train.sbatch", {"CONFIG": "configs/none.yaml"}, "CONFIG=configs/none.yaml: no such file"),
        ("sample.sbatch", {}, "there is no DONE"),
        ("fid.sbatch", {"REFERENCE": "digits"}, "there is no DONE"),
        ("make_pairs.sbatch", {"OF": "2", "OUT": "out"}, "not an array"),
    ],
)
def test_what_cannot_be_run_is_refused_before_python(
    script: str, environment: dict[str, str], words: str, start: Start, cluster: Cluster, tmp_path: Path
) -> None:
    state, _, said = ended(cluster, start("exit 0", script=script, **environment), tmp_path)
    assert state == "FAILED" and words in said and not (tmp_path / "words").exists()


def test_an_array_needs_the_number_of_shards_and_a_task_for_one_of_them(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    for options, environment, words in (("0", {"OUT": "out"}, "OF=:"), ("2", {"OUT": "out", "OF": "2"}, "task 2 of OF=2")):
        job = start("exit 0", f"--array={options}", script="encode.sbatch", **environment)
        assert ended(cluster, job, tmp_path)[0] == "FAILED" and words in (tmp_path / "out").read_text()
    assert not (tmp_path / "words").exists()
