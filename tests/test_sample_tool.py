"""tools/sample.py: what it writes and counts, and that a sample depends on the seed and its own number alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from guided_run import train, write_teacher
from script import load_script
from standins import write_sd15

from distill.adapter_files import save_adapters
from distill.cli import load_run
from distill.denoiser import NetworkDenoiser
from distill.metrics.image_sets import hash_of_images
from distill.networks.unet2d import UNet2D
from distill.pretrained import save_denoiser
from distill.schedules import RectifiedFlow

TOOL = Path(__file__).resolve().parent.parent / "tools" / "sample.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    save_denoiser(NetworkDenoiser(UNet2D(channels=(8, 16), layers_per_block=1), RectifiedFlow(), "flow"), folder)
    return folder


def sample(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_a_text_to_image_teacher_draws_pixels_from_prompts(tmp_path: Path) -> None:
    write_sd15(tmp_path / "sd15")
    common = ["--teacher", tmp_path / "sd15", "--steps", 2, "--num", 3, "--solver", "ddim", "--guidance", 2.0]
    for name, size in (("whole", 3), ("parts", 2)):
        done = sample(*common, "--prompts", "zero", "one", "--batch-size", size, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    whole, parts = (numpy.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("whole", "parts"))
    assert whole.shape == (3, 32, 32, 3) and abs(whole - parts).max() <= 1
    refused = sample(*common, "--out", tmp_path / "none")
    assert refused.returncode == 2 and "--prompts is missing" in refused.stderr and not (tmp_path / "none").exists()


def test_samples_do_not_depend_on_the_batch(teacher: Path, tmp_path: Path) -> None:
    common = ["--teacher", teacher, "--steps", 2, "--num", 7, "--guidance", 2.0, "--labels", 3, 8]
    for name, size in (("whole", 7), ("parts", 3)):
        done = sample(*common, "--batch-size", size, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    whole, parts = (numpy.load(tmp_path / name / "samples.npz") for name in ("whole", "parts"))
    assert whole["arr_0"].shape == (7, 8, 8, 1) and whole["arr_0"].dtype == numpy.uint8
    assert whole["arr_1"].tolist() == [3, 8, 3, 8, 3, 8, 3]
    # A batch of another size may round otherwise in its last bit, and a pixel then falls into the next byte.
    assert abs(whole["arr_0"].astype(int) - parts["arr_0"]).max() <= 1
    assert whole["arr_0"].std() > 10
    record = json.loads((tmp_path / "whole" / "samples.json").read_text())
    assert (record["seed"], record["steps"], record["guidance"], record["solver"]) == (0, 2, 2.0, "heun")
    assert record["num"] == 7 and record["sha256"] == hash_of_images(whole["arr_0"])  # of which tools/fid.py makes sure
    assert (tmp_path / "whole" / "grid.png").stat().st_size > 100


# ------------------------------------------------------------------------------------------- guided in one evaluation


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a run of adapters on it and the file of these."""
    folder = tmp_path_factory.mktemp("adapted")
    adapter = {"class_path": "AttentionGuidance", "init_args": {"width": 8}}
    train(folder / "run", write_teacher(folder / "teacher"), guidance_range=[1.0, 5.0], adapter=adapter)
    save_adapters(load_run(folder / "run")[1].ema.module, folder / "added.safetensors")
    return folder


def drawn(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: object) -> tuple[numpy.ndarray, dict]:
    """Samples and record of a set of five in batches of two, drawn in this process."""
    words = [*map(str, arguments), "--num", "5", "--batch-size", "2", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    load_script("sample").main()
    return numpy.load(out / "samples.npz")["arr_0"].astype(int), json.loads((out / "samples.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "evaluations"),
    [
        (["--steps", 2, "--solver", "euler", "--guidance", 3.0], 4),
        (["--steps", 2, "--solver", "euler", "--guidance", 1.0], 2),
        (["--steps", 3, "--solver", "heun"], 5),
        (["--steps", 3, "--solver", "heun", "--guidance", 3.0], 10),
        (["--steps", 2, "--solver", "euler", "--guidance", 3.0, "--adapters", "added.safetensors"], 2),
    ],
)
def test_evaluations_are_counted(
    arguments: list, evaluations: int, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sample: two a step for a guided teacher, one for one with adapters; Heun has a second slope but in the last step."""
    monkeypatch.chdir(adapted)
    _, record = drawn(monkeypatch, tmp_path, "--teacher", "teacher", *arguments)
    assert record["evaluations"] == evaluations
    assert record.get("adapters") == ("added.safetensors" if "--adapters" in arguments else None)


def test_a_teacher_with_adapters_draws_what_the_runs_student_draws(
    adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapted)
    common, teacher = ["--steps", 2, "--guidance", 4.0, "--labels", 3, 8], ["--teacher", "teacher", "--solver", "euler"]
    run, of_run = drawn(monkeypatch, tmp_path / "run", "--run", "run", *common)
    file, of_file = drawn(monkeypatch, tmp_path / "file", *teacher, "--adapters", "added.safetensors", *common)
    other, _ = drawn(monkeypatch, tmp_path / "other", *teacher, *common)
    assert (run == file).all() and abs(run - other).max() > 10
    assert of_run["evaluations"] == of_file["evaluations"] == 2


def test_adapters_without_a_teacher_or_a_scale_are_named(adapted: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(adapted)
    with pytest.raises(SystemExit) as stopped:
        drawn(monkeypatch, tmp_path, "--run", "run", "--adapters", "added.safetensors")
    assert stopped.value.code == 2 and "--adapters is for --teacher" in capsys.readouterr().err
    for file, words, message in (
        ("added.safetensors", [], "error: --guidance is missing"),
        ("nowhere.safetensors", ["--guidance", 2.0], "error: nowhere.safetensors: there is no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            drawn(monkeypatch, tmp_path, "--teacher", "teacher", "--adapters", file, *words)
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps=0", "at least 1"]),
        (["--num", "-2"], ["--num=-2", "at least 1"]),
        (["--labels", "11"], ["--labels=[11]", "0 to 9"]),
        (["--teacher", "nowhere"], ["path='nowhere'", "give a diffusers folder"]),
        (["--run", "nowhere"], ["not allowed with"]),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: list[str], teacher: Path, tmp_path: Path) -> None:
    done = sample("--teacher", teacher, "--out", tmp_path, *arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
