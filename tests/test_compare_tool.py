"""tools/compare.py: its report says what the evaluations say, best first, and needs nothing else; unlike ones are refused."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
from script import load_script

from distill.metrics.image_sets import hash_of_images

fid = load_script("fid")
# Each finds those that it imports.
_, wording, _, _, compare = (load_script(name) for name in ("evaluations", "wording", "charts", "report", "compare"))

ODD = "<i>b & $x_1$|"
RUNS = {"a": {1: 110, 4: 5}, ODD: {1: 50, 2: 70}, "c": {2: 125}}
"""How far off the images are, by run and steps: the best of all is a, in 4 steps."""
COST: dict[str, Any] = {
    "method": "ConsistencyDistillation",
    "batches": 400,
    "images": 51_200,
    "evaluations": {"student": 51_200, "teacher": 102_400, "total": 153_600},
    "seconds": 90.0,
    "device_seconds": 180.0,
    "devices": 2,
    "device": "cpu",
    "parameters": {"trained": 700_000, "student": 700_000},
}


def draw(folder: Path, off: int, steps: int, source: dict[str, Any], num: int = 40) -> None:
    """What tools/sample.py leaves, of made-up images."""
    images = numpy.random.default_rng(off).integers(0, 120 + off, (num, 2, 2, 1), dtype=numpy.uint8)
    settings = source | {"steps": steps, "seed": 0, "guidance": None, "num": num, "prompts": None}
    settings["evaluations"] = float(steps)
    folder.mkdir(parents=True, exist_ok=True)
    numpy.savez(folder / "samples.npz", images)
    (folder / "samples.json").write_text(json.dumps(settings | {"sha256": hash_of_images(images)}))


def measure(folder: Path, *further: str) -> None:
    top = folder.parents[2]
    words = ["--samples", folder, "--reference", top / "reference.npz", "--cache", top / "cache", "--out", folder / "fid.json"]
    fid.main([*map(str, words), *further])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, of which c has no cost and no interval, and a teacher."""
    out = tmp_path_factory.mktemp("made")
    numpy.savez(out / "reference.npz", numpy.random.default_rng(0).integers(0, 120, (50, 2, 2, 1), dtype=numpy.uint8))
    for name, sets in RUNS.items():
        for steps, off in sets.items():
            folder = out / name / "evaluations" / f"steps_{steps}"
            source = {"run": str(out / name), "checkpoint": "last", "weights": "ema", "batches_trained": 400}
            draw(folder, off, steps, source)
            measure(folder, *(["--bootstrap", "40", "--seed", "3"] if name != "c" else []))
        if name != "c":
            (out / name / "training_cost.json").write_text(json.dumps(COST))
    folder = out / "teacher" / "evaluations" / "steps_32"
    draw(folder, 1, 32, {"teacher": {"path": "t", "sha256": "0"}, "solver": "heun"})
    measure(folder, "--bootstrap", "40")
    return out


@pytest.fixture(scope="module")
def written(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The HTML and the Markdown of them."""
    return write(made, tmp_path_factory.mktemp("written"))


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def write(folder: Path, out: Path) -> tuple[str, str]:
    words = [*(folder / name for name in reversed(RUNS)), "--teacher", folder / "teacher", "--out", out]
    compare.main([str(word) for word in words])
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def refusal(folder: Path, capsys: pytest.CaptureFixture, *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        compare.main([str(word) for word in words or (folder / "a", folder / ODD, "--out", folder / "out")])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert not (folder / "out").exists()
    return printed.err


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Page(HTMLParser):
    """Cells of the tables, words of the headline, and all that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.answers: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "li"):
            self.into = self.tables[-1][-1] if tag != "li" else self.answers
            self.into.append("")
        elif tag == "small" and self.into is not None:
            self.into[-1] += "; "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "li"):
            self.into = None

    def handle_data(self, data: str) -> None:
        if self.into is not None:
            self.into[-1] += data


def result(folder: Path, name: str, steps: int) -> dict[str, Any]:
    return json.loads((folder / name / "evaluations" / f"steps_{steps}" / "fid.json").read_text())


def figure(folder: Path, name: str, steps: int) -> str:
    """Distance and interval as the evaluation has them."""
    found = result(folder, name, steps)
    words = f"{found['distance']:#.3g}"
    if interval := found["metrics"]["frechet"].get("interval"):
        words += f"; {interval['low']:#.3g} to {interval['high']:#.3g}"
    return f"{words}; {steps} eval."


