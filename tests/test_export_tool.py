"""tools/export.py on a run of the caption recipe: prompts in, our pixels out, through pipelines that diffusers has loaded."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from tiny_captions import write_captions
from tiny_run import write_recipe

from distill.cli import main
from distill.export.check import LIMIT

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--sample_grid.lines=1"]


def export(monkeypatch, *words: object) -> None:
    """Runs the tool in this process."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a run of LCM-LoRA, two steps long."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        write_captions(folder / "runs/captions")
        recipe = ["--config", str(ROOT / "configs/captions/lcm_lora.yaml"), "--data.init_args.batch_size=8"]
        main(["fit", *recipe, "--trainer.max_steps=2", "--trainer.default_root_dir=run", *QUIET])
    return folder


def test_a_lora_run_becomes_a_lora_file_and_a_whole_pipeline(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    export(monkeypatch, "--run", "run", "--steps", 1, 4, "--lora", "--out", "lora")
    export(monkeypatch, "--run", "run", "--steps", 4, "--out", "whole")
    assert "LCMScheduler" in capsys.readouterr().out
    files = sorted(str(path.relative_to("lora")) for path in Path("lora").rglob("*") if path.is_file())
    assert files == ["README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "student.json"]
    for name in ("lora", "whole"):
        record = json.loads((folder / name / "student.json").read_text())
        assert max(record["max_difference"].values()) <= LIMIT
        assert record["recipe"]["method"] == "Consistency" and record["recipe"]["config_sha256"]
        assert record["missing"] == [] and record["scheduler"] == "LCMScheduler"
        assert record["calls"]["4"] == {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 8, "width": 8}
    index = json.loads(Path("whole/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {index[part][1] for part in ("vae", "text_encoder")} == {"AutoencoderKL", "CLIPTextModel"}


def draw(monkeypatch, *words: object) -> None:
    """Runs tools/sample_pipeline.py in this process."""
    monkeypatch.setattr(sys, "argv", ["sample_pipeline.py", *map(str, words)])
    runpy.run_path(str(ROOT / "tools" / "sample_pipeline.py"), run_name="__main__")


def test_a_lora_file_draws_as_the_merged_pipeline_does_whatever_the_batch(folder, monkeypatch):
    """On the teacher's pipeline, here the merged one without its LoRA: its network is the teacher's."""
    monkeypatch.chdir(folder)
    for name, words in (("drawn_lora", ["--lora"]), ("drawn_whole", [])):
        export(monkeypatch, "--run", "run", "--steps", 4, *words, "--out", name)
    base = folder / "base"
    shutil.copytree("drawn_whole", base)
    shutil.rmtree(base / "unet")
    shutil.copytree("runs/captions/teacher/export/unet", base / "unet")
    common = ["--prompts", "a photo of the digit seven", "zero", "--num", 3]
    draw(monkeypatch, "--pipeline", "drawn_whole", *common, "--out", "a")
    draw(monkeypatch, "--pipeline", "base", "--lora", "drawn_lora", *common, "--out", "b")
    whole, lora = (numpy.load(Path(name, "samples.npz")) for name in "ab")
    assert whole["arr_0"].shape == (3, 8, 8, 1) and whole["arr_1"].tolist() == [0, 1, 0] and Path("a/grid.png").is_file()
    assert int(numpy.abs(whole["arr_0"].astype(int) - lora["arr_0"].astype(int)).max()) <= 1
    for wrong, message in (
        (["--pipeline", "base", "--lora", "drawn_whole"], "is of a whole pipeline"),
        (["--pipeline", "drawn_whole", "--steps", 2], r"for \[4\] steps"),
        (["--pipeline", "runs/captions/teacher/export"], "student.json: missing"),
    ):
        with pytest.raises(SystemExit, match=message):
            draw(monkeypatch, *wrong, "--prompts", "zero", "--out", "c")
    assert not Path("c").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nowhere", "--steps", 1], "nowhere holds no config.yaml"),
        (["--run", "run", "--steps", 0], "steps=[0]"),
        (["--run", "run", "--steps", 1, "--checkpoint", "best"], "no best.ckpt"),
        (["--run", "run", "--steps", 1, "--guidance", 3.0], "guidance=3.0"),
    ],
)
def test_wrong_words_are_named_in_one_line(words, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        export(monkeypatch, *words, "--out", "refused")
    assert str(ended.value).startswith("error: ") and message in str(ended.value)
    assert not Path("refused").exists() and not Path("refused.partial").exists()


def test_a_run_of_another_network_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = write_recipe(folder)
    main(["fit", "--config", str(recipe), "--trainer.max_steps=1", "--trainer.default_root_dir=tiny", *QUIET])
    with pytest.raises(SystemExit, match="TinyNetwork"):
        export(monkeypatch, "--run", "tiny", "--steps", 1, "--out", "refused")
