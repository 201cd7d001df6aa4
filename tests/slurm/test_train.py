"""slurm/train.sbatch on two nodes: to the end, and to the same end however often and however it is cut.

``SLURM_CUTS=10 pytest -n 0 -s tests/slurm/test_train.py`` cuts ten times by each kind, not twice, and prints the count.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from resuming import same

from distill.checkpoints import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("USR1", "TERM", "requeue")
CUTS = int(os.environ.get("SLURM_CUTS", "2"))
STEPS = 60 * (len(KINDS) * CUTS + 1)
EVERY = 10
WORDS = [
    f"--trainer.max_steps={STEPS}",
    f"--trainer.val_check_interval={STEPS}",
    f"--checkpoint.every_n_steps={EVERY}",
    "--trainer.limit_val_batches=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.init_args.batch_size=16",
    "--model.init_args.student.init_args.network.init_args.channels=[32,32]",
]


def submit(cluster: Cluster, folder: Path, shards: Path, **environment: str) -> str:
    """A two-node job that trains a network on digits in ``folder/run``; its output is ``folder/out``."""
    environment = {"CONFIG": "configs/digits/teacher_shards.yaml", "RUN": str(folder / "run")} | environment
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={folder}/out"]
    words = (*WORDS, f"--data.init_args.shards={shards}/*.tar")
    return cluster.submit(*options, "slurm/train.sbatch", *words, cwd=ROOT, **environment)


def output(folder: Path) -> str:
    return (folder / "out").read_text()


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none; it must load."""
    file = folder / "run/checkpoints/last.ckpt"
    return read_checkpoint(file)["global_step"] if file.is_file() else 0


@pytest.fixture(scope="module")
def shards(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in two shards, each made by a task of an array."""
    folder = tmp_path_factory.mktemp("shards")
    options = ["--array=0-1", f"--output={folder}/make_%a.out", "slurm/make_shards.sbatch", "--digits"]
    cluster.submit(*options, cwd=ROOT, OUT=str(folder / "digits"), OF="2")
    wait_until(lambda: not cluster.call("squeue", "-h").stdout.strip(), 200, "the array has ended")
    made = sorted(path.name for path in (folder / "digits").glob("*.tar"))
    said = [(folder / f"make_{number}.out").read_text() for number in range(2)]
    assert made == ["00000-of-00002.tar", "00001-of-00002.tar"], said
    return folder / "digits"


@pytest.fixture(scope="module")
def whole(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(cluster, folder, shards, PREFLIGHT="1")
    state = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=600)
    assert state == "COMPLETED", output(folder)[-4000:]
    assert cluster.field(job, "Restarts") == "0"
    return folder


def test_a_job_on_two_nodes_trains_to_the_end(whole: Path) -> None:
    assert saved_step(whole) == STEPS
    assert (whole / "run/DONE").is_file() and not (whole / "run/REQUEUE").exists()
    said = output(whole)
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in said and said.rstrip().endswith(f"complete: {whole}/run")


def cut(cluster: Cluster, job: str, kind: str) -> None:
    """Signals every step of a job, not its script; or has the scheduler take it away."""
    words = ["scontrol", "requeue", job] if kind == "requeue" else ["scancel", f"--signal={kind}", job]
    cluster.call(*words)


def step_there(folder: Path) -> int:
    """The step of the newest checkpoint by its name alone, 0 if there is none."""
    return max((int(path.stem.partition("_")[2]) for path in (folder / "run/checkpoints").glob("step_*.ckpt")), default=0)


def test_preempted_at_random_times_by_every_kind_of_signal_the_weights_are_those_of_the_whole_run(
    cluster: Cluster, shards: Path, whole: Path, tmp_path: Path
) -> None:
    """One run, cut by each kind in turn at random: once in three while the job starts, else within some step.

    After each cut there is a checkpoint that loads, of the very step at which training was left, and one requeue more.
    """
    seed = random.SystemRandom().randrange(2**32)
    drawn = random.Random(seed)
    cuts = [*KINDS * CUTS]
    drawn.shuffle(cuts)
    job, reached = submit(cluster, tmp_path, shards, PREFLIGHT="0"), 0
    for number, kind in enumerate(cuts):
        starting = number % 3 == 1
        if starting:
            wait_until(lambda: cluster.steps(job), 90, f"start {number} of job {job} has a step")
            time.sleep(drawn.uniform(0, 12))
        else:
            least = reached + EVERY
            wait_until(lambda: step_there(tmp_path) >= least, 600, lambda: f"step {least}: {output(tmp_path)[-4000:]}", 0.05)
            time.sleep(drawn.uniform(0, 0.15))
        seen = saved_step(tmp_path)
        cut(cluster, job, kind)
        context = f"cut {number} ({kind}), seed {seed}:\n{output(tmp_path)[-4000:]}"
        wait_until(lambda: cluster.field(job, "Restarts") == str(number + 1), 60, lambda: f"a restart; {context}")
        cluster.wait(job, "PENDING", "RUNNING", seconds=60)
        reached = saved_step(tmp_path)
        assert seen <= reached < STEPS, context
        left = re.findall(r"leaving at step (\d+)", output(tmp_path))
        assert starting or int(left[-1]) == reached, context  # a signal may come before Python can say anything
    state = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=600)
    assert state == "COMPLETED", output(tmp_path)[-4000:]
    assert cluster.field(job, "Restarts") == str(len(cuts))
    assert (tmp_path / "run/DONE").is_file() and not (tmp_path / "run/REQUEUE").exists()
    found, expected = (read_checkpoint(folder / "run/checkpoints/last.ckpt") for folder in (tmp_path, whole))
    assert found.keys() == expected.keys()
    for content in (found, expected):  # how long the training took is all that may differ
        del content["training_cost"]["seconds"], content["training_cost"]["device_seconds"]
    for key in expected:
        assert same(found[key], expected[key]), f"{key} differs, seed {seed}"
    print(f"\n{CUTS} cuts by each of {', '.join(KINDS)}: {len(cuts)} requeues, a checkpoint after each, the same bits at last")
