"""Looks, before a job computes, at what would end it later: devices, the network between ranks, disk, files, shards, memory.

    srun python slurm/preflight.py --config configs/sd15/dmd2.yaml [--run FOLDER] [--key=value ...]

Every task runs it (slurm/train.sbatch has it done at the first start); rank zero says what was found, a line each: ``ok``,
``note``, or ``WRONG`` with the remedy. Ends with 1 if something is wrong, with 2 if the config is. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from distill.command_line import Parser

ROOT = Path(__file__).resolve().parents[1]
WAIT = timedelta(seconds=300)
GIB = 2**30
Finding = tuple[str, str]


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to the config."""
    parser = Parser(__doc__)
    parser.add_argument("--config", action="append", required=True, help="recipe; may be given repeatedly")
    parser.add_argument("--run", default="runs", help="the run folder, or another folder of the same file system")
    return parser.parse_known_args(argv)


class Ranks:
    """The tasks of this step, as SLURM numbers them; one, if there is no SLURM."""

    def __init__(self) -> None:
        self.rank, self.count, self.local, self.node = (
            int(os.environ.get(f"SLURM_{name}", default))
            for name, default in (("PROCID", "0"), ("STEP_NUM_TASKS", "1"), ("LOCALID", "0"), ("NODEID", "0"))
        )
        self.on_node = int(re.split(r"\D", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])  # of 8(x2), or 8,4
        self.cuda = torch.cuda.device_count()

    def connect(self) -> None:
        """Joins the ranks, over gloo. Raises RuntimeError within `WAIT` if one does not come."""
        port = os.environ.get("MASTER_PORT") or 15000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])
        address = f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{port}"
        distributed.init_process_group("gloo", address, timeout=WAIT, world_size=self.count, rank=self.rank)

    def all_reduce(self) -> Finding:
        """Whether a sum over all ranks comes out right: over gloo, or over NCCL where every rank has a GPU of its own."""
        backend = "nccl" if all(self.gather(self.cuda >= self.on_node)) else "gloo"
        device = f"cuda:{self.local}" if backend == "nccl" else "cpu"
        value = torch.tensor(self.rank + 1.0, device=device)
        distributed.all_reduce(value, group=distributed.new_group(backend=backend, timeout=WAIT))
        good = float(value) == self.count * (self.count + 1) / 2
        return "ok" if good else "WRONG", f"all-reduce: {self.count} ranks over {backend}"

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, on all ranks."""
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found


# ----------------------------------------------------------------------------------------------------- what all ranks see


def shared_folder(ranks: Ranks, run: Path) -> list[Finding]:
    """Whether what rank zero writes to the run folder is there for all, and how much fits. On every rank."""
    name = [""]
    if ranks.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        handle, name[0] = tempfile.mkstemp(prefix=".preflight", dir=run)
        os.close(handle)
    distributed.broadcast_object_list(name)
    try:
        seen = ranks.gather((socket.gethostname(), Path(name[0]).exists()))
    finally:
        if ranks.rank == 0:
            os.unlink(name[0])
    if blind := sorted({node for node, there in seen if not there}):
        return [("WRONG", f"disk: {run} of {socket.gethostname()} is not the one of {', '.join(blind)}; use a shared folder")]
    return [("ok", f"disk: {run} is seen by all ranks, {shutil.disk_usage(run).free / GIB:.1f} GiB are free")]


def devices(ranks: Ranks, accelerator: str) -> Iterator[Finding]:
    """Whether each task has a device. On every rank."""
    memory = torch.cuda.get_device_properties(0).total_memory if ranks.cuda else 0
    seen = ranks.gather((socket.gethostname(), ranks.cuda, ranks.node))
    nodes, least = len({node for *_, node in seen}), min(count for _, count, _ in seen)
    if accelerator == "cpu" or (accelerator == "auto" and not any(count for _, count, _ in seen)):
        yield "ok" if accelerator == "cpu" else "note", f"devices: no GPU; {ranks.count} ranks on {nodes} nodes compute on CPUs"
    elif least < ranks.on_node:
        node = next(name for name, count, _ in seen if count == least)
        remedy = "ask by --gpus-per-node (not --gpus-per-task, which hides the others), and --ntasks-per-node as many"
        yield "WRONG", f"devices: a task on {node} sees {least} GPUs, {ranks.on_node} tasks run on a node; {remedy}"
    else:
        yield "ok", f"devices: {ranks.count} ranks on {nodes} nodes, {least} GPUs each of {memory / GIB:.0f} GiB"


# -------------------------------------------------------------------------------------------------- what the config needs


def read_config(arguments: argparse.Namespace, rest: list[str]) -> Any:
    """The recipe, parsed and not built; exits with 2 on a wrong one."""
    from distill.cli import import_parts

    sys.path.append(str(ROOT / "tools"))
    from fetch import _Parsed  # the same reading, of the same parts

    import_parts()
    return _Parsed([word for file in arguments.config for word in ("--config", file)] + rest, run=False)


def offline_files(config: Any) -> Iterator[Finding]:
    """Whether all pretrained weights are there."""
    from fetch import pretrained_parts, provide

    parts = [(key, *provide(part, given, only_list=True)) for key, part, given in pretrained_parts(config)]
    missing = [(key, " ".join(text.split())) for key, state, text in parts if state == "missing"]
    for key, reason in missing:
        yield "WRONG", f"files: {key}: {reason}"
    yield "ok" if not missing else "note", f"files: {len(parts) - len(missing)} of {len(parts)} pretrained parts are there"


def build(parsed: Any) -> tuple[Any, Any]:
    """Method and data module of a recipe; raises SystemExit, with the line that says why, if they cannot be built."""
    from distill.cli import DistillCLI

    parsed.instantiate_trainer = lambda: None  # all that a run builds but this
    DistillCLI.instantiate_classes(parsed)
    return parsed.model, parsed.datamodule


def shards(data: Any, readers: int) -> Iterator[Finding]:
    """How many shards there are for those who read them."""
    found = getattr(data, "files", None) or getattr(data, "shards", None)
    if not found:
        return
    few = len(found) < readers
    words = "; they share shards: more and smaller ones are read faster" if few else ""
    yield "note" if few else "ok", f"shards: {len(found)} for {readers} readers (ranks x workers){words}"


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(one): one for one in tensors}.values())


def memory(model: Any, ranks: Ranks, on_cpu: bool, run: Path, strategy: str) -> Iterator[Finding]:
    """A rough count of what a rank keeps: weights, averages, gradients, two moments. Activations come on top of it."""
    from distill.frozen import Frozen

    sharded = any(word in strategy.lower() for word in ("fsdp", "modelparallel", "deepspeed"))
    frozen = [module.module for module in model.modules() if isinstance(module, Frozen)]
    parts = [part for network in (model, *frozen) for part in (*network.parameters(), *network.buffers())]
    trained = bytes_of(value for value in model.parameters() if value.requires_grad)
    held = bytes_of(parts)
    need = held + 3 * trained
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.on_node
    if not on_cpu:
        room = torch.cuda.get_device_properties(ranks.local).total_memory
    words = f"weights and averages {held / GIB:.2f}, gradients and moments {3 * trained / GIB:.2f} GiB"
    if need > room and sharded:
        yield "note", f"memory: {words}, more than the {room / GIB:.1f} GiB of a rank, which has its share of them"
    elif need > room:
        remedies = "LoRA, a teacher in bfloat16, or --trainer.strategy=fsdp2"
        yield "WRONG", f"memory: {words}, a rank has {room / GIB:.1f} GiB: {remedies}"
    else:
        yield "ok", f"memory: {words} of {room / GIB:.1f} GiB a rank; tools/plan.py counts activations too"
    state = bytes_of([*model.parameters(), *model.buffers()]) + 2 * trained
    if 3 * state > shutil.disk_usage(run).free:
        yield "WRONG", f"disk: three checkpoints of {state / GIB:.1f} GiB do not fit into {run}; make room, or give another RUN"


def main(argv: list[str] | None = None) -> None:
    """Looks, and says what was found."""
    arguments, rest = parse_arguments(argv)
    ranks, run = Ranks(), Path(arguments.run).resolve()
    parsed = read_config(arguments, rest) if ranks.rank == 0 else None
    ranks.connect()
    accelerator = [str(parsed.config.trainer.accelerator) if parsed else ""]
    distributed.broadcast_object_list(accelerator)
    findings: list[Finding] = [ranks.all_reduce()]
    findings += [*devices(ranks, accelerator[0]), *shared_folder(ranks, run)]
    distributed.destroy_process_group()
    if parsed is None:
        return
    findings += offline_files(parsed.config)
    if not any(kind == "WRONG" for kind, _ in findings):
        model, data = build(parsed)
        findings += shards(data, ranks.count * max(getattr(data, "num_workers", 0), 1))
        on_cpu = accelerator[0] == "cpu" or not ranks.cuda
        findings += memory(model, ranks, on_cpu, run, str(parsed.config.trainer.strategy))
    for kind, text in findings:
        print(f"{kind:5}  {text}")
    sys.exit(int(any(kind == "WRONG" for kind, _ in findings)))


if __name__ == "__main__":
    main()
