"""Plans: what a turn keeps, its peak and its operations, counted on tensors without memory, are those of real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from script import load_script
from standins import write_standins
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from distill.cli import import_parts
from distill.denoiser import NetworkDenoiser
from distill.networks import families
from distill.networks.edm import EDM
from distill.plan.live_bytes import LiveBytes
from distill.plan.stand_ins import batch_for, put_stand_ins, sample_shape
from distill.plan.turns import Turn, measure_turn
from distill.schedules import RectifiedFlow, VarianceExploding

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
plan = load_script("plan")


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
    cond = {key: torch.zeros(size, 5, width) if key == "prompt_embeds" else torch.zeros(size, width)
            for key, width in denoiser.widths.items()}
    if denoiser.num_classes is not None:
        cond["labels"] = torch.zeros(size, dtype=torch.long)
    return torch.zeros(size, *shape), torch.full((size,), 0.5), cond


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd15", "dit", "edm"])
def test_planned_activations_are_those_that_saved_tensor_hooks_see(name: str, checkpointing: bool) -> None:
    """Measured by autograd's own hooks on real tensors: each storage that is not a parameter's, once."""
    denoiser = denoiser_of(name).train()
    if checkpointing:
        if name == "edm":
            pytest.skip("networks of diffusers alone have checkpoints")
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny overrides find their teachers."""
    root = tmp_path_factory.mktemp("plan")
    write_standins(root / "runs/tiny")
    import_parts()
    return root


def turns(method: Any, batch: Callable[[], Any]) -> list[Turn]:
    """A turn of each player."""
    players = method.players()
    return [measure_turn(method, players, index, batch(), torch.bfloat16) for index in range(len(players))]


@pytest.mark.parametrize("name", ["sd15/lcm_lora", "sdxl/dmd2_4step"])
def test_planned_turns_are_those_of_the_real_method(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations, operations and the moment of the peak are equal, bytes within 2 percent."""
    monkeypatch.chdir(folder)
    recipe = CONFIGS / f"{name}.yaml"
    words = ["--config", str(recipe), "--config", str(recipe.with_suffix(".tiny.yaml"))]
    parsed = plan.Planned([plan.NO_DATA, *words], run=False)
    real, planned = parsed.build(weights=True), parsed.build()
    shape = sample_shape(real.student)
    torch.manual_seed(0)
    expected = turns(real, lambda: batch_for(real, 2, shape))
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_stand_ins(planned)
        found = turns(planned, lambda: batch_for(planned, 2, shape))
    for own, other in zip(found, expected, strict=True):
        assert (own.player, own.evaluations, own.when) == (other.player, other.evaluations, other.when)
        assert own.flops == other.flops > 0
        assert own.peak == pytest.approx(other.peak, rel=0.02) and own.activations == pytest.approx(other.activations, rel=0.02)
    assert found[0].evaluations["student"] >= 2 and found[0].kept["student"] > 0
