"""Plans: what follows for several devices, by hand; the tool's verdict and advice; the plan before a run's first step."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from score_methods import SHAPE, method
from script import load_script
from standins import write_standins
from tiny_run import write_recipe

from distill import cli
from distill.callbacks import memory_plan
from distill.checkpoints import read_checkpoint
from distill.cli import import_parts, main
from distill.plan.plan import Gathered, Plan, Work, make_plan
from distill.plan.states import States
from distill.plan.turns import VALIDATION, Turn

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
plan_tool = load_script("plan")


def by_hand(accumulate_batches: int = 1) -> Plan:
    """A teacher of 100 bytes, two players of 200 with Adam, a codec of 60, and one turn."""
    rows = {"teacher": States(100), "codec": States(60)}
    rows |= {"student": States(200, 200, 400, "student"), "fake score": States(200, 200, 400, "critic")}
    turn = Turn("student", flops=1000)
    turn.calls, turn.differentiated = Counter({"student": 1, "teacher": 2}), Counter({"student": 1})
    turn.peaks = Counter({"forward": 300, "backward": 500, "optimiser step": 240})
    turn.others = Counter({"forward": 300, "backward": 320, "optimiser step": 40})
    return Plan(rows, [turn], accumulate_batches, {"teacher": Gathered(50, 20), "student": Gathered(100, 30)})


def test_one_device_holds_all() -> None:
    peak = by_hand().peak()
    assert (peak.size, peak.turn, peak.phase) == (100 + 60 + 2 * 600 + 500, "student", "backward")
    states = by_hand()
    states.turns = []
    assert states.peak().size == 100 + 60 + 2 * 600 + 200 and states.peak(4, "fsdp2").size == 1300 / 4 + 60 + 200 / 4


def test_replicas_copy_all_gradients_into_buckets_and_sum_them() -> None:
    plan = by_hand()
    assert plan.peak(4, "ddp").size == plan.peak().size + 400
    assert plan.sent(plan.turns[0], 4, "ddp") == 2 * 3 / 4 * 200
    assert plan.sent(plan.turns[0], 1, "ddp") == 0


def test_shards_hold_a_part_and_gather_the_rest() -> None:
    """Each of four devices: a quarter of what is not the codec's, of the gradients and of the optimiser's scratch."""
    plan, turn = by_hand(), by_hand().turns[0]
    assert plan.lasting(4, "fsdp2") == (100 + 2 * 600) / 4 + 60
    peak = plan.peak(4, "fsdp2")
    assert (peak.size, peak.phase) == (plan.lasting(4, "fsdp2") + 320 + 200 / 4 + 30, "backward")
    # The student's weights for two passes, the teacher's for each of two calls, and the gradients.
    assert plan.sent(turn, 4, "fsdp2") == 3 / 4 * (2 * 100 + 2 * 50 + 200)


def test_a_step_of_several_batches_sends_replicas_gradients_once() -> None:
    once, twice = by_hand(), by_hand(2)
    turn = once.turns[0]
    assert twice.sent(turn, 4, "ddp") == once.sent(turn, 4, "ddp")
    assert twice.sent(turn, 4, "fsdp2") == 2 * once.sent(turn, 4, "fsdp2")
    assert twice.seconds(turn, 500.0, 100.0, 4, "fsdp2") == 2 * (1000 / 500 + 375 / 100)


def test_a_plan_has_the_turns_of_all_players_and_of_validation() -> None:
    of = method("sid")
    plan = make_plan(of, Work(4, 2, SHAPE, autocast=torch.bfloat16))
    assert [turn.player for turn in plan.turns] == ["student", "critic", VALIDATION]
    assert [turn.evaluations["student"] for turn in plan.turns] == [4, 4, 0]
    assert plan.turns[2].evaluations == {"average": 2} and plan.turns[2].kept.total() == 0
    network = sum(parameter.numel() for parameter in of.teacher.parameters())
    assert plan.gathered["student"].all == 2 * network  # in the type of autocast
    assert plan.rows["student"].weights == 4 * network
    assert make_plan(of, None).turns == [] and plan.shardable


# --------------------------------------------------------------------------------------------------------------- the tool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tiny overrides find their teachers."""
    write_standins(tmp_path / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    import_parts()
    return tmp_path


def said(capsys: pytest.CaptureFixture, name: str, *words: str) -> tuple[Any, list[str]]:
    """Exit code and lines of the tool on a recipe made tiny."""
    recipe = CONFIGS / f"{name}.yaml"
    with pytest.raises(SystemExit) as exit_info:
        plan_tool.main(["--config", str(recipe), "--config", str(recipe.with_suffix(".tiny.yaml")), *words])
    return exit_info.value.code, capsys.readouterr().out.strip().splitlines()


def test_the_tool_says_whether_a_run_fits_and_what_to_switch_on(folder: Path, capsys: pytest.CaptureFixture) -> None:
    off = "--model.init_args.optimization.gradient_checkpointing=false"
    code, lines = said(capsys, "sd15/lcm", "--memory=1", "--batch-size=16", off)
    assert code == 0 and lines[-1].endswith("of 1: fits"), lines
    assert [line.split("  ")[0] for line in lines[1:4]] == ["teacher", "student", "average"]
    code, lines = said(capsys, "sd15/lcm", "--memory=1e-6", "--batch-size=16", "--states", off)
    assert code == 1 and lines[-1].endswith("of 1e-06: does not fit")
    tried = [line.split(":")[0].removeprefix("with ") for line in lines if line.startswith("with ")]
    assert tried == ["one sample at a time in validation", "gradient checkpointing", "a batch of 1", "LoRA"]
    assert any(line.endswith("--model.init_args.optimization.gradient_checkpointing=true") for line in lines)


def test_sharding_is_taken_where_replicas_do_not_fit() -> None:
    arguments, _ = plan_tool.parse_arguments(["--config=x", "--memory=1", "--devices=4"])
    plan = by_hand()
    for memory, found in ((3000, ("ddp", True)), (1500, ("fsdp2", True)), (100, ("fsdp2", False))):
        arguments.memory = memory / 2**30
        assert plan_tool.least(plan, arguments) == found
    arguments.memory = 1500 / 2**30
    plan.shardable = False
    assert plan_tool.least(plan, arguments) == ("ddp", False)
    plan.shardable, arguments.strategy = True, "ddp"
    assert plan_tool.least(plan, arguments) == ("ddp", False)


# ------------------------------------------------------------------------------------------------------- before a run


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """The last checkpoint of a run of three steps, and what the callback said at which step."""
    heard: list[tuple[str, int]] = []
    trainers: list[Any] = []
    made = cli.DistillCLI.instantiate_trainer
    monkeypatch.setattr(
        cli.DistillCLI, "instantiate_trainer", lambda self, **settings: trainers.append(made(self, **settings)) or trainers[-1]
    )
    monkeypatch.setattr(memory_plan, "rank_zero_info", lambda text: heard.append((text, trainers[-1].global_step)))
    data = ["--data=SyntheticDataModule", "--data.init_args.shape=[1,8,8]", "--data.init_args.num_classes=10"]
    main(["fit", "--config", str(write_recipe(folder)), *data, "--trainer.max_steps=3", *words])
    return read_checkpoint(next(folder.rglob("last.ckpt"))), heard


def test_a_run_says_its_plan_before_the_first_step_and_the_measured_peak_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And changes no bit by it."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        planned, heard = run(tmp_path / "a", patch, "--plan.above_gib=0", f"--trainer.default_root_dir={tmp_path / 'a'}")
    assert [step for _, step in heard] == [0, 3]
    before, after = (text for text, _ in heard)
    assert re.search(r"^student +0.00", before, re.M) and re.search(r"^student .* (forward|backward) ", before, re.M)
    assert "planned peak" in before and "planned" in after and "measured" in after
    with monkeypatch.context() as patch:
        plain, nothing = run(tmp_path / "b", patch, f"--trainer.default_root_dir={tmp_path / 'b'}")
    assert nothing == []
    assert planned["state_dict"].keys() == plain["state_dict"].keys()
    assert all(torch.equal(value, plain["state_dict"][key]) for key, value in planned["state_dict"].items())


@pytest.mark.parametrize(("key", "value"), [("above_gib", -1.0), ("tflops", 0.0), ("bandwidth", -2.0)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}"):
        memory_plan.MemoryPlan(**{key: value})
