"""What sharded networks do on several ranks, one function a scenario: run as ``sharded_runs.py FOLDER``, which leaves in the
folder what every rank of two, then of four, has found; and the same run in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import score_methods
import torch
from families import FAMILIES
from helpers import closest, evaluation, everything, fit, joined, of_part
from pytorch_lightning import Callback, Trainer
from score_methods import adam
from sharded_ranks import DrawsOfRanks, fork_ranks
from tiny_run import write_recipe
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import distill.strategies  # noqa: F401  the names of strategies
from distill import cli
from distill.callbacks.export import ExportDenoiser
from distill.checkpoints import AtomicCheckpointIO, read_checkpoint
from distill.denoiser import NetworkDenoiser
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.methods.consistency import Consistency
from distill.networks.edm import EDM
from distill.networks.families import FAMILIES as WRAPPERS
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization, PlayerOptimization, clip_gradients
from distill.pairs import GridPairs
from distill.pretrained import PretrainedDenoiser
from distill.schedules import RectifiedFlow
from distill.sharding import check_equal_batches, gathered, local, shard
from distill.solvers import Heun
from distill.types import Batch

ROWS = 8
RESUMED = ("dmd2",)


def teacher() -> NetworkDenoiser:
    """A U-Net of one level, with attention, on 4x4 samples of two classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet2D(1, 4, 2, (8,), 1, (True,), heads_width=8, groups=4)
    return NetworkDenoiser(network, RectifiedFlow(), "flow")


def consistency(accumulate: int = 1, **settings: Any) -> Consistency:
    optimization = Optimization(adam, averaging=DecayAveraging(0.9), accumulate_batches=accumulate)
    pairs = GridPairs(UniformGrid(), ConstantPoints(8))
    parts = {"teacher": teacher(), "solver": Heun(), "target": DecayAveraging(0.9), **settings}
    return Consistency(pairs, SquaredDistance(), optimization, evaluation(), **parts)


def distribution_matching() -> Any:
    """Blocks compute their activations again in the backward pass."""
    own = {"gradient_checkpointing": True}
    fake = {"steps": 2, "optimization": PlayerOptimization(adam, **own)}
    student = Optimization(adam, averaging=DecayAveraging(0.9), **own)
    return score_methods.method("dmd2", teacher=teacher(), fake=fake, optimization=student)


METHODS: dict[str, Callable[..., Any]] = {
    "cd": consistency,
    "sid": lambda: score_methods.method("sid", teacher=teacher()),
    "dmd2": distribution_matching,
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
        ready = trained(kind, rank, 2, 20, strategy="ddp")
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


def across(rank: int, folder: Path) -> dict[str, Any]:
    """From step 10 of a sharded run on under DDP, and from there on sharded, the teacher in host memory, by a step each."""
    file = folder / "across.ckpt"
    trained("cd", rank, 2, 11, SaveAt(11, file), strategy="ddp", ckpt_path=folder / "cd.ckpt")
    ready = trained("cd", rank, 2, 12, strategy="fsdp2_offload", ckpt_path=file)
    method: Any = ready.lightning_module
    parts = {"teacher": method.teacher, "student": method.student, "ema": method.ema.module}
    return {"state": whole_state(ready), "hosted": [name for name, part in parts.items() if is_hosted(part.network)]}


def is_hosted(network: Any) -> bool:
    """Whether the rows of a sharded network are to lie in host memory."""
    groups = network._get_fsdp_state()._fsdp_param_groups
    return all(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params)


def accumulated(rank: int) -> dict[str, Any]:
    """Two steps of two batches each."""
    method, batches = consistency(2), [rows(number, rank, 2) for number in range(4)]
    return whole_state(fit(method, batches, 2, strategy="fsdp2", devices=2, precision="64-true"))


def sharded(network: nn.Module) -> nn.Module:
    shard([network], init_device_mesh("cpu", (2,)))
    return network


def clipped(rank: int) -> dict[str, Any]:
    """Norm and gradients, clipped to 0.1, of a network before and after it is sharded."""
    torch.manual_seed(0)
    network, data = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), torch.ones(2, 3)
    seen = {}
    for name in ("whole", "sharded"):
        if name == "sharded":
            sharded(network)
        network.zero_grad()
        network(data).sum().backward()
        norm = clip_gradients(list(network.parameters()), 0.1)
        seen[name] = {"norm": norm, **{key: gathered(value.grad, True) for key, value in network.named_parameters()}}
    return seen


