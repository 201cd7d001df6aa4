"""tools/sample.py's folders: the same bytes from any number of processes, after any interruption, in any format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from forked import on_processes
from guided_run import train, write_teacher
from script import load_script

from distill import cli
from distill.metrics.image_sets import hash_of_images, read_set
from distill.sample_folders import job
from distill.sample_folders.formats import Pictures
from distill.sample_folders.parts import Parts
from distill.types import Batch

sample, fid = load_script("sample"), load_script("fid")
FORMATS = ("npz", "png", "shards")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def draw(teacher: Path, out: Path, *words: object) -> Path:
    """Seven samples in batches of two, so that the last one is of one."""
    common = ["--teacher", teacher, "--solver", "euler", "--num", 7, "--batch-size", 2, "--device", "cpu", "--out", out]
    sample.main([str(word) for word in (*common, "--shard-size", 3, *words)])
    return out


def refused(capsys: pytest.CaptureFixture, tool: Any, *words: object) -> str:
    """The one line that a tool ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        tool(*words)
    *bar, said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said.startswith("error: ") and all("sampling" in line for line in bar if line), said
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("kind", FORMATS)
def test_any_number_of_processes_writes_the_same_files(kind: str, teacher: Path, tmp_path: Path) -> None:
    alone = content(draw(teacher, tmp_path / "1", "--format", kind))
    stored = {"npz": ["samples.npz"], "png": ["labels.json", *(f"images/00000{i}.png" for i in range(7))]}
    stored["shards"] = [f"0000{i}-of-00003.{ending}" for i in range(3) for ending in ("tar", "json")]
    assert alone.keys() == {"samples.json", "grid.png", *stored[kind]}
    for count in (2, 3):
        out = tmp_path / str(count)
        on_processes(count, tmp_path / f"{count}.ranks", lambda out=out: draw(teacher, out, "--format", kind))
        assert content(out) == alone


