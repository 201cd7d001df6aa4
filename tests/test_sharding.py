"""Networks sharded by FSDP2 over processes that meet over gloo (`sharded_runs.py`).

A run on two ranks is compared with one process on the joined batches, in which every rank's draws are made for its rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import resuming
import sharded_runs
import torch
from helpers import closest, everything, fit, of_part, same
from score_methods import adam
from sharded_ranks import DrawsOfRanks, found, run_alone
from sharded_runs import METHODS, RESUMED, ROWS, SaveAt, alone, built, consistency, rows, teacher
from torch import nn

from distill.callbacks.preemption import EXIT_PREEMPTED
from distill.checkpoints import read_checkpoint
from distill.cli import load_run
from distill.evaluation import Evaluation
from distill.lora import LoRA, start_student
from distill.methods.progressive import Progressive
from distill.networks.edm2 import EDM2
from distill.optimization import Optimization
from distill.sharding import check_parts, check_whole

LOADED = 1e-6
"""Unsharded, Lightning loads a checkpoint into 32 bits before it widens a module to 64."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every rank of two, then of four, leaves what it found, and two ranks their checkpoints of step 10."""
    folder = tmp_path_factory.mktemp("sharded")
    run_alone(str(sharded_runs.__file__), folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    return found(folder, 2)


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    """The states of one process after twenty steps."""
    return {kind: alone(kind, 2, 20) for kind in METHODS}


# ------------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("kind", METHODS)
def test_two_ranks_equal_one_process_on_the_joined_batches(ranks, references, kind, strategy):
    """In all that is saved: the student, the critic, averages, optimisers."""
    first, second = (found[f"{kind}/{strategy}"] for found in ranks)
    assert same(first, second)
    assert closest(first, references[kind]) < 1e-9
    untrained = {key: value.double() for key, value in built(kind).state_dict().items()}
    for part in ("student", "ema") + (() if kind == "cd" else ("critic",)):
        assert closest(of_part(first, part), of_part(untrained, part)) > 1e-3


@pytest.mark.parametrize("kind", METHODS)
def test_each_rank_holds_its_share_alone_and_rank_zero_gathers(ranks, kind):
    """Of every network, the frozen teacher and the average among them, and of the optimisers' states."""
    held_by = [found[f"{kind}/held"] for found in ranks]
    whole = held_by[0].pop("checkpoint"), held_by[1].pop("checkpoint")
    assert whole == ((whole[0][1], whole[0][1]), (0, whole[0][1]))
    for name, (_, total) in held_by[0].items():
        shares = [found[name][0] for found in held_by]
        assert sum(shares) == total and max(shares) < 0.6 * total


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_of_two_ranks_is_that_of_one_process(folder, ranks, kind):
    mine = folder / f"{kind}_alone.ckpt"
    alone(kind, 2, 10, SaveAt(10, mine))
    theirs, own = read_checkpoint(folder / f"{kind}.ckpt"), read_checkpoint(mine)
    assert closest(theirs["state_dict"], own["state_dict"]) < 1e-9
    for first, second in zip(theirs["optimizer_states"], own["optimizer_states"], strict=True):
        assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
        assert all(closest(first["state"][index], second["state"][index]) < 1e-9 for index in first["state"])


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(folder, ranks, kind):
    assert closest(alone(kind, 2, 20, ckpt_path=folder / f"{kind}.ckpt"), ranks[0][f"{kind}/fsdp2"]) < LOADED


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_of_two_ranks_goes_on_on_four(folder, kind):
    expected = alone(kind, 4, 14, ckpt_path=folder / f"{kind}.ckpt")
    assert max(closest(found_by[kind], expected) for found_by in found(folder, 4)) < LOADED


def test_a_run_goes_from_one_strategy_to_the_other(ranks):
    """Twelve steps, of which one was made under DDP and one with the teacher in host memory, are those of one process."""
    assert closest(ranks[0]["across"]["state"], alone("cd", 2, 12)) < LOADED
    assert all(found_by["across"]["hosted"] == ["teacher"] for found_by in ranks)


def test_gradients_of_several_batches_are_added_up(ranks):
    method, batches = consistency(2), [rows(number) for number in range(4)]
    with DrawsOfRanks(2, ROWS // 2) as draws:
        expected = everything(fit(draws.watch(method), batches, 2, precision="64-true"), method)
    assert closest(ranks[0]["accumulated"], expected) < 1e-9


def test_the_norm_is_that_of_the_whole_gradient_and_clips_it(ranks):
    for found_by in ranks:
        whole, sharded = found_by["clipped"]["whole"], found_by["clipped"]["sharded"]
        assert float(whole["norm"]) > 1 and closest(whole, sharded) < 1e-6
        clipped_norm = torch.stack([value.norm() for key, value in sharded.items() if key != "norm"]).norm()
        assert float(clipped_norm) == pytest.approx(0.1, rel=1e-4)


def test_a_run_that_is_told_to_leave_goes_on_to_the_same_weights(folder, ranks):
    """Also read by the tools, which build the run unsharded."""
    assert [found_by["preempted"] for found_by in ranks] == [[0, EXIT_PREEMPTED, 0]] * 2
    whole, cut = (read_checkpoint(folder / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"] == 12
    for key in ("state_dict", "optimizer_states", "random_states"):
        assert resuming.same(whole[key], cut[key]), key
    _, method, _ = load_run(folder / "cut")
    assert same(dict(method.state_dict()), cut["state_dict"])


def test_ranks_with_unequal_numbers_of_batches_are_refused(ranks):
    for found_by in ranks:
        assert "validation has [[3], [2]] batches on the ranks" in found_by["uneven"][0] and found_by["uneven"][1] == ""


def test_a_bad_batch_of_one_rank_is_skipped_by_all(ranks):
    for found_by in ranks:
        before, after = found_by["bad"]["before"], found_by["bad"]["after"]
        assert [int(state.pop("skipped.total")) for state in (before, after)] == [0, 1]
        assert [int(state.pop("skipped.in_a_row")) for state in (before, after)] == [0, 1]
        assert same(before, after)


def test_mixed_precision_gathers_bfloat16_and_keeps_float32(ranks):
    half, full = torch.bfloat16, torch.float32
    expected = {"student used": half, "student kept": full, "teacher used": half, "teacher kept": half, "finite": True}
    assert all(found_by["low precision"] == expected for found_by in ranks)


def test_the_average_of_a_sharded_run_is_exported(ranks):
    assert ranks[0]["exported"] < 1e-7


def test_sharded_networks_of_every_family_compute_the_same(ranks):
    for name, (output, gradient, units) in ranks[0]["families"].items():
        assert output < 1e-5 and gradient < 1e-4 and units > 1, name


def test_networks_that_share_weights_are_refused():
    student = start_student(frozen := teacher(), LoRA(rank=2, targets=["to_q"]))
    with pytest.raises(ValueError, match="fsdp2: model.* is shared by two networks"):
        check_parts([student.network, frozen.network])


@pytest.mark.parametrize("trained", [True, False])
def test_a_network_with_weights_without_rows_is_refused(trained):
    network = EDM2(size=8, sample_size=8, in_channels=1, multipliers=(1,), blocks=1, attention=(), head_width=8)
    with pytest.raises(ValueError, match="gain of EDM2 is a single number"):
        check_parts([network.requires_grad_(trained)])


def test_rounds_are_refused():
    """They would copy a sharded student."""
    settings = {"optimization": Optimization(adam), "evaluation": Evaluation(steps=[1])}
    with pytest.raises(ValueError, match="Progressive copies the student when a round ends"):
        Progressive(teacher(), 4, 1, 2, **settings).sharded_parts()


def test_a_trained_weight_outside_of_networks_is_refused():
    with pytest.raises(ValueError, match="network.conv_in.weight is in no network"):
        check_whole(nn.ModuleDict({"network": nn.ModuleDict({"conv_in": nn.Linear(2, 2)})}))
