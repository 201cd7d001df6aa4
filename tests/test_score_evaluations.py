"""What a turn of score distillation evaluates: which networks, on how many rows, and what each is differentiated in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import fit
from pytorch_lightning import Callback
from score_methods import BATCHES, CFG, method
from torch import Tensor, nn

from distill.distances import SquaredDistance
from distill.divergences import FDivergence
from distill.guidance import RandomGuidance
from distill.lora import LoRA
from distill.methods.score_distillation import ScoreDistillation


class Call:
    """One evaluation of a network, from its beginning to what its backward pass reached."""

    def __init__(self, name: str, rows: int, time: float):
        self.name, self.rows, self.time = name, rows, time
        self.finished = self.graph = self.trained = False
        self.inputs = self.outputs = 0

    def __str__(self) -> str:
        got = [word for word, found in (("input", self.inputs), ("parameters", self.outputs and self.trained)) if found]
        assert self.inputs <= 1 and self.outputs <= 1, "one backward pass"
        assert self.graph == bool(got), "a graph is built where gradients pass and nowhere else"
        return f"{self.name} {self.rows} {'+'.join(got) or 'none'}{'' if self.finished else ' to the bottleneck'}"


class Calls(Callback):
    """The evaluations of student, teacher and fake score in each turn, in order."""

    def __init__(self) -> None:
        self.turns: list[list[Call]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name, denoiser in (("student", pl_module.student), ("teacher", pl_module.teacher), ("fake", pl_module.fake)):
            network = denoiser.network
            network.register_forward_pre_hook(partial(self.begin, name))
            network.model.down_blocks[-1].register_forward_hook(self.encoded)
            network.register_forward_hook(self.end)

    def on_train_batch_start(self, *others: Any) -> None:
        self.turns.append([])

    def begin(self, name: str, network: nn.Module, inputs: Any) -> None:
        x, time = inputs[:2]
        call = Call(name, len(x), float(time[0]))
        call.trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())
        self.turns[-1].append(call)
        if x.requires_grad:
            x.register_hook(lambda gradient: setattr(call, "inputs", call.inputs + 1))

    def encoded(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        call = self.turns[-1][-1]
        if output[0].requires_grad:
            call.graph = True
            output[0].register_hook(lambda gradient: setattr(call, "outputs", call.outputs + 1))

    def end(self, *others: Any) -> None:
        self.turns[-1][-1].finished = True


IDENTITY = ["student 4 parameters", "teacher 4 input", "fake 4 input"]
MATCHING = ["student 4 parameters", "teacher 4 none", "fake 4 none"]
FAKE = ["student 4 none", "fake 4 parameters"]
EVALUATIONS: dict[str, tuple[Callable[[], ScoreDistillation], list[str], list[str]]] = {
    "SiD": (partial(method, "sid"), IDENTITY, FAKE),
    "SiD-LSG": (
        partial(method, "sid", guidance=CFG, fake_guidance="teacher", fake={"guidance": CFG, "null_probability": 0.1}),
        ["student 4 parameters", "teacher 8 input", "fake 8 input"],
        ["student 4 none", "fake 8 parameters"],
    ),
    "SiDA": (partial(method, "sida"), IDENTITY, [*FAKE, "fake 4 parameters to the bottleneck"]),
    "SIM": (partial(method, "sim"), IDENTITY, FAKE),
    "SIM, guided teacher": (
        partial(method, "sim", guidance=CFG),
        ["student 4 parameters", "teacher 8 input", "fake 4 input"],
        FAKE,
    ),
    "Diff-Instruct": (partial(method, "vsd", weight=None, shared_dropout=True), MATCHING, FAKE),
    "SwiftBrush": (
        partial(method, "vsd", guidance=CFG, fake_guidance="teacher", fake={"lora": LoRA(2)}),
        ["student 4 parameters", "teacher 8 none", "fake 8 none"],
        FAKE,
    ),
    "PG-SB": (
        partial(method, "vsd", guidance=RandomGuidance(0.5, 4.0), fake_guidance="teacher"),
        ["student 4 parameters", "teacher 8 none", "fake 8 none"],
        FAKE,
    ),
    "DMD": (
        partial(method, "vsd", normalize=True, regression=SquaredDistance()),
        ["student 8 parameters", "teacher 4 none", "fake 4 none"],
        FAKE,
    ),
    "DMD2": (
        partial(method, "dmd2", guidance=CFG),
        ["student 4 parameters", "teacher 8 none", "fake 4 none", "fake 4 input to the bottleneck"],
        [*FAKE, "fake 8 parameters to the bottleneck"],
    ),
    "f-distill": (
        partial(method, "dmd2", divergence=FDivergence("forward_kl")),
        [*MATCHING, "fake 4 input to the bottleneck"],
        [*FAKE, "fake 8 parameters to the bottleneck"],
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_turn_evaluates_what_the_mathematics_needs_and_no_more(name: str):
    """Forwards by network, rows and gradient mode; a mode is what the backward pass reached."""
    build, generator, fake = EVALUATIONS[name]
    calls = Calls()
    fit(build(), BATCHES, 4, calls)
    assert [[str(call) for call in turn] for turn in calls.turns] == [fake, generator, fake, generator]


def test_earlier_steps_of_the_generator_cost_a_forward_each_without_graph():
    """At the trained times, in order; after them a turn is that of a one-step generator."""
    times, calls, counts = (1.0, 0.7, 0.3), Calls(), []
    fit(method("sid", times), BATCHES, 16, calls)
    for number, turn in enumerate(calls.turns):
        steps = [call for call in turn if call.name == "student"]
        expected = (FAKE, IDENTITY)[number % 2]
        assert [str(call) for call in turn] == ["student 4 none"] * (len(steps) - 1) + expected
        assert [call.time for call in steps] == pytest.approx([1000 * time for time in times[: len(steps)]])
        counts.append(len(steps))
    assert set(counts[::2]) == set(counts[1::2]) == {1, 2, 3}, "both players train on every number of steps"