def test_the_table_says_what_the_evaluations_say_in_order_of_the_best(made: Path, written: tuple[str, str]) -> None:
    page = Page(written[0])
    head, *lines = page.tables[0]
    costs = ["trainable parameters", "training images", "training evaluations", "wall time", "device time", "devices"]
    assert head == ["", "1 step", "2 steps", "4 steps", *costs]
    spent = ["700 k", "51.2 k", "154 k", "90 s", "3 min", "2 x cpu"]
    first, other = figure(made, "a", 4), figure(made, ODD, 1)
    assert [line[0] for line in lines] == [
        "a; ConsistencyDistillation",
        f"{ODD}; ConsistencyDistillation",
        "c; not recorded",
        f"teacher; teacher, heun; 32 steps: {result(made, 'teacher', 32)['distance']:#.3g}",
    ]
    assert lines[0][1:] == [figure(made, "a", 1), "–", first, *spent]
    two = figure(made, ODD, 2)
    assert lines[1][1:] == [other, two, "–", *spent]
    assert lines[2][1:] == ["–", figure(made, "c", 2), "–", *["not recorded"] * 6]
    assert lines[3][1:] == ["–", "–", "–", *[""] * 6]
    assert page.answers[0].startswith(f"Best in 1 step: {ODD}, {other.split(';')[0]} (")
    assert page.answers[1] == f"Best in 2 steps: {ODD}, " + two.split(";")[0] + f" ({two.split('; ')[1]})"
    assert page.answers[2].endswith("no other run was measured there") and "teacher" in page.answers[3]


def test_overlapping_intervals_are_not_told_apart(runs: Path) -> None:
    """The other's low end decides, against the high end of the best."""
    near = runs / "a" / "evaluations" / "steps_1" / "fid.json"
    high = result(runs, ODD, 1)["metrics"]["frechet"]["interval"]["high"]
    for low, said in ((high * 0.999, True), (high * 1.001, False)):
        metrics = {"frechet": {"value": 1.0, "settings": {}, "interval": {"low": low, "high": 9.0, "resamples": 40, "seed": 3}}}
        change(near, metrics=metrics)
        page = Page(write(runs, runs / "out")[0])
        assert ("not told apart from a" in page.answers[0]) == said
        assert page.tables[0][1][1].startswith("≈ ") == said


def test_the_page_needs_nothing_else_and_no_name_is_markup(written: tuple[str, str]) -> None:
    text = written[0]
    page = Page(text)
    assert page.fetched and all(value.startswith(("data:image/png;base64,", "#")) for value in page.fetched)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "i", "metadata"}
    assert not re.search(r"@import|url\((?!#)|https?://", text)
    # every set has its picture, the teacher's in each of the three blocks
    assert page.tags.count("img") == 5 + 3 and page.tags.count("svg") == 2
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert targets and {one or other for one, other in targets} <= set(names)


def test_markdown_has_equal_columns_and_the_same_figures(made: Path, written: tuple[str, str]) -> None:
    text = written[1]
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert figure(made, "a", 4) in tables[0][2] and "&lt;i&gt;b &amp; \\$x\\_1\\$\\|" in tables[0][3]
    sha = result(made, "a", 1)["samples"]["sha256"][:12]
    assert sha in tables[1][2] and "| 0 | ema | last | 400 |" in tables[1][2] and "40, 3" in tables[1][2]


def test_commands_give_the_evaluations_again(made: Path, tmp_path: Path) -> None:
    """Those of tools/fid.py, called as they stand, with another file to write."""
    (each,) = [each for each in compare.read_all([made / "a"], None)]
    drawn, measured, *_ = wording.commands([each])
    folder = made / "a" / "evaluations" / "steps_1"
    settings = "--checkpoint last --weights ema --steps 1 --num 40 --seed 0"
    assert drawn == f"python tools/sample.py --run {made / 'a'} {settings} --out {folder}"
    words = measured.split()
    assert words[-2:] == ["--out", str(folder / "fid.json")]
    fid.main([*words[2:-1], str(tmp_path / "again.json"), "--cache", str(tmp_path)])
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == result(made, "a", 1)["metrics"]


# ----------------------------------------------------------------------------------------------------------- refusals


def test_unequal_protocols_are_refused(runs: Path, capsys: pytest.CaptureFixture) -> None:
    folder = runs / ODD / "evaluations" / "steps_2"
    measure(folder, "--num", "39")
    message = refusal(runs, capsys)
    assert "unequal protocols, the number of samples: 40 and 39; measure all alike" in message and str(folder) in message
    measure(folder)
    change(folder / "samples.json", prompts=["seven"])
    measure(folder)
    assert "drawn for unequal prompts: None and ['seven']; draw all alike" in refusal(runs, capsys)


