"""Networks sharded by FSDP2 over processes that are forked from this one and meet over gloo.

A run on two ranks is compared with one process on the joined batches, in which every rank's draws are made for its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import score_methods
import torch
from families import FAMILIES
from helpers import closest, evaluation, everything, fit, joined, of_part, same
from pytorch_lightning import Callback, Trainer
from score_methods import adam, teacher
from sharded_ranks import DrawsOfRanks, fork_ranks, found, run_alone
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import distill.strategies  # noqa: F401  names the strategy
from distill.callbacks.export import ExportDenoiser
from distill.checkpoints import AtomicCheckpointIO, read_checkpoint
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.lora import LoRA, start_student
from distill.methods.consistency import Consistency
from distill.networks.edm2 import EDM2
from distill.networks.families import FAMILIES as WRAPPERS
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.pretrained import PretrainedDenoiser
from distill.sharding import check_parts, check_whole, gathered, local, shard
from distill.solvers import Heun
from distill.types import Batch

ROWS = 8
RESUMED = ("cd", "dmd2")
UNUSED = "ddp_find_unused_parameters_true"


def consistency(**settings: Any) -> Consistency:
    pairs, optimization = GridPairs(UniformGrid(), ConstantPoints(8)), Optimization(adam, averaging=DecayAveraging(0.9))
    parts = {"teacher": teacher(dropout=0.0), "solver": Heun(), "target": DecayAveraging(0.9), **settings}
    return Consistency(pairs, SquaredDistance(), optimization, evaluation(), **parts)


METHODS: dict[str, Callable[[], Any]] = {
    "cd": consistency,
    "sid": lambda: score_methods.method("sid", teacher=teacher(dropout=0.0)),
    "dmd2": lambda: score_methods.method("dmd2", teacher=teacher(dropout=0.0), fake={"steps": 2}),
}


def built(kind: str) -> Any:
    """The method, with the same weights at every call: a discriminator's are drawn."""
    torch.manual_seed(0)
    return METHODS[kind]()


def rows(number: int, rank: int = 0, count: int = 1) -> Batch:
    """A rank's share of the eight rows of batch ``number``, in float64."""
    whole, share = joined(score_methods.batch(2 * number), score_methods.batch(2 * number + 1)), ROWS // count
    own = slice(rank * share, (rank + 1) * share)
    cond, null = ({key: value[own] for key, value in side.items()} for side in (whole.cond, whole.null))
    return Batch(whole.x0[own].double(), cond, null, whole.noise[own].double())


