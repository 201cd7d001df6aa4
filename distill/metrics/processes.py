"""The processes that measure together, on the CPU over gloo, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from distill.metrics.frechet import GaussianStatistics

WAIT = timedelta(hours=2)
"""For the slowest process: work is shared out beforehand, and pictures may be of another size."""


@dataclass(frozen=True)
class Processes:
    """This process, ``rank`` of ``size``. Alone, nothing is sent."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in each. Tensors of one shape."""
        if self.size == 1:
            return values
        values = values.cpu().clone()
        distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, in each; any objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def merge(self, statistics: GaussianStatistics) -> GaussianStatistics:
        """The statistics of all that the processes have seen; a process may have seen nothing."""
        if self.size == 1:
            return statistics
        width = max(self.gather(statistics.total.numel() if statistics.count else 0))
        if not statistics.count:
            zeros = torch.zeros(width, dtype=torch.float64)
            statistics = GaussianStatistics(total=zeros, outer=torch.outer(zeros, zeros))
        return GaussianStatistics(*(self.sum(part) for part in (statistics.count, statistics.total, statistics.outer)))

    def batches(self, count: int, size: int) -> list[range]:
        """Which of ``count`` images this process reads, in batches that are the same on any number of processes."""
        return [range(first, min(first + size, count)) for first in range(0, count, size)][self.rank :: self.size]

    def in_order(self, parts: Sequence[Any]) -> list[Any]:
        """What the processes made of their `batches`, in the order of the images, in each process."""
        shares = self.gather(list(parts))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]


ALONE = Processes()


def _environment() -> dict[str, int] | None:
    """Rank and size as torchrun or srun state them; None for a process that neither started."""
    names = os.environ
    if "RANK" in names and "WORLD_SIZE" in names:
        return {"rank": int(names["RANK"]), "size": int(names["WORLD_SIZE"])}
    if "SLURM_STEP_ID" in names and int(names.get("SLURM_NTASKS", 1)) > 1:
        return {"rank": int(names["SLURM_PROCID"]), "size": int(names["SLURM_NTASKS"])}
    return None


def own_device(device: str) -> str:
    """``cuda`` as the one of the node's devices that is this process's turn; any other device as it is."""
    if device != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{local % torch.cuda.device_count()}"


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of torchrun or srun, joined until the block ends; alone where neither started this one.

    Raises:
        RuntimeError: the others do not come.
    """
    found = _environment()
    if found is None or found["size"] == 1:
        yield ALONE
        return
    if "RANK" not in os.environ:  # srun says who is who, but names no meeting place
        from pytorch_lightning.plugins.environments import SLURMEnvironment

        nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
        os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ["SLURM_JOB_ID"][-4:])))
    distributed.init_process_group("gloo", timeout=WAIT, rank=found["rank"], world_size=found["size"])
    try:
        yield Processes(**found)
    finally:
        distributed.destroy_process_group()
