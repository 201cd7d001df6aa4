"""tools/tournament.py: budgets become numbers of updates, recipes are read, and what fails does not stop what does not."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from script import TOOLS, load_script

from distill.denoiser import NetworkDenoiser
from distill.networks.unet2d import UNet2D
from distill.pretrained import save_denoiser
from distill.schedules import RectifiedFlow

for name in ("fid", "recipes", "contest"):  # as they find each other when the tool is run as a script
    if name not in sys.modules:
        load_script(name)
tool = load_script("tournament")
contest, recipes = sys.modules["contest"], sys.modules["recipes"]
Budget, Recipe, Refusal = contest.Budget, recipes.Recipe, tool.Refusal

DIGITS = Path(__file__).resolve().parent.parent / "configs/digits"
RECIPE = """
model:
  class_path: DenoisingTraining
  init_args:
    student: teacher.yaml
    times: {times}
    optimization:
      learning_rate: {{warmup_steps: 50, decay: cosine}}
data: {{class_path: DigitsDataModule, init_args: {{batch_size: 8}}}}
trainer: {{max_steps: 100, accelerator: cpu}}
"""


def recipe(name: str) -> Any:
    return Recipe(DIGITS / f"{name}.yaml")


# --------------------------------------------------------------------------------------------------------------- budgets


def test_a_budget_is_spent_in_whole_cycles():
    """Nine updates cost 5,120 evaluations a cycle of three: of 300,000 fit 58 cycles; 19 if two thirds are spent before."""
    trial = {"updates": 9, "evaluations": 3 * 5120, "seconds": 4.5}
    assert Budget.parse("300000ev").updates(trial, 0, 3) == 3 * 58
    assert Budget.parse("300000ev").updates(trial, 200_000, 3) == 3 * 19
    assert Budget.parse("120s").updates(trial, 0, 3) == 240, "half a second each"
    assert Budget.parse("5120ev").updates(trial, 0, 3) == 3, "exactly one"
    with pytest.raises(Refusal, match="--budget 5119 evaluations: 3 updates cost 5,120; give more"):
        Budget.parse("5119ev").updates(trial, 0, 3)


@pytest.mark.parametrize("text", ["300000", "0ev", "-5s", "2h", "nan"])
def test_other_budgets_are_refused(text):
    with pytest.raises(Refusal, match=f"--budget {text}: give evaluations of networks, e.g. 300000ev, or seconds"):
        Budget.parse(text)


# --------------------------------------------------------------------------------------------------------------- recipes


def test_every_family_starts_from_the_teacher():
    found = {name: recipe(name).teacher_keys for name in tool.FAMILIES}
    assert {name for name, keys in found.items() if keys == ["student"]} == {"ict", "ect"}
    assert all(keys == ["teacher"] for name, keys in found.items() if name not in ("ict", "ect"))
    assert [name for name in tool.FAMILIES if recipe(name).on_pairs] == ["reflow"]
    assert [name for name in tool.FAMILIES if recipe(name).on_classifier] == ["mmd_4step"]


def test_players_take_whole_turns_and_rounds_are_alike():
    assert [recipe(name).unit for name in ("cd", "sid", "dmd2", "progressive")] == [1, 2, 3, 5]
    assert recipe("progressive").rounds == [16, 8, 4, 2, 1]


def test_numbers_of_steps_follow_the_length():
    assert recipe("ect").rescaled(300) == {
        "model.init_args.pairs.init_args.stage_steps": (150, 75),
        "model.init_args.optimization.learning_rate.warmup_steps": (50, 30),
    }
    assert recipe("ect").rescaled(1200)["model.init_args.optimization.learning_rate.warmup_steps"] == (50, 50)
    rounds = recipe("progressive").rescaled(400)
    assert rounds["model.init_args.round_steps"] == (150, 80)
    assert rounds["model.init_args.optimization.learning_rate.warmup_steps"] == (10, 8)


def test_students_are_drawn_at_what_they_were_trained_for():
    asked = [1, 2, 4, 8]
    found = {name: recipe(name).steps(asked) for name in ("cd", "progressive", "mmd_4step", "perflow")}
    assert found == {"cd": asked, "progressive": asked, "mmd_4step": [4], "perflow": [4, 8]}
    assert [recipe("progressive").checkpoint(steps, 400) for steps in asked] == [
        "last",
        "checkpoints/step_00000320.ckpt",
        "checkpoints/step_00000240.ckpt",
        "checkpoints/step_00000160.ckpt",
    ]
    assert (recipe("mmd_4step").checkpoint(4, 100), recipe("cd").checkpoint(4, 100)) == ("best", "last")
    assert [recipe(name).guidance for name in ("cd", "lcm")] == [None, 1.0]
    assert "another law" in recipe("sid_guided").remark


def test_pairs_are_paid_from_the_budget():
    """Eight steps of Heun, 15 evaluations; as many as the recipe says, or fewer."""
    assert recipe("reflow").pairs(1e9) == (10_000, 15, "10,000 pairs of 8 Heun steps")
    assert recipe("reflow").pairs(3014)[0] == 200


@pytest.mark.parametrize(
    "name, words",
    [
        ("reflow_distill", "model.teacher is runs/digits/reflow/export, another stage's"),
        ("reflow_pp", "needs several folders of pairs"),
        ("agd_trajectories", "needs stored trajectories"),
        ("teacher", "starts from no teacher"),
        ("pairs", "states no model and trainer.max_steps"),
    ],
)
def test_recipes_that_cannot_be_given_this_teacher_are_refused(name, words):
    with pytest.raises(Refusal, match=words):
        recipe(name).settings, recipe(name).teacher_keys, recipe(name).on_pairs


# ---------------------------------------------------------------------------------------------------------- tournaments


class Forked:
    """In place of ``subprocess.run``: the same script, in a process forked from this one, so that nothing is imported anew."""

    def __init__(self, folder: Path):
        self.folder, self.commands = folder, []

    def __call__(self, command: list[str], **settings: Any) -> SimpleNamespace:
        words = command[1:]
        self.commands.append(words)
        output = self.folder / f"output_{len(self.commands)}"
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return SimpleNamespace(returncode=code, stdout=output.read_text(), stderr="")
        code = 1
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1), os.dup2(file, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
            sys.path.insert(0, str(TOOLS))
            module = words[0] == "-m"
            sys.argv = words[1:] if module else words
            (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        finally:
            sys.stdout.flush()
            os._exit(code)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two recipes, of which one fails, and a tiny teacher."""
    monkeypatch.chdir(tmp_path)
    network = UNet2D(1, 8, 10, (8, 8), layers_per_block=1, heads_width=8, groups=4)
    save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), tmp_path / "export")
    Path("teacher.yaml").write_text("{class_path: PretrainedDenoiser, init_args: {path: elsewhere}}")
    Path("plain.yaml").write_text(RECIPE.format(times="UniformTimes"))
    Path("broken.yaml").write_text(RECIPE.format(times="NoTimes"))
    return tmp_path


