"""tools/latency.py: evaluations as counted, what each row says, and its refusals. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from guided_run import train, write_teacher
from script import load_script

latency = load_script("latency")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a run that distils its guidance."""
    folder = tmp_path_factory.mktemp("latency")
    train(folder / "run", write_teacher(folder / "teacher"), guidance_range=[1.0, 5.0])
    return folder


def test_rows_count_evaluations_and_compare_with_the_teacher(folder: Path, tmp_path: Path, capsys) -> None:
    """A guided teacher has two evaluations a step, in one forward; Heun a second slope but in the last step; a student one."""
    words = ["--teacher", folder / "teacher", "--teacher-steps", 3, 2, "--guidance", 2, "--solver", "heun"]
    words += ["--run", folder / "run", "--steps", 1, 2, "--student-guidance", 3]
    words += ["--batch-size", 1, 4, "--repeats", 3, "--device", "cpu"]
    latency.main([*map(str, words), "--out", str(tmp_path / "latency.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "latency.json").read_text())
    keys = ("kind", "batch_size", "steps", "guidance", "evaluations", "forwards")
    assert [tuple(row[key] for key in keys) for row in result["rows"]] == [
        *(("teacher", size, steps, 2.0, 2 * (2 * steps - 1), 2 * steps - 1) for size in (1, 4) for steps in (3, 2)),
        *(("run", size, steps, 3.0, steps, steps) for size in (1, 4) for steps in (1, 2)),
    ]
    medians = {(row["kind"], row["batch_size"], row["steps"]): row["ms"]["median"] for row in result["rows"]}
    for row in result["rows"]:
        assert 0 < row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert row["speed_up"] == pytest.approx(medians["teacher", row["batch_size"], 3] / row["ms"]["median"])
        assert row["precision"] == "float32" and row["working_bytes"] is None  # which is not known on the CPU
        cells = [row[key] for key in ("name", "steps", "guidance", "batch_size")] + [f"{row['evaluations']:g}"]
        assert f"| {' | '.join(map(str, cells))} |" in printed
    teacher, student = result["rows"][0], result["rows"][-1]
    assert teacher["weights_bytes"] == 4 * teacher["parameters"] and teacher["parameters"] > 1000
    assert student["parameters"] > teacher["parameters"]  # it reads the scale
    assert result["device"] == "cpu" and result["threads"] >= 1 and result["repeats"] == 3 and "torch" in result["versions"]


def test_a_time_is_that_of_one_sample_and_quartiles_are_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 34.0, 40.0, 45.0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(ticks))
    drawn: list[int] = []
    options = latency.read_options(["--run", "x", "--repeats", "5", "--warm-up", "3", "--device", "cpu"])[1]
    times, _ = latency.timed(lambda: drawn.append(0), options)
    assert len(drawn) == 8 and times == [1, 3, 2, 4, 5]
    assert latency.spread(times) == {"low": 2, "median": 3, "high": 4}
    assert latency.spread([7.0]) == {"low": 7, "median": 7, "high": 7}


def test_without_a_teacher_nothing_is_compared(folder: Path, capsys) -> None:
    latency.main(["--run", str(folder / "run"), "--steps", "1", "--repeats", "1", "--student-guidance", "2", "--device", "cpu"])
    assert "| 1 | 2.0 | 1 | 1 |" in (said := capsys.readouterr().out) and "x |" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--run and --teacher are missing"),
        (["--run", "RUN", "--guidance", "2"], "--guidance is for --teacher"),
        (["--run", "RUN", "--steps", "1", "0"], "--steps [1, 0]: give at least 1"),
        (["--run", "RUN", "--repeats", "0"], "--repeats 0: give at least 1"),
        (["--run", "RUN", "--out", "."], "--out .: give the name of a file"),
        (["--run", "nowhere"], "--run nowhere: nowhere holds no config.yaml"),
        (["--run", "RUN", "--prompts", "a dog"], "--prompts: this network reads none"),
    ],
)
def test_bad_options_are_named_in_one_line(words: list[str], message: str, folder: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        latency.main([word.replace("RUN", str(folder / "run")) for word in words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1