def through_the_command_line(folder: Path, *words: str) -> int:
    """The exit code of a run of the tiny recipe, sharded."""
    recipe = ["--config", str(folder / "configs" / "tiny" / "cd.yaml"), "--trainer.strategy=fsdp2", "--trainer.devices=2"]
    sys.argv = ["distill"]
    try:
        cli.main(["fit", *recipe, "--trainer.logger=false", "--sample_grid.lines=1", "--ckpt_path=last", *words])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def preempted(folder: Path) -> list[int]:
    """A run, and one that is told to leave by a signal to rank one in its fourth step, and goes on."""
    signal = {"hook": "on_train_batch_start", "step": 3, "signal_name": "SIGTERM", "rank": 1}
    told = [f"--trainer.callbacks.init_args.{key}={value}" for key, value in signal.items()]
    whole, cut = (f"--trainer.default_root_dir={folder / name}" for name in ("whole", "cut"))
    runs = [[whole], [cut, "--trainer.callbacks=forked_ranks.SignalAt", *told], [cut]]
    return [through_the_command_line(folder, *words) for words in runs]


def uneven(rank: int) -> list[str]:
    """What is said where rank one has a batch of validation less, sharded and not."""
    said = []
    for module in (sharded(nn.Linear(2, 2)), nn.Linear(2, 2)):
        try:
            check_equal_batches(module, [3 - rank], "validation")
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


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
    frozen = teacher()
    frozen.frozen_dtype = torch.bfloat16
    method = consistency(teacher=frozen, student=teacher())
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
    torch.manual_seed(0)
    networks = {name: WRAPPERS[family.model_class].of(family.model()) for name, family in FAMILIES.items()}
    conditions = {name: family.cond(2)[0] for name, family in FAMILIES.items()}
    networks["edm"] = EDM(8, 3, None, "ddpmpp", 16, (1, 2), 1, (4,))
    for parameter in networks["edm"].parameters():  # its last layers are zero at first
        parameter.data.normal_(std=0.1)
    for name, network in networks.items():
        x = torch.randn(2, *network.native_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        results = []
        for form in (lambda network: network, sharded):
            output = form(network)(x, torch.tensor([0.1, 0.5]), conditions.get(name, {}))
            results.append((output.detach(), torch.autograd.grad(output.square().sum(), x)[0]))
        differences = [float((one - other).abs().max()) for one, other in zip(*results, strict=True)]
        seen[name] = (*differences, sum(isinstance(part, FSDPModule) for part in network.modules()))
    return seen


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    seen = trained_together(rank, folder) | {"bad": bad_on_one_rank(rank), "low precision": in_low_precision(rank)}
    seen |= {"across": across(rank, folder), "accumulated": accumulated(rank), "clipped": clipped(rank)}
    seen |= {"uneven": uneven(rank), "preempted": preempted(folder)}
    return seen | {"exported": exported(rank, folder), "families": families(rank)}


def on_four(rank: int, folder: Path) -> dict[str, Any]:
    """Goes on from step 10 of two ranks for four steps."""
    return {
        kind: whole_state(trained(kind, rank, 4, 14, strategy="fsdp2", ckpt_path=folder / f"{kind}.ckpt")) for kind in RESUMED
    }


if __name__ == "__main__":
    results = Path(sys.argv[1])
    write_recipe(results)
    cli.import_parts()
    built("dmd2")  # with what is imported only when it is needed
    fork_ranks(partial(on_two, folder=results), 2, results)
    fork_ranks(partial(on_four, folder=results), 4, results)
