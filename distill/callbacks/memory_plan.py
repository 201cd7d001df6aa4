"""Before the first step: what the run will hold, compute and send (see `distill.plan`); at its end, the measured peak."""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_info

from distill.callbacks.throughput import peak_memory
from distill.methods.sampled import SampledModule
from distill.plan.plan import Peak, Plan, Strategy, Work, make_plan
from distill.plan.roles import tensors_by_role
from distill.plan.states import size_of
from distill.plan.table import GIB, described, states_table, turns_table


class MemoryPlan(Callback):
    """Rank zero says what `tools/plan.py` would, for the batch, the devices and the strategy of this run.

    It takes seconds for small networks and minutes for three of Stable Diffusion XL, in which the other ranks wait: a plan that
    `tools/plan.py` has made need not be made again.

    Args:
        above_gib: of runs whose networks hold less than so many GiB there is no plan; None for no plan at all.
        tflops: 1e12 operations that a device sustains a second.
        bandwidth: GB that a device sends to the others a second.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, above_gib: float | None = 1.0, tflops: float = 150.0, bandwidth: float = 100.0):
        if above_gib is not None and above_gib < 0:
            raise ValueError(f"above_gib={above_gib}: give 0 or more, or null for no plan.")
        for key, value in (("tflops", tflops), ("bandwidth", bandwidth)):
            if not value > 0:
                raise ValueError(f"{key}={value}: give a positive number.")
        self.above_gib, self.tflops, self.bandwidth = above_gib, tflops, bandwidth
        self.planned: Peak | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the plan of the method as it was built: before it is moved, or sharded."""
        self.planned = None
        if stage != "fit" or not trainer.is_global_zero or self.above_gib is None:
            return
        held = sum(size_of(tensor) for tensors in tensors_by_role(pl_module).values() for tensor in tensors)
        if held < self.above_gib * GIB:
            return
        began = time.perf_counter()
        plan = plan_of(trainer, pl_module)
        strategy: Strategy = "fsdp2" if isinstance(trainer.strategy, ModelParallelStrategy) else "ddp"
        self.planned = plan.peak(trainer.world_size, strategy)
        lines = states_table(plan)
        if plan.turns:
            rates = self.tflops * 1e12, self.bandwidth * 1e9
            lines += ["", *turns_table(plan, trainer.world_size, strategy, *rates)]
        words = described(self.planned, trainer.world_size, strategy)
        lines.append(f"planned {words} (in {time.perf_counter() - began:.1f} s)")
        rank_zero_info("\n".join(lines))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says the measured peak beside the planned one."""
        if self.planned is not None:
            device = trainer.strategy.root_device
            kind = "allocated" if device.type == "cuda" else "resident, the interpreter's included"
            measured = f"measured {peak_memory(device) / GIB:.2f} GiB of rank zero ({kind})"
            rank_zero_info(f"peak memory: planned {self.planned.size / GIB:.2f} GiB, {measured}")


def plan_of(trainer: Trainer, method: Any) -> Plan:
    """The plan of a run that is about to start; of states alone, if its data or its turns do not say enough."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    work, told = None, hasattr(data, "batch_size") and hasattr(data, "eval_batch_size")
    if isinstance(method, SampledModule) and told and not str(trainer.precision).startswith("64"):
        autocast = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        work = Work(
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            shape=method.sample_shape,
            trajectories=data.spec.trajectories,
            autocast=autocast,
            accelerator=trainer.strategy.root_device.type != "cpu",
        )
    try:
        return make_plan(method, work)
    except ValueError as error:
        rank_zero_info(f"states alone are planned: {error}")
        return make_plan(method, None)
