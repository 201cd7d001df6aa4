"""tools/fetch.py: which parts of a config it finds, what it fetches and lists, and how it ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from families import FAMILIES
from hub_cache import COMMIT, Repository, put, use_cache
from huggingface_hub import constants
from jsonargparse import Namespace
from script import load_script

from distill.pretrained import PretrainedDenoiser

ROOT = Path(__file__).resolve().parent.parent
fetch = load_script("fetch")

CONFIG = """
model:
  class_path: Consistency
  init_args:
    teacher: teacher.yaml
    solver: Heun
    pairs: {class_path: GridPairs, init_args: {grid: UniformGrid, points: {class_path: ConstantPoints, init_args: {count: 8}}}}
    distance: PseudoHuber
    optimization: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3}}}
    space:
      class_path: ModelSpace
      init_args: {codec: {class_path: AutoencoderKLCodec, init_args: {path: owner/name}}}
data: DigitsDataModule
trainer: {max_steps: 1}
"""
TEACHER = "class_path: PretrainedDenoiser\ninit_args: {path: owner/name}\n"
OPTION = "--model.init_args.teacher.init_args"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository ``owner/name``: a DiT and an autoencoder, with weights that nobody needs."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("source")
    FAMILIES["dit"].save(folder)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(folder / "vae")
    for unused in ("transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors"):
        (folder / unused).write_text("unused")
    return folder


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, whose teacher is in a file beside it, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    (tmp_path / "teacher.yaml").write_text(TEACHER)
    (tmp_path / "recipe.yaml").write_text(CONFIG)
    return tmp_path / "recipe.yaml"


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as exit_info:
        fetch.main([str(argument) for argument in arguments])
    return exit_info.value.code, capsys.readouterr().out.splitlines()


def test_a_config_is_fetched_and_then_found(config, source, tmp_path, monkeypatch, capsys):
    repository = Repository(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.download)
    code, lines = run(capsys, "--config", config, "--list")
    assert code == 1 and len(lines) == 2 and not repository.snapshot.exists()
    assert all(line.startswith("missing  model.") and "owner/name" in line for line in lines)
    code, lines = run(capsys, "--config", config)
    assert (code, lines) == (0, ["fetched  model.teacher  owner/name", "fetched  model.space.codec  owner/name"])
    assert repository.fetched() == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    for option in ((), ("--list",)):
        code, lines = run(capsys, "--config", config, *option)
        assert (code, lines) == (0, ["present  model.teacher  owner/name", "present  model.space.codec  owner/name"])
    monkeypatch.undo()
    use_cache(monkeypatch, tmp_path / "cache")
    (tmp_path / "cache/models--owner--name/refs").mkdir()
    (tmp_path / "cache/models--owner--name/refs/main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert PretrainedDenoiser("owner/name").network.model_class == "DiTTransformer2DModel"


def test_one_part_that_is_missing_is_enough(config, source, tmp_path, capsys):
    snapshot = put(tmp_path / "cache", "owner/name", source)
    shutil.rmtree(snapshot / "vae")
    code, lines = run(capsys, "--config", config, "--list")
    assert code == 1 and lines[0] == "present  model.teacher  owner/name"
    assert lines[1].startswith("missing  model.space.codec  path='owner/name': vae/ is missing there")
    (snapshot / "scheduler/scheduler_config.json").unlink()
    code, lines = run(capsys, "--config", config, "--list")
    assert code == 1 and "scheduler_config.json is missing" in lines[0]
    options = (f"{OPTION}.schedule=VariancePreserving", f"{OPTION}.prediction=eps")
    assert run(capsys, "--config", config, "--list", *options)[1][0] == "present  model.teacher  owner/name"


def test_arguments_are_those_of_the_config_and_the_command_line(config, source, tmp_path, capsys):
    put(tmp_path / "cache", "owner/name", source, refs=("main", "v2"))
    for option, line in (
        ("revision=v2", "present  model.teacher  owner/name (revision v2)"),
        ("revision=v3", "missing  model.teacher  path='owner/name' (revision='v3')"),
        ("variant=fp16", "present  model.teacher  owner/name"),
        ("variant=bf16", "missing  model.teacher  path='owner/name': transformer/ has no weights of variant='bf16'"),
        ("subfolder=unet", "missing  model.teacher  path='owner/name': unet/ is missing there"),
        (f"path={source}", f"present  model.teacher  {source}"),
        ("path=nowhere", "missing  model.teacher  path='nowhere': there is no such folder"),
    ):
        assert run(capsys, "--config", config, "--list", f"{OPTION}.{option}")[1][0].startswith(line), option


def test_parts_are_found_at_any_depth():
    part = Namespace(class_path="distill.pretrained.PretrainedDenoiser", init_args=Namespace(path="owner/name"))
    plain = Namespace(class_path="distill.solvers.Heun", init_args=Namespace(path="not one"))
    config = Namespace(model=Namespace(parts=[plain, {"inner": part}], name="class_path"), path="owner/name")
    assert list(fetch.pretrained_parts(config)) == [("model.parts[1].inner", PretrainedDenoiser, {"path": "owner/name"})]


def test_offline_nothing_is_fetched_and_what_is_missing_is_listed(config, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, lines = run(capsys, "--config", config)
    assert code == 1 and len(lines) == 2
    assert all(line.startswith("missing  ") and "HF_HUB_OFFLINE" in line for line in lines)


def test_a_hub_that_does_not_answer_is_a_line(config, monkeypatch, capsys):
    def fail(*args: object, **settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    code, lines = run(capsys, "--config", config)
    assert code == 1 and len(lines) == 2 and all("no route to host" in line for line in lines)


def test_a_wrong_config_is_refused_as_in_a_run(config, capsys):
    with pytest.raises(SystemExit) as exit_info:
        fetch.main(["--config", str(config), f"{OPTION}.pth=owner/name"])
    assert exit_info.value.code == 2 and "pth" in capsys.readouterr().err


def test_the_tool_in_a_process_of_its_own_reads_the_environment(config, source, tmp_path):
    put(tmp_path / "home/hub", "owner/name", source)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, str(ROOT / "tools/fetch.py"), "--config", str(config), f"{OPTION}.revision=v2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert first.startswith("missing  model.teacher  path='owner/name' (revision='v2')") and "HF_HUB_OFFLINE" in first
    assert second == "present  model.space.codec  owner/name"