WORDS = ["--teacher", "export", "--out", "out", "--num", "20", "--bootstrap", "0", "--jobs", "1", "--steps", "2"]
WORDS += ["--teacher-steps", "2", "--configs", "plain.yaml", "broken.yaml"]


def held(*words: str) -> Any:
    with pytest.raises(SystemExit) as left:
        tool.main([*WORDS, *words])
    return left.value.code


def test_what_fails_is_reported_and_what_is_complete_is_not_done_again(folder, monkeypatch, capfd):
    """Batches of 8 of one evaluation each: 28 evaluations are three updates."""
    forked = Forked(folder)
    monkeypatch.setattr(contest, "subprocess", SimpleNamespace(run=forked))
    assert held("--budget", "28ev") == 1
    cost = json.loads(Path("out/plain/training_cost.json").read_text())
    assert (cost["updates"], cost["evaluations"]) == (3, {"student": 24, "total": 24})
    facts = json.loads(Path("out/tournament.json").read_text())["recipes"]
    assert (facts["plain"]["status"], facts["broken"]["status"]) == ("complete", "failed")
    assert "NoTimes" in facts["broken"]["error"] and "\n" not in facts["broken"]["error"]
    for report in (Path("out/report.md").read_text(), Path("out/report.html").read_text()):
        assert "broken failed: error:" in report and "warmup_steps 50" in report
    assert {path.parts[1] for path in Path("out").glob("*/evaluations/steps_2/fid.json")} == {"plain", "teacher"}
    done = len(forked.commands)
    assert held("--budget", "28ev") == 1
    assert [words[0] for words in forked.commands[done:]] == ["-m", str(TOOLS / "compare.py")], "the broken one's trial alone"
    assert held("--budget", "29ev") == 2
    assert "is a tournament with budget 28ev, not 29ev; give another folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words, error",
    [
        (["--teacher", "nowhere"], "--teacher nowhere: holds no diffusers model; make one: python -m distill fit"),
        (["--configs", "no.yaml"], "--configs no.yaml: there is no such file"),
        (["--configs", "plain.yaml", "plain.yaml"], "--configs plain.yaml: another run has its name"),
        (["--num", "1"], "--num 1: give at least 2"),
        (["--steps", "0"], "--steps 0: give at least 1"),
    ],
)
def test_what_cannot_be_held_is_refused_before_it_begins(folder, capsys, monkeypatch, words, error):
    monkeypatch.setattr(contest, "subprocess", SimpleNamespace(run=lambda *_, **__: pytest.fail("nothing is to be started")))
    assert held("--budget", "28ev", *words) == 2
    assert error in capsys.readouterr().err and not Path("out").exists()


def test_a_budget_below_one_update_is_reported(folder, monkeypatch, capfd):
    monkeypatch.setattr(contest, "subprocess", SimpleNamespace(run=Forked(folder)))
    assert held("--budget", "7ev", "--configs", "plain.yaml", "--dry-run") == 1
    assert "plain failed: --budget 7 evaluations: 1 updates cost 8; give more" in capfd.readouterr().err
    assert not Path("out/tournament.json").exists()
