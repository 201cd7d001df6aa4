"""Plans: what a turn keeps, its peak and its operations, counted on tensors without memory, are those of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from score_methods import SHAPE, method
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.denoiser import NetworkDenoiser
from distill.networks import families
from distill.networks.edm import EDM
from distill.plan.live_bytes import LiveBytes
from distill.plan.stand_ins import batch_for, put_stand_ins, sample_shape
from distill.plan.turns import Turn, measure_turn
from distill.schedules import RectifiedFlow, VarianceExploding


def test_live_bytes_of_a_chain_are_known_by_hand() -> None:
    """x W1 and its tanh, then W2: kept are the output of the tanh and the last; the first product is freed."""
    x, first, second = torch.zeros(10, 4), torch.zeros(4, 6), torch.zeros(6, 3)
    with LiveBytes([x, first, second]) as live:
        hidden = x @ first
        assert live.now == 10 * 6 * 4
        hidden = hidden.tanh()
        assert live.now == 10 * 6 * 4 and live.peak[0] == 2 * 10 * 6 * 4
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
    with FakeTensorMode():
        put_stand_ins(denoiser)
        batch = inputs(denoiser, 3)
        with LiveBytes([*denoiser.parameters(), *denoiser.buffers()]) as live:
            output = denoiser(*batch)
            planned = live.now
    assert output.shape[0] == 3 and measured > 10_000
    assert planned == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("kind", ["sid", "dmd2"])
def test_planned_turns_are_those_of_the_real_method(kind: str) -> None:
    """Evaluations, operations and the moment of the peak are equal, bytes within 2 percent."""
    real, planned = method(kind), method(kind)

    def turns(of: Any) -> list[Turn]:
        players = of.players()
        return [measure_turn(of, players, index, batch_for(of, 8, SHAPE)) for index in range(2)]

    expected = turns(real)
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_stand_ins(planned)
        found = turns(planned)
    for own, other in zip(found, expected, strict=True):
        assert (own.player, own.evaluations, own.when) == (other.player, other.evaluations, other.when)
        assert own.flops == other.flops > 0
        for key in ("peak", "activations"):
            assert getattr(own, key) == pytest.approx(getattr(other, key), rel=0.02)
    generator, critic = found
    assert generator.evaluations["student"] == critic.evaluations["student"] == 8
    assert generator.evaluations["teacher"] == 8 and critic.evaluations["teacher"] == 0
    # In its own turn a network keeps what its backward pass needs; the student is only drawn from in the critic's.
    assert generator.kept["student"] > 0 and critic.kept["fake score"] > critic.kept["student"]
