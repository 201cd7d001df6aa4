"""slurm/chain.sh: an array makes pairs of a teacher, a student is trained on them, its samples are measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from cluster import Cluster, wait_until

from distill.denoiser import NetworkDenoiser
from distill.networks.unet2d import UNet2D
from distill.pretrained import save_denoiser
from distill.schedules import RectifiedFlow

ROOT = Path(__file__).resolve().parents[2]
MAKE = "--teacher.init_args.path={teacher} --steps=2 --count=24 --batch-size=12 --device=cpu"
TRAIN = """--model.init_args.teacher.init_args.path={teacher} --data.init_args.folder={out} --data.init_args.batch_size=8
    --trainer.max_steps=3 --trainer.limit_val_batches=0 --trainer.callbacks=[] --trainer.accelerator=cpu
    --trainer.enable_progress_bar=false --trainer.enable_model_summary=false"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that was never trained."""
    root = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    network = UNet2D(num_classes=10, channels=(32, 32), layers_per_block=1)
    save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), str(root / "teacher"))
    return root


def words(text: str, folder: Path) -> str:
    return " ".join(text.format(teacher=folder / "teacher", out=folder / "pairs").split())


def said(folder: Path) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in sorted(folder.glob("*.out")))


def finished(cluster: Cluster) -> bool:
    return not cluster.call("squeue", "-h").stdout.strip()


@pytest.fixture(scope="module")
def chained(cluster: Cluster, folder: Path) -> Path:
    """The folder after the chain."""
    environment = {
        "MAKE": "make_pairs", "MAKE_CONFIG": "configs/digits/pairs.yaml", "OUT": str(folder / "pairs"), "OF": "2",
        "MAKE_WORDS": words(MAKE, folder), "MAKE_SBATCH": f"--output={folder}/make_%a.out",
        "CONFIG": "configs/digits/reflow.yaml", "RUN": str(folder / "run"), "TRAIN_WORDS": words(TRAIN, folder),
        "TRAIN_SBATCH": f"--output={folder}/train.out", "EVALUATE_SBATCH": f"--output={folder}/evaluate.out --open-mode=append",
        "SAMPLE_WORDS": "--steps 1 --num 40 --device cpu", "REFERENCE": "digits",
    }  # fmt: skip
    done = cluster.call("env", f"--chdir={ROOT}", "slurm/chain.sh", **environment)
    assert f"the result will be {folder}/run/samples/fid.json" in done.stdout
    wait_until(lambda: finished(cluster), 600, lambda: f"the chain has ended:\n{said(folder)}", every=1)
    return folder


def test_an_array_makes_all_shards_and_a_second_one_none(cluster: Cluster, chained: Path) -> None:
    shards = sorted((chained / "pairs").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"0000{number}-of-00002.tar" for number in range(2)]
    for number in range(2):
        assert "12 pairs made; 1 shards made, 0 were there" in (chained / f"make_{number}.out").read_text()
    before = [(hashlib.sha256(shard.read_bytes()).digest(), shard.stat().st_mtime_ns) for shard in shards]
    options = ["--array=0-1", f"--output={chained}/again_%a.out", "slurm/make_pairs.sbatch", *words(MAKE, chained).split()]
    settings = {"CONFIG": "configs/digits/pairs.yaml", "OUT": str(chained / "pairs"), "OF": "2"}
    cluster.submit(*options, cwd=ROOT, **settings)
    wait_until(lambda: finished(cluster), 300, lambda: said(chained), every=1)
    for number in range(2):
        assert " 0 pairs made; 0 shards made, 1 were there" in (chained / f"again_{number}.out").read_text()
    assert before == [(hashlib.sha256(shard.read_bytes()).digest(), shard.stat().st_mtime_ns) for shard in shards]


def test_the_chain_ends_with_the_figures_of_the_trained_student(chained: Path) -> None:
    assert (chained / "run/DONE").is_file(), said(chained)
    result = json.loads((chained / "run/samples/fid.json").read_text())
    assert 0 < result["distance"] < float("inf") and result["samples"]["count"] == 40
    assert result["samples"]["settings"]["run"] == str(chained / "run")
    assert result["samples"]["settings"]["batches_trained"] == 3 and result["reference"]["path"] == "digits"


def test_what_follows_a_job_that_fails_is_dropped(cluster: Cluster, tmp_path: Path) -> None:
    """The recipe cannot be found: nothing is sampled, nothing measured."""
    environment = {
        "CONFIG": "configs/none.yaml", "RUN": str(tmp_path / "run"), "REFERENCE": "digits",
        "TRAIN_SBATCH": f"--output={tmp_path}/train.out", "EVALUATE_SBATCH": f"--output={tmp_path}/evaluate.out",
    }  # fmt: skip
    cluster.call("env", f"--chdir={ROOT}", "slurm/chain.sh", **environment)
    wait_until(lambda: finished(cluster), 60, "the chain has been dropped")
    assert "CONFIG=configs/none.yaml: no such file" in (tmp_path / "train.out").read_text()
    assert not (tmp_path / "evaluate.out").exists()