def test_samples_that_were_drawn_again_are_refused(runs: Path, capsys: pytest.CaptureFixture) -> None:
    folder = runs / "a" / "evaluations" / "steps_4"
    draw(folder, 6, 4, {"run": "a", "checkpoint": "last", "weights": "ema", "batches_trained": 400})
    assert f"{folder / 'fid.json'} is stale, the samples beside it were drawn since; measure again by" in refusal(runs, capsys)


@pytest.mark.parametrize(
    ("batches", "checkpoint", "message"),
    [
        (401, "last", "is stale, drawn after 400 batches of 401; draw and measure again"),
        (399, "last", "training_cost.json counts 399 batches, .* was drawn after 400; put back"),
        (399, "best", "training_cost.json counts 399 batches"),
        (401, "best", None),
    ],
)
def test_runs_that_were_trained_further_are_refused(
    batches: int, checkpoint: str, message: str | None, runs: Path, capsys: pytest.CaptureFixture
) -> None:
    """But for a checkpoint that was chosen, which may be older."""
    change(runs / "a" / "training_cost.json", batches=batches)
    for steps in RUNS["a"]:
        folder = runs / "a" / "evaluations" / f"steps_{steps}"
        change(folder / "samples.json", checkpoint=checkpoint)
        measure(folder)
    if message is None:
        write(runs, runs / "out")
    else:
        assert re.search(message, refusal(runs, capsys))


def test_folders_that_hold_no_evaluations_are_refused(runs: Path, capsys: pytest.CaptureFixture) -> None:
    out = ("--out", runs / "out")
    assert "there is no such folder" in refusal(runs, capsys, runs / "none", *out)
    (runs / "empty").mkdir()
    assert "holds no evaluations/*/fid.json; draw by" in refusal(runs, capsys, runs / "empty", *out)
    assert "is given twice" in refusal(runs, capsys, runs / "a", runs / "c" / ".." / "a", *out)
    file = runs / "a" / "evaluations" / "steps_4" / "fid.json"
    for text, said in (("{", "is no JSON"), ("[]", "holds no JSON object"), ("{}", "has no Fréchet distance of samples")):
        file.write_text(text)
        assert said in refusal(runs, capsys, runs / "a", *out)
    alike = runs / "c" / "evaluations" / "again"
    shutil.copytree(runs / "c" / "evaluations" / "steps_2", alike)
    assert "are of 2 steps and drawn alike; remove one" in refusal(runs, capsys, runs / "c", *out)


def test_sets_drawn_in_two_ways_are_two_lines(runs: Path) -> None:
    other = runs / "c" / "evaluations" / "guided"
    shutil.copytree(runs / "c" / "evaluations" / "steps_2", other)
    change(other / "samples.json", guidance=2.0)
    measure(other)
    names = {line[0].split(";")[0] for line in Page(write(runs, runs / "out")[0]).tables[0]}
    assert {"c (guidance: None)", "c (guidance: 2.0)"} <= names


def test_students_of_several_rounds_are_one_line(runs: Path) -> None:
    """Each for its own number of steps; two students of one number are two lines."""
    folder = runs / "a" / "evaluations"
    earlier = {"checkpoint": "checkpoints/step_00000200.ckpt", "batches_trained": 200}
    change(folder / "steps_1" / "samples.json", **earlier, weights_sha256="0")
    measure(folder / "steps_1")
    lines = Page(write(runs, runs / "out")[0]).tables[0][1:]
    assert [line[0] for line in lines if line[0].startswith("a")] == ["a; ConsistencyDistillation"]
    shutil.copytree(folder / "steps_4", folder / "earlier")
    change(folder / "earlier" / "samples.json", **earlier)
    measure(folder / "earlier")
    names = [line[0] for line in Page(write(runs, runs / "out")[0]).tables[0] if line[0].startswith("a (")]
    assert len(names) == 3 and any("batches_trained: 200" in name for name in names)


def test_what_was_made_for_a_training_is_part_of_its_cost(runs: Path) -> None:
    made = {"evaluations": 100_000, "seconds": 60.0, "what": "1,000 pairs"}
    change(runs / "a" / "training_cost.json", prepared=made)
    line = Page(write(runs, runs / "out")[0]).tables[0][1]
    assert line[0].startswith("a;") and line[-4:-1] == ["254 k, 100 k of them for 1,000 pairs", "2.5 min", "4 min"]