class SaveAt(Callback):
    """Saves after ``step`` steps."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


def trained(kind: str, rank: int, count: int, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    """A run in 64 bits on this rank's rows of six batches, again and again, with this package's checkpoint files."""
    batches = [rows(number, rank, count) for number in range(6)]
    settings = {"devices": count, "precision": "64-true", "plugins": [AtomicCheckpointIO(mapped=True)], **settings}
    return fit(built(kind), batches, steps, *callbacks, **settings)


def whole_state(trainer: Trainer) -> dict[str, Any]:
    return gathered(everything(trainer, trainer.lightning_module), True)


def alone(kind: str, ranks: int, steps: int, *callbacks: Callback, **settings: Any) -> dict[str, Any]:
    """The state that one process comes to on the joined batches with the draws of ``ranks``."""
    method = built(kind)
    with DrawsOfRanks(ranks, ROWS // ranks) as draws:
        batches = [rows(number) for number in range(6)]
        settings = {"precision": "64-true", "plugins": [AtomicCheckpointIO(mapped=True)], **settings}
        return everything(fit(draws.watch(method), batches, steps, *callbacks, **settings), method)


# --------------------------------------------------------------------- scenarios, each run by all ranks: rank -> findings


def trained_together(rank: int, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for kind in METHODS:
        ready = trained(kind, rank, 2, 20, SaveAt(10, folder / f"{kind}.ckpt"), strategy="fsdp2")
        seen[f"{kind}/fsdp2"], seen[f"{kind}/held"] = whole_state(ready), held(ready)
        ready = trained(kind, rank, 2, 20, strategy="ddp" if kind == "cd" else UNUSED)
        seen[f"{kind}/ddp"] = everything(ready, ready.lightning_module)
    return seen


def held(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """Numbers that this rank holds, and those there are, of each network and each optimiser; what it adds to a checkpoint."""
    method: Any = trainer.lightning_module
    parts = {"student": method.student, "ema": method.ema, "teacher": method.teacher}
    tensors = {name: list(part.parameters()) for name, part in parts.items()}
    for index, optimizer in enumerate(trainer.optimizers):
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors[f"optimizer.{index}"] = [value for value in states if value.dim()]
    assert all(isinstance(value, DTensor) for values in tensors.values() for value in values)
    counts = {name: (sum(local(v).numel() for v in vs), sum(v.numel() for v in vs)) for name, vs in tensors.items()}
    return counts | {"checkpoint": (len(trainer.strategy.lightning_module_state_dict()), len(method.state_dict()))}


def bad_on_one_rank(rank: int) -> dict[str, Any]:
    """NaN data on rank one in the second batch: the states before and after it."""
    states, batches = [], [rows(number, rank, 2) for number in range(2)]
    if rank == 1:
        batches[1].x0.fill_(float("nan"))
    for steps in (1, 2):
        ready = fit(consistency(), batches, steps, strategy="fsdp2", devices=2, precision="64-true")
        states.append(whole_state(ready))
    return {"before": states[0], "after": states[1]}


def in_low_precision(rank: int) -> dict[str, Any]:
    """The types in which blocks of the student and of a bfloat16 teacher see their weights, and those that are kept."""
    seen: dict[str, Any] = {}
    frozen = teacher(dropout=0.0)
    frozen.frozen_dtype = torch.bfloat16
    method = consistency(teacher=frozen, student=teacher(dropout=0.0))
    for name, denoiser in {"student": method.student, "teacher": method.teacher}.items():
        convolution = denoiser.network.model.up_blocks[0].resnets[0].conv1
        convolution.register_forward_pre_hook(lambda part, _, name=name: seen.update({f"{name} used": part.weight.dtype}))
    batches = [Batch(b.x0.float(), b.cond, b.null, b.noise.float()) for b in (rows(number, rank, 2) for number in range(2))]
    fit(method, batches, 2, strategy="fsdp2", devices=2, precision="bf16-mixed")
    seen |= {"student kept": next(method.student.parameters()).dtype, "teacher kept": next(method.teacher.parameters()).dtype}
    seen["finite"] = all(torch.isfinite(local(parameter)).all() for parameter in method.student.parameters())
    return seen


def exported(rank: int, folder: Path) -> float:
    """Difference between the exported average and the one in the last checkpoint; on rank one there is nothing to compare."""
    batches = [rows(number, rank, 2) for number in range(2)]
    saved = SaveAt(2, folder / "exported.ckpt")
    settings = {"plugins": [AtomicCheckpointIO(mapped=True)], "default_root_dir": folder, "strategy": "fsdp2", "devices": 2}
    fit(consistency(), batches, 2, ExportDenoiser(), saved, precision="64-true", **settings)
    if rank == 1:
        return 0.0
    network = PretrainedDenoiser(str(folder / "export")).network
    average = of_part(read_checkpoint(folder / "exported.ckpt")["state_dict"], "ema.module.network")
    own = {f"ema.module.network.{key}": value for key, value in network.state_dict().items()}
    return closest({key: value.float() for key, value in average.items()}, own)


def families(rank: int) -> dict[str, tuple[float, float, int]]:
    """Each family's network before and after it is sharded: differences of outputs and of input gradients; its units."""
    seen = {}
    mesh = init_device_mesh("cpu", (2,))
    for name, family in FAMILIES.items():
        network = WRAPPERS[family.model_class].of(family.model())
        x = torch.randn(2, family.channels, family.size, family.size, generator=torch.Generator().manual_seed(0))
        arguments = x.requires_grad_(), torch.tensor([10.0, 500.0]), family.cond(2)[0]
        results = []
        for sharded in (False, True):
            if sharded:
                shard([network], mesh)
            output = network(*arguments)
            results.append((output.detach(), torch.autograd.grad(output.square().sum(), x)[0]))
        differences = [float((one - other).abs().max()) for one, other in zip(*results, strict=True)]
        seen[name] = (*differences, sum(isinstance(part, FSDPModule) for part in network.modules()))
    return seen


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    seen = trained_together(rank, folder) | {"bad": bad_on_one_rank(rank), "low precision": in_low_precision(rank)}
    return seen | {"exported": exported(rank, folder), "families": families(rank)}


def on_four(rank: int, folder: Path) -> dict[str, Any]:
    """Goes on from step 10 of two ranks for four steps."""
    return {
        kind: whole_state(trained(kind, rank, 4, 14, strategy="fsdp2", ckpt_path=folder / f"{kind}.ckpt")) for kind in RESUMED
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every rank of two, then of four, leaves what it found, and two ranks their checkpoints of step 10."""
    folder = tmp_path_factory.mktemp("sharded")
    run_alone(__file__, folder)
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
    assert closest(alone(kind, 2, 20, ckpt_path=folder / f"{kind}.ckpt"), ranks[0][f"{kind}/fsdp2"]) < 1e-9


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_of_two_ranks_goes_on_on_four(folder, kind):
    expected = alone(kind, 4, 14, ckpt_path=folder / f"{kind}.ckpt")
    assert all(closest(found_by[kind], expected) < 1e-9 for found_by in found(folder, 4))


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


def test_a_network_that_changes_its_weights_is_refused_if_it_is_trained():
    network = EDM2(size=8, sample_size=8, in_channels=1, multipliers=(1,), blocks=1, attention=(), head_width=8)
    with pytest.raises(ValueError, match="EDM2 normalises its weights"):
        check_parts([network])
    check_parts([network.requires_grad_(False)])


def test_a_trained_weight_outside_of_networks_is_refused():
    with pytest.raises(ValueError, match="network.conv_in.weight is in no network"):
        check_whole(nn.ModuleDict({"network": nn.ModuleDict({"conv_in": nn.Linear(2, 2)})}))


if __name__ == "__main__":
    results = Path(sys.argv[1])
    fork_ranks(partial(on_two, folder=results), 2, results)
    fork_ranks(partial(on_four, folder=results), 4, results)
