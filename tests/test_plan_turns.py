"""Plans: what a turn keeps, its peak and its operations, counted on tensors without memory, are those of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from score_methods import SHAPE, adam, method
from torch import Tensor

from distill.denoiser import NetworkDenoiser
from distill.networks import families
from distill.networks.edm import EDM
from distill.optimization import Optimization
from distill.plan.live_bytes import LiveBytes
from distill.plan.stand_ins import batch_for, sample_shape, stand_in, widen_norms
from distill.plan.turns import Turn, measure_turn
from distill.schedules import RectifiedFlow, VarianceExploding


def test_live_bytes_of_a_chain_are_known_by_hand() -> None:
    """x W1 and its tanh, then W2: kept are the output of the tanh and the last; the first product is freed."""
    x, first, second = torch.zeros(10, 4), torch.zeros(4, 6), torch.zeros(6, 3)
    with LiveBytes([x, first, second]) as live:
        hidden = x @ first
        assert live.now == 10 * 6 * 4
        hidden = hidden.tanh()
        assert live.now == 10 * 6 * 4 and live.peaks[""] == 2 * 10 * 6 * 4
        view = hidden.t()  # no storage of its own
        output = view.t() @ second
        assert live.now == 10 * 6 * 4 + 10 * 3 * 4
        del hidden, view, output
        assert live.now == 0


def denoiser_of(name: str) -> NetworkDenoiser:
    """Tiny networks of three families, with some more width."""
    if name == "edm":
        return NetworkDenoiser(EDM(16, 3, 10, "ddpmpp", 32, (1, 2), 1, (8,)), VarianceExploding(), "edm")
    family = FAMILIES[name]
    return NetworkDenoiser(families.FAMILIES[family.model_class].of(family.model()), RectifiedFlow(), "flow")


def inputs(denoiser: NetworkDenoiser, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A batch of zeros that the network takes."""
    shape = sample_shape(denoiser)
    cond = {
        name: torch.zeros((size, 5, width) if name == "prompt_embeds" else (size, width))
        for name, width in denoiser.widths.items()
    }
    if denoiser.num_classes is not None:
        cond["labels"] = torch.zeros(size, dtype=torch.long)
    return torch.zeros(size, *shape), torch.full((size,), 0.5), cond


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("sd15", False), ("sd15", True), ("dit", False), ("dit", True), ("edm", False)]
)
def test_planned_activations_are_those_that_saved_tensor_hooks_see(name: str, checkpointing: bool) -> None:
    """Measured by autograd's own hooks on real tensors: each storage that is not a parameter's, once."""
    denoiser = denoiser_of(name).train()
    if checkpointing:
        denoiser.network.model.enable_gradient_checkpointing()  # type: ignore[union-attr, operator]
    own = {parameter.untyped_storage()._cdata for parameter in [*denoiser.parameters(), *denoiser.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            saved[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = denoiser(*inputs(denoiser, 3))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    with stand_in(denoiser) as copy:
        batch = inputs(copy, 3)
        with LiveBytes([*copy.parameters(), *copy.buffers()]) as live:
            output = copy(*batch)
            planned = live.now
    assert output.shape[0] == 3 and measured > 10_000
    assert planned == pytest.approx(measured, rel=0.2)


def turns(of: Any) -> list[Turn]:
    """Those of both players, on eight samples."""
    players = of.players()
    return [measure_turn(of, players, index, batch_for(of, 8, SHAPE)) for index in range(2)]


@pytest.mark.parametrize("kind", ["sid", "dmd2"])
def test_planned_turns_are_those_of_the_real_method(kind: str) -> None:
    """Evaluations, operations and the moment of the peak are equal, bytes within 2 percent."""
    real = method(kind)
    with stand_in(real) as planned:
        found = turns(planned)
    expected = turns(real)  # it trains
    for own, other in zip(found, expected, strict=True):
        assert (own.player, own.evaluations, own.when) == (other.player, other.evaluations, other.when)
        assert (own.calls, own.differentiated) == (other.calls, other.differentiated)
        assert own.flops == other.flops > 0
        for key in ("peak", "activations"):
            assert getattr(own, key) == pytest.approx(getattr(other, key), rel=0.02)
    generator, critic = found
    assert generator.evaluations["student"] == critic.evaluations["student"] == 8
    assert generator.evaluations["teacher"] == 8 and critic.evaluations["teacher"] == 0
    # In its own turn a network keeps what its backward pass needs; the student is only drawn from in the critic's.
    assert generator.kept["student"] > 0 and critic.kept["fake score"] > critic.kept["student"]
    assert generator.differentiated["student"] == 1 and critic.differentiated["student"] == 0
    assert critic.differentiated["fake score"] == (2 if kind == "dmd2" else 1)  # the discriminator reads its features


def test_gradients_are_told_from_what_else_lives() -> None:
    """All of them are there after the backward pass; where they are accumulated, when the last batch begins."""
    once, twice = method("sid"), method("sid", optimization=Optimization(adam, accumulate_batches=2))
    for of, early in ((once, False), (twice, True)):
        size = 4 * sum(parameter.numel() for parameter in of.student.parameters())
        with stand_in(of) as planned:
            turn = measure_turn(planned, planned.players(), 0, batch_for(planned, 8, SHAPE))
        own = {phase: turn.peaks[phase] - turn.others[phase] for phase in turn.peaks}
        assert own["forward"] == (size if early else 0) and own["averages"] == 0
        assert own["optimiser step"] == size >= own["backward"] >= (size if early else 0)


def test_under_the_autocast_of_an_accelerator_normalisations_take_32_bits() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GroupNorm(2, 8), torch.nn.Linear(8, 3))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = network[1](network[0](torch.zeros(2, 4))).dtype
        widen_norms(network)
        wide, product = network[1](network[0](torch.zeros(2, 4))).dtype, network(torch.zeros(2, 4)).dtype
    assert (narrow, wide, product) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_a_method_stays_as_it_is() -> None:
    """Its tensors, what it keeps in attributes, and torch's generator."""
    of = method("sid")
    before, state = dict(of.named_parameters()), torch.random.get_rng_state()
    of.sample_shape = SHAPE
    with stand_in(of) as planned:
        measure_turn(planned, planned.players(), 0, batch_for(planned, 2, SHAPE))
        assert not {id(p) for p in planned.parameters()} & {id(p) for p in of.parameters()}
        assert not {id(p) for p in planned.teacher.parameters()} & {id(p) for p in of.teacher.parameters()}
    after = dict(of.named_parameters())
    assert all(after[name] is value and value.grad is None for name, value in before.items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(value.requires_grad for value in of.student.parameters())
    measure_turn(of, of.players(), 0, batch_for(of, 2, SHAPE))  # nothing of the copy is left in it
