"""What a network call is differentiated in, and that no graph is built for anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SHAPE, small
from torch import Tensor, nn

from distill.denoiser import Denoiser
from distill.gradients import evaluate, frozen_parameters

MODES = {"none": (False, False), "parameters": (True, False), "input": (False, True), "both": (True, True)}
"""Which of (parameters, input) get a gradient."""


def inputs(count: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    return x, torch.linspace(0.2, 0.9, count)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_what_was_asked_for_and_nothing_else(mode: Any):
    denoiser, (x, t) = small(), inputs()
    value = evaluate(mode, denoiser, x, t, {})
    assert torch.equal(value, denoiser(x, t, {}))
    of_parameters, of_input = MODES[mode]
    assert value.requires_grad is (of_parameters or of_input)
    if value.requires_grad:
        value.square().sum().backward()
    assert (x.grad is not None) is of_input
    assert all((parameter.grad is not None) is of_parameters for parameter in denoiser.parameters())
    assert all(parameter.requires_grad for parameter in denoiser.parameters())


@pytest.mark.parametrize("mode", ["parameters", "input"])
def test_gradients_are_those_of_the_plain_call(mode: Any):
    denoiser, (x, t) = small(), inputs()
    wanted: list[Tensor] = [x] if mode == "input" else list(denoiser.parameters())
    expected = torch.autograd.grad(denoiser(x, t, {}).sin().sum(), wanted)
    found = torch.autograd.grad(evaluate(mode, denoiser, x, t, {}).sin().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_no_more_is_kept_for_the_backward_pass_than_the_mode_needs(mode: Any):
    """A product of input and parameter keeps for each of the two gradients the other factor."""

    class Product(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Any, t: Any, cond: Any, r: Any = None) -> Any:
            return x * self.factor

    saved: list[Tensor] = []
    denoiser, (x, t) = Product(), inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        evaluate(mode, denoiser, x, t, {})
    sample, factor = (any(value.shape == shape for value in saved) for shape in (x.shape, ()))
    assert (sample, factor) == MODES[mode]


def test_a_call_that_fails_leaves_parameters_as_they_were():
    denoiser = small()
    with pytest.raises(RuntimeError, match="broken"), frozen_parameters(denoiser):
        assert not any(parameter.requires_grad for parameter in denoiser.parameters())
        raise RuntimeError("broken")
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
