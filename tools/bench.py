"""What a method's training step costs beside a bare loop that makes the same network evaluations and nothing else.

    python tools/bench.py --method consistency --steps 40

Methods: ``consistency`` (configs/digits/cd.yaml), ``sid`` and ``dmd2`` (configs/digits/sid.yaml, dmd2.yaml) on the digits
network. The two are timed in one process, in turn, batch by batch: between two batches of the real Trainer (data, loop, losses,
clipping, optimiser, averages) one bare step of the same player is made and timed apart. Nothing is written to loggers. The peak
memory is the process's, the bare loop's networks included. With ``--ranks 2`` it is measured instead how training scales to two
processes, and what share of their time is communication (``bench_ranks.py``).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from datamodules.digits import DigitsDataModule
from distill.adversarial import Adversarial
from distill.command_line import Parser
from distill.denoiser import NetworkDenoiser
from distill.discriminators import ConvolutionalDiscriminator
from distill.distances import PseudoHuber
from distill.evaluation import Evaluation
from distill.features import features_of
from distill.few_step import FewStepSampler
from distill.gradients import frozen_parameters
from distill.grids import ConstantPoints, UniformGrid
from distill.methods.base import Method
from distill.methods.consistency import Consistency
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.fake_score import FakeScore
from distill.methods.score_identity import ScoreIdentity
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.schedules import RectifiedFlow
from distill.solvers import Heun
from distill.times import KarrasTimes, LogNormalTimes, UniformTimes
from distill.types import Batch
from distill.weights import KarrasWeight, PredictionWeight


def denoiser() -> NetworkDenoiser:
    """The digits network."""
    return NetworkDenoiser(UNet2D(channels=(32, 64), layers_per_block=1), RectifiedFlow(), "flow")


STEPS = {"fused": dict(fused=True), "foreach": dict(foreach=True), "loop": dict(foreach=False)}
"""How Adam goes through the parameters: in one kernel, operation by operation on all of them, or one after the other."""


def optimization_of(arguments: argparse.Namespace) -> Optimization:
    """The default but for what was asked."""
    step = STEPS[arguments.optimizer]
    return Optimization(
        lambda parameters: torch.optim.Adam(parameters, lr=3e-4, **step),
        compile=arguments.compile,
        channels_last=arguments.channels_last,
    )


def one_step(optimization: Optimization, **settings: Any) -> dict[str, Any]:
    """What the score distillations share."""
    return dict(teacher=denoiser(), optimization=optimization, evaluation=Evaluation(steps=[1]), **settings)


def consistency(optimization: Optimization) -> Consistency:
    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)),
        PseudoHuber(),
        optimization,
        Evaluation(),
        student=denoiser(),
        teacher=denoiser(),
        solver=Heun(),
    )


def sid(optimization: Optimization) -> ScoreIdentity:
    return ScoreIdentity(
        sampler=FewStepSampler(sigmas=[2.5]),
        times=KarrasTimes(high=0.8),
        fake_score=FakeScore(LogNormalTimes(), KarrasWeight(), optimization),
        **one_step(optimization),
    )


def dmd2(optimization: Optimization) -> DistributionMatching:
    return DistributionMatching(
        sampler=FewStepSampler(times=[1.0], start="prior"),
        times=UniformTimes(0.02, 0.98),
        fake_score=FakeScore(UniformTimes(), PredictionWeight("flow"), optimization, steps=2),
        adversarial=Adversarial(UniformTimes()),
        **one_step(optimization),
    )


class BareLoop(nn.Module):
    """The network evaluations of a method's turns on networks of its own, and their gradients.

    Args:
        method: says which method's.
    """

    def __init__(self, method: str):
        super().__init__()
        self.method = method
        self.student, self.teacher, self.fake = denoiser(), denoiser().requires_grad_(False).eval(), denoiser()
        reader = ConvolutionalDiscriminator()
        self.head = reader.build(self.fake.network.bottleneck(reader.layer))  # type: ignore[operator]

    def step(self, turn: int, batch: Batch) -> None:
        """The evaluations of one batch, ``turn`` 0 the student's and 1 the critic's, and the backward pass."""
        x, t = batch.x0, torch.full((len(batch),), 0.5, device=next(self.parameters()).device)
        loss = getattr(self, f"{self.method}_{('student', 'critic')[turn]}")(x, t, batch.cond)
        loss.backward()
        self.zero_grad(set_to_none=True)

    def consistency_student(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with torch.no_grad():
            for network in (self.teacher, self.teacher, self.student):
                network(x, t, cond)
        return self.student(x, t, cond).square().mean()

    def sid_student(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        sample = self.student(x, t, cond)
        with frozen_parameters(self.fake):
            return (self.teacher(sample, t, cond) * self.fake(sample, t, cond)).mean()

    def sid_critic(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with torch.no_grad():
            sample = self.student(x, t, cond)
        return self.fake(sample, t, cond).square().mean()

    def dmd2_student(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        sample = self.student(x, t, cond)
        with torch.no_grad():
            direction = self.teacher(sample, t, cond) - self.fake(sample, t, cond)
        with frozen_parameters(self.fake), frozen_parameters(self.head):
            logits = self.head(features_of(self.fake, sample, t, cond))
        return (direction * sample).mean() + logits.mean()

    def dmd2_critic(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        with torch.no_grad():
            sample = self.student(x, t, cond)
        both = {key: torch.cat([value, value]) for key, value in cond.items()}
        logits = self.head(features_of(self.fake, torch.cat([sample, x]), t.repeat(2), both))
        return self.fake(sample, t, cond).square().mean() + logits.mean()


METHODS: dict[str, Callable[[Optimization], Method]] = {"consistency": consistency, "sid": sid, "dmd2": dmd2}


class BareSteps(Callback):
    """Makes one bare step before each batch, and keeps the times of both and whose turn it was.

    Args:
        bare: what is made beside the method's steps.
        clock: gives seconds.
    """

    def __init__(self, bare: BareLoop, clock: Callable[[], float] = time.perf_counter):
        self.loop, self.clock = bare, clock
        self.turns: list[int] = []
        self.bare: list[float] = []
        self.method: list[float] = []
        self.bare_ended = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        began = self.now(pl_module)
        if self.bare_ended:
            self.method.append(began - self.bare_ended)
        self.turns.append(pl_module.turn(pl_module.batches_seen))
        self.loop.step(self.turns[-1], batch)
        self.bare_ended = self.now(pl_module)
        self.bare.append(self.bare_ended - began)

    def now(self, pl_module: Any) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def main() -> None:
    """Prints one JSON line."""
    parser = Parser(__doc__)
    parser.add_argument("--method", choices=METHODS, default="consistency")
    parser.add_argument("--steps", type=int, default=40, help="batches that are timed")
    parser.add_argument("--warmup", type=int, default=6, help="batches before them")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--optimizer", choices=STEPS, default="fused", help="how Adam goes through the parameters")
    parser.add_argument("--channels-last", action="store_true", help="optimization.channels_last; the bare loop is as ever")
    parser.add_argument("--compile", action="store_true", help="optimization.compile; the bare loop is as ever")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that is not idle; one rank")
    parser.add_argument("--ranks", type=int, default=1, help="more than 1: how training scales to so many processes")
    arguments = parser.parse_args()
    if arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: give 1 or more.")
    if arguments.cpu_time and (arguments.ranks > 1 or torch.cuda.is_available()):
        parser.error("--cpu-time: it does not see the waiting for other ranks or a GPU; leave it out.")
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.ranks > 1:
        report_scaling(arguments)
        gc.collect()  # gloo's threads end before Python does, which they might abort (see `distill.cli.run`)
        return
    timer = BareSteps(BareLoop(arguments.method), time.process_time if arguments.cpu_time else time.perf_counter)
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
    method = METHODS[arguments.method](optimization_of(arguments))
    timer.loop.to(trainer.strategy.root_device)
    trainer.fit(method, datamodule=DigitsDataModule(arguments.batch_size))
    report(arguments, timer, method)


def report_scaling(arguments: argparse.Namespace) -> None:
    """One line of JSON, of rank zero; see `bench_ranks`."""
    from bench_ranks import scaling

    def build() -> Method:
        return METHODS[arguments.method](optimization_of(arguments))

    found = scaling(build, arguments.ranks, arguments.steps, arguments.warmup, arguments.batch_size)
    if found:
        print(json.dumps(vars(arguments) | found | {"torch": torch.__version__}))


def report(arguments: argparse.Namespace, timer: BareSteps, method: Method) -> None:
    """One line of JSON: medians over the timed batches of each player, and of the ratios of neighbours over all."""
    first = arguments.warmup
    rows = list(zip(timer.turns[first:-1], timer.bare[first:-1], timer.method[first:], strict=True))
    players = {name: [row for row in rows if row[0] == turn] for turn, name in enumerate(("student", "critic"))}
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                **vars(arguments),
                "parameters": sum(parameter.numel() for parameter in method.student.parameters()),
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "steps": len(rows),
                **{f"{name}_ms": median_ms(own for _, _, own in part) for name, part in players.items() if part},
                **{f"bare_{name}_ms": median_ms(bare for _, bare, _ in part) for name, part in players.items() if part},
                "ratio": round(statistics.median(own / bare for _, bare, own in rows), 3),
                "peak_memory_mib": round(peak / 2**20),
                "torch": torch.__version__,
            }
        )
    )


def median_ms(seconds: Any) -> float:
    """Median in milliseconds."""
    return round(1000 * statistics.median(seconds), 2)


if __name__ == "__main__":
    main()