def test_all_formats_hold_the_same_set(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figures = []
    for kind in FORMATS:
        out = draw(teacher, tmp_path / kind, "--format", kind, "--labels", 3, 8)
        images = read_set("--samples", str(out))
        assert images.labels is not None and images.labels.tolist() == [3, 8, 3, 8, 3, 8, 3]
        capsys.readouterr()
        fid.main(["--samples", str(out), "--reference", "digits", "--cache", str(tmp_path / "cache")])
        result = json.loads(capsys.readouterr().out)
        figures.append((result["distance"], result["accuracy"], images.sha256, images.settings["sha256"]))
    with numpy.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (7, 8, 8, 1) and figures[0][2] == hash_of_images(arrays["arr_0"])
    assert figures[0][2] == figures[0][3] and figures == figures[:1] * 3


def test_an_interrupted_set_is_continued(teacher: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    whole, half, drawn, real = content(draw(teacher, tmp_path / "whole")), tmp_path / "half", [], job.draw_batch

    def killed(source: Any, arguments: Any, wanted: Batch, indices: range) -> Any:
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(indices)
        return real(source, arguments, wanted, indices)

    monkeypatch.setattr(job, "draw_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(teacher, half)
    assert not (half / "samples.json").exists()
    said = refused(capsys, fid.main, ["--samples", str(half), "--reference", "digits"])
    assert "not all drawn; start the same command" in said
    (half / "parts" / "000000002.npz").unlink()
    (half / "parts" / "000000006.npz.123.partial").write_bytes(b"half")
    assert "guidance is null there, 2.0 here" in refused(capsys, draw, teacher, half, "--guidance", 2)
    drawn.clear()
    draw(teacher, half)
    assert drawn == [range(2, 4), range(6, 7)] and content(half) == whole
    drawn.clear()
    draw(teacher, half)
    assert not drawn and "nothing was drawn" in capsys.readouterr().out and content(half) == whole
    (half / "samples.npz").unlink()
    drawn[:] = [range(0)] * 4  # past those that are killed
    draw(teacher, half)
    assert len(drawn) == 8 and content(half) == whole


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--steps", 2], "steps is 1 there, 2 here"),
        (["--num", 8], "num is 7 there, 8 here"),
        (["--seed", 1], "seed is 0 there, 1 here"),
        (["--batch-size", 3], "batch_size is 2 there, 3 here"),
        (["--labels", 1], "labels is null there, [1] here"),
        (["--format", "png"], 'format is "npz" there, "png" here'),
    ],
)
def test_other_settings_are_refused(words: list, difference: str, teacher: Path, tmp_path: Path, capsys) -> None:
    before = content(draw(teacher, tmp_path))
    said = refused(capsys, draw, teacher, tmp_path, *words)
    assert difference in said and "another --out, or --overwrite" in said and content(tmp_path) == before
    (tmp_path / "fid.json").write_text("{}")
    draw(teacher, tmp_path, *words, "--overwrite")
    after = content(tmp_path)
    assert after.pop("fid.json") == b"{}"  # not this tool's to remove
    assert after == content(draw(teacher, tmp_path / "new", *words))


def test_other_weights_are_refused_whatever_they_are_called(teacher: Path, tmp_path: Path, capsys) -> None:
    place = write_teacher(tmp_path / "place", seed=1)
    before = draw(place, tmp_path / "out")
    (tmp_path / "moved").symlink_to(place)
    draw(tmp_path / "moved", before)
    assert "nothing was drawn" in capsys.readouterr().out
    write_teacher(place, seed=2)
    assert "teacher is " in refused(capsys, draw, place, before)


def test_a_run_that_is_trained_further_is_another_source(teacher: Path, tmp_path: Path, capsys) -> None:
    run, out = train(tmp_path / "run", teacher, guidance_range=[1.0, 5.0]), tmp_path / "out"
    words = ["--run", run, "--num", 3, "--guidance", 2, "--device", "cpu", "--out", out]
    sample.main([str(word) for word in words])
    before = content(out)
    further = ["--ckpt_path=last", "--trainer.max_steps=3", f"--trainer.default_root_dir={run}"]
    cli.main(["fit", "--config", str(run.with_suffix(".yaml")), *further])
    said = refused(capsys, sample.main, [str(word) for word in words])
    assert "batches_trained is 2 there, 3 here" in said and content(out) == before
    sample.main([str(word) for word in (*words, "--overwrite")])
    settings = json.loads((out / "samples.json").read_text())
    assert settings["batches_trained"] == 3 and settings["sha256"] != json.loads(before["samples.json"])["sha256"]


def test_what_no_record_speaks_of_is_not_removed(teacher: Path, tmp_path: Path, capsys) -> None:
    numpy.savez(tmp_path / "samples.npz", arr_0=numpy.zeros((7, 8, 8, 1), numpy.uint8))
    before = content(tmp_path)
    for words in ([], ["--overwrite"]):
        assert "holds samples.npz, and no samples.json" in refused(capsys, draw, teacher, tmp_path, *words)
    assert content(tmp_path) == before
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "parts" / "thesis.tex").write_text("mine")
    assert "holds thesis.tex" in refused(capsys, draw, teacher, tmp_path / "mine", "--overwrite")


def test_samples_that_are_not_finite_leave_nothing_that_looks_finished(tmp_path: Path, monkeypatch, capsys) -> None:
    """Batches that were drawn before stay; a set of which none was drawn leaves no folder of them."""
    teacher, real, worst = write_teacher(tmp_path / "teacher"), job.draw_batch, 5

    def diverged(source: Any, arguments: Any, wanted: Batch, indices: range) -> Any:
        pixels, evaluations = real(source, arguments, wanted, indices)
        pixels[torch.tensor(indices) == worst] = torch.nan
        return pixels, evaluations

    monkeypatch.setattr(job, "draw_batch", diverged)
    said = refused(capsys, draw, teacher, tmp_path / "out")
    assert re.search(r"samples 4 to 5: 64 of 128 values .* not finite.*; give another --solver", said)
    assert {file.split("/")[0] for file in content(tmp_path / "out")} == {"parts"}
    worst = 0
    assert "samples 0 to 1: " in refused(capsys, draw, teacher, tmp_path / "none")
    assert not (tmp_path / "none" / "parts").exists()


def test_names_of_pictures_sort_by_number() -> None:
    for num, last in ((1000, "images/000999.png"), (1001, "images/001/001000.png"), (2_000_000, "images/1999/1999999.png")):
        pictures = Pictures(Path(), Parts(Path(), num, 1), Batch(None, {}, {}), {})
        names = [pictures.name(number) for number in {0, 1, 99, 100, 999, min(1000, num - 1), num - 1, num // 2}]
        assert str(pictures.name(num - 1)) == last and len(set(names)) == len(names)
        assert sorted(names) == sorted(names, key=lambda name: int(name.stem))
