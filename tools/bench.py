"""What a method's training step costs beside a bare loop that makes the same network evaluations and nothing else.

    python tools/bench.py --steps 40

Consistency distillation on the digits network: each step evaluates the teacher twice (Heun) and the target once without
gradient, and the student once forward and backward. The two are timed in one process, in turn, batch by batch: between two
batches of the real Trainer (data, loop, losses, clipping, optimiser, averages) one bare step is made and timed apart. Nothing
is written to loggers. The peak memory is the process's, the bare loop's two networks included.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import time
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

from datamodules.digits import DigitsDataModule
from distill.denoiser import NetworkDenoiser
from distill.distances import PseudoHuber
from distill.evaluation import Evaluation
from distill.methods.consistency import Consistency
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization
from distill.schedules import RectifiedFlow
from distill.solvers import Heun
from distill.times import ConstantPoints, GridPairs, UniformGrid
from distill.types import Batch


class BareSteps(Callback):
    """Makes one bare step before each batch, and keeps the times of both."""

    def __init__(self, student: UNet2D, teacher: UNet2D):
        self.student, self.teacher = student, teacher
        self.bare: list[float] = []
        self.method: list[float] = []
        self.bare_ended = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        began = self.now(pl_module)
        if self.bare_ended:
            self.method.append(began - self.bare_ended)
        x, time_input = batch.x0, torch.full((len(batch),), 500.0, device=pl_module.device)
        with torch.no_grad():
            for network in (self.teacher, self.teacher, self.student):
                network(x, time_input, batch.cond)
        self.student(x, time_input, batch.cond).square().mean().backward()
        self.student.zero_grad(set_to_none=True)
        self.bare_ended = self.now(pl_module)
        self.bare.append(self.bare_ended - began)

    @staticmethod
    def now(pl_module: Any) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def consistency_distillation(network: UNet2D, teacher: UNet2D) -> Consistency:
    """The method of configs/digits/cd.yaml on given networks."""
    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)),
        PseudoHuber(),
        Optimization(),
        Evaluation(),
        student=NetworkDenoiser(network, RectifiedFlow(), "flow"),
        teacher=NetworkDenoiser(teacher, RectifiedFlow(), "flow"),
        solver=Heun(),
    )


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    networks = [UNet2D(channels=(32, 64), layers_per_block=1) for _ in range(4)]
    timer = BareSteps(networks[2], networks[3])
    trainer = Trainer(
        max_steps=arguments.steps + arguments.warmup + 1,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        devices=1,
        use_distributed_sampler=False,
    )
    method = consistency_distillation(networks[0], networks[1])
    networks[2].to(trainer.strategy.root_device)
    networks[3].to(trainer.strategy.root_device)
    trainer.fit(method, datamodule=DigitsDataModule(arguments.batch_size))
    report(arguments, timer, method)


def report(arguments: argparse.Namespace, timer: BareSteps, method: Consistency) -> None:
    """One line of JSON: medians over the timed steps, and the median of the ratios of neighbours."""
    bare, steps = timer.bare[arguments.warmup : -1], timer.method[arguments.warmup :]
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "method": "consistency distillation, digits U-Net",
                "parameters": sum(parameter.numel() for parameter in method.student.parameters()),
                "batch_size": arguments.batch_size,
                "threads": arguments.threads,
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "steps": len(steps),
                "method_ms": round(1000 * statistics.median(steps), 2),
                "bare_ms": round(1000 * statistics.median(bare), 2),
                "ratio": round(statistics.median(own / other for own, other in zip(steps, bare, strict=True)), 3),
                "peak_memory_mib": round(peak / 2**20),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
