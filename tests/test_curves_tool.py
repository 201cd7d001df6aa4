"""tools/curves.py: its figures are those of the other tools and of distill/straightness.py, its picture shows them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny_run import write_recipe

from distill import cli
from distill.denoiser import NetworkDenoiser
from distill.guidance import ClassifierFreeGuidance
from distill.metrics import FrechetDistance, to_uint8
from distill.metrics.digits import real_digits
from distill.metrics.features import from_uint8
from distill.networks.unet2d import UNet2D
from distill.noise import SeededNoise
from distill.pretrained import PretrainedDenoiser, save_denoiser
from distill.schedules import VariancePreserving
from distill.solvers import Euler, Heun
from distill.straightness import follow
from distill.types import label_conditions

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NUM = 20


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """Runs a tool of that name in this process."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def start(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")

    return start


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion teacher that predicts the noise of a DDPM schedule."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    save_denoiser(NetworkDenoiser(UNet2D(channels=(8, 16), layers_per_block=1), VariancePreserving(), "eps"), folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe, with data of the digits' size."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill"])
        words = ["--trainer.max_steps=4", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={folder}"]
        cli.main(["fit", "--config", str(write_recipe(folder)), *words])
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "curves.json").read_text())


def test_a_runs_figures_are_those_of_the_other_tools(tool, run: Path, tmp_path: Path, capsys) -> None:
    common = ["--reference", "digits", "--steps", 2, 1, "--num", NUM, "--flow-steps", 4]
    tool("curves", "--runs", run, *common, "--out", tmp_path / "curves")
    assert "1 curves in" in capsys.readouterr().out
    [curve] = read(tmp_path / "curves")["curves"]
    for steps in (1, 2):
        drawn = tmp_path / f"steps_{steps}"
        tool("sample", "--run", run, "--steps", steps, "--num", NUM, "--out", drawn)
        tool("fid", "--samples", drawn, "--reference", "digits", "--out", drawn / "fid.json")
        measured = json.loads((drawn / "fid.json").read_text())["distance"]
        assert curve["distance"][str(steps)] == pytest.approx(measured, rel=1e-6)
    assert curve["distance"]["1"] != curve["distance"]["2"]
    assert curve["kind"] == "run" and curve["name"] == str(run) and list(curve["distance"]) == ["1", "2"]
    _, method, data = cli.load_run(run)
    noise, cond = SeededNoise(0, range(NUM), (1, 8, 8)).draw(), data.examples(NUM).cond
    with torch.no_grad():
        paths = follow(method.ema.module, noise, cond, 4)
    assert curve["straightness"] == pytest.approx(float(paths.straightness.mean()), rel=1e-4)


def test_a_teacher_is_followed_in_the_flows_time(tool, teacher: Path, tmp_path: Path) -> None:
    """One with DDPM's schedule: equal steps of the flow's time, not of its own; guided if asked for; in any batches."""
    common = ["--teachers", teacher, "--reference", "digits", "--num", NUM, "--steps", 3, "--flow-steps", 3]
    tool("curves", *common, "--batch-size", 7, "--out", tmp_path / "euler")
    tool("curves", *common, "--guidance", 3, "--solver", "heun", "--out", tmp_path / "guided")
    [euler], [guided] = (read(tmp_path / name)["curves"] for name in ("euler", "guided"))
    denoiser, labels = PretrainedDenoiser(str(teacher)).eval(), torch.arange(NUM) % 10
    noise, (cond, null) = SeededNoise(0, range(NUM), (1, 8, 8)).draw(), label_conditions(labels, 10)
    real = from_uint8(torch.from_numpy(real_digits()[0]).permute(0, 3, 1, 2).contiguous())
    for curve, rule, solver in ((euler, None, Euler()), (guided, ClassifierFreeGuidance(3.0), Heun())):
        flow, metric = denoiser if rule is None else rule(denoiser, null), FrechetDistance()
        with torch.no_grad():
            paths, drawn = follow(flow, noise, cond, 3), follow(flow, noise, cond, 3, solver).samples
        metric.update(from_uint8(to_uint8(drawn)), real, cond)
        # Bytes may fall to either side of a half with another batch size.
        assert curve["distance"]["3"] == pytest.approx(float(metric.compute()), rel=1e-3)
        assert curve["straightness"] == pytest.approx(float(paths.straightness.mean()), rel=1e-4)
        assert curve["transport_cost"] == pytest.approx(float(paths.cost.mean()), rel=1e-4)
        assert curve["relative_straightness"] == pytest.approx(curve["straightness"] / curve["transport_cost"])
    assert euler["straightness"] != pytest.approx(guided["straightness"], rel=1e-3)


def test_the_picture_shows_every_curve(tool, teacher: Path, run: Path, tmp_path: Path, monkeypatch) -> None:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *words, **more: figures.append(self) or save(self, *words, **more))
    common = ["--reference", "digits", "--steps", 1, 2, "--num", NUM, "--flow-steps", 2, "--out", tmp_path]
    tool("curves", "--teachers", teacher, "--runs", run, *common)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 825)
    [axes] = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "sampler steps" and axes.get_ylabel() == "Fréchet distance of pixels to digits"
    curves, texts = read(tmp_path)["curves"], [text.get_text() for text in axes.get_legend().get_texts()]
    assert [curve["kind"] for curve in curves] == ["teacher", "run"] and len(axes.lines) == 2
    for curve, line, text, style in zip(curves, axes.lines, texts, ("--", "-"), strict=True):
        assert line.get_xdata().tolist() == [1, 2] and line.get_linestyle() == style
        assert line.get_ydata().tolist() == list(curve["distance"].values())
        assert text.startswith(curve["name"]) and f"S = {curve['straightness']:.3g}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--runs and --teachers are missing"),
        (["--runs", "nowhere"], "nowhere: there is no such folder; give run folders"),
        (["--teachers", "TEACHER", "--steps", "1", "0"], "--steps=[1, 0]: give at least 1"),
        (["--teachers", "TEACHER", "--flow-steps", "1"], "--flow-steps=1: give at least 2"),
        (["--teachers", "TEACHER", "--reference", "nowhere"], "--reference nowhere: there is no file"),
        (["--teachers", "TEACHER", "--reference", "WIDE"], "--teachers TEACHER: draws images of (8, 8, 1)"),
        (["--runs", "TEACHER"], "--runs TEACHER: "),
    ],
)
def test_bad_options_are_named(words, message: str, tool, teacher: Path, tmp_path: Path, capsys) -> None:
    numpy.savez(tmp_path / "wide.npz", arr_0=numpy.zeros((4, 8, 9, 1), numpy.uint8))
    places = {"TEACHER": str(teacher), "WIDE": str(tmp_path / "wide.npz")}
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        common = ["--reference", "digits", "--steps", 1, "--num", 2, "--out", out]
        tool("curves", *common, *[places.get(word, word) for word in words])
    said = capsys.readouterr().err + str(ended.value.code)
    assert ended.value.code and message.replace("TEACHER", str(teacher)) in said and not out.exists()
