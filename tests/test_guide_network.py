"""The plug-and-play guide: no effect at first, on any family; what it adds goes to the right block, row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from distill.adapter_files import load_adapters, save_adapters
from distill.adapters.base import Values
from distill.adapters.guide_network import GuideNetwork, Injection
from distill.denoiser import NetworkDenoiser
from distill.networks.base import DiffusersNetwork
from distill.networks.families import FAMILIES as NETWORKS
from distill.networks.unet2d import UNet2D
from distill.schedules import RectifiedFlow
from distill.types import Cond

SETTINGS = GuideNetwork(width=16)
DECODERS = {
    "ddpm": ["up_blocks.0", "up_blocks.1"],
    "sd15": ["up_blocks.0", "up_blocks.1"],
    "dit": ["transformer_blocks.1"],
    "sd3": ["transformer_blocks.1"],
    "flux": ["single_transformer_blocks.0"],
    "sana": ["transformer_blocks.0"],
}


def wrapped(name: str) -> DiffusersNetwork:
    tiny = FAMILIES[name]
    return NETWORKS[tiny.model_class].of(tiny.model()).eval().requires_grad_(False)


def conditions(name: str, *scales: float) -> Cond:
    return {**FAMILIES[name].cond(2)[0], "guidance": torch.tensor(scales or (2.0, 5.0))}


def call(network: DiffusersNetwork, cond: Cond) -> Tensor:
    x = torch.randn(2, network.shape[0], 8, 8, generator=torch.Generator().manual_seed(1))
    return network(x, torch.tensor([20.0, 700.0]), cond)


def moved(adapter: Any) -> Any:
    """A trained adapter."""
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return adapter


@pytest.mark.parametrize("name", FAMILIES)
def test_without_effect_at_first_and_felt_when_trained(name):
    network, cond = wrapped(name), conditions(name)
    before, bits = call(network, cond), {key: value.clone() for key, value in network.state_dict().items()}
    adapter = network.add_adapter(SETTINGS)
    assert torch.equal(call(network, cond), before)
    assert "guidance" in NetworkDenoiser(network, RectifiedFlow()).scalar_inputs
    call(network, cond).square().sum().backward()
    assert all(injection.projection.weight.grad.any() for injection in adapter.injections.values())
    assert not any(parameter.requires_grad for parameter in network.model.parameters())
    adapter.zero_grad()
    moved(adapter)
    after = call(network, cond)
    after.square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters())
    # Flux dev embeds the guidance by itself: only the guide's part may differ there.
    other = call(network, conditions(name, 2.0, 4.0))
    assert torch.equal(after[0], other[0]) and not torch.allclose(after[1], other[1])
    assert not torch.allclose(after, before)
    network.detach_adapters()
    assert torch.equal(call(network, cond), before)
    assert all(torch.equal(value, bits[key]) for key, value in network.state_dict().items()) and not network.adapters


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_is_added_to(name):
    """Of one U-Net level or transformer block after the other: its output alone, by what the injection says."""
    network, cond = wrapped(name), conditions(name)
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda module, args, out: outputs.__setitem__(path, (out if isinstance(out, Tensor) else out[-1]).clone())

    for path in DECODERS[name]:
        network.model.get_submodule(path).register_forward_hook(keep(path))
    adapter = network.add_adapter(SETTINGS)
    assert [path.replace("-", ".") for path in adapter.injections] == DECODERS[name]
    injection, path = list(adapter.injections.values())[-1], DECODERS[name][-1]
    before, plain = call(network, cond), outputs[path]
    nn.init.constant_(injection.projection.bias, 0.5)
    later: list[Tensor] = []
    # This hook comes after the adapter's.
    network.model.get_submodule(path).register_forward_hook(
        lambda module, args, out: later.append(out if isinstance(out, Tensor) else out[-1])
    )
    assert not torch.equal(call(network, cond), before)
    assert torch.equal(outputs[path], plain), "what comes before is as it was"
    torch.testing.assert_close(later[0], plain + 0.5)


@pytest.mark.parametrize("kind", ["map", "smaller map", "tokens", "prompt and tokens"])
def test_a_map_is_added_place_by_place(kind):
    """Tokens stand row by row; a level of another size is spread."""
    injection = Injection(3, 2, 0, call=Values())
    nn.init.normal_(injection.projection.weight), nn.init.normal_(injection.projection.bias)
    level = torch.randn(2, 3, 2, 4) if kind != "smaller map" else torch.randn(2, 3, 1, 2)
    injection.call["0"] = level
    full = level if kind != "smaller map" else level.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.zeros(2, 2, 2, 4)
    for row in range(2):
        for column in range(4):
            expected[:, :, row, column] = injection.projection(full[:, :, row, column]).detach()
    if "tokens" in kind:
        start, prompt = torch.randn(2, 8, 2), torch.randn(2, 5, 2)
        found = injection.add(nn.Identity(), (), {}, (prompt, start) if "prompt" in kind else start)
        if "prompt" in kind:
            assert found[0] is prompt
            found = found[1]
        found = (found - start).transpose(1, 2).unflatten(2, (2, 4))
    else:
        start = torch.randn(2, 2, 2, 4)
        found = injection.add(nn.Identity(), (), {}, start) - start
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_condition_is_read():
    """Time, guidance, sample, prompt and pooled prompt; of a masked prompt only what the mask leaves."""
    network, cond = wrapped("sdxl"), conditions("sdxl")
    adapter = moved(network.add_adapter(SETTINGS))
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([20.0, 700.0])

    def level(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        adapter.read(x, time, cond)
        return adapter.call["0"]

    before = level(x, time, cond)
    assert not torch.allclose(level(x + 0.1, time, cond), before) and not torch.allclose(level(x, time + 5, cond), before)
    for key in ("prompt_embeds", "pooled_prompt_embeds", "guidance"):
        assert not torch.allclose(level(x, time, {**cond, key: cond[key] + 0.5}), before), key
    mask = torch.tensor([[1, 1, 0, 0, 0]]).repeat(2, 1)
    masked = level(x, time, {**cond, "prompt_mask": mask})
    other = cond["prompt_embeds"].clone()
    other[:, 2:] += 1
    assert torch.equal(level(x, time, {**cond, "prompt_mask": mask, "prompt_embeds": other}), masked)
    short = level(x, time, {**cond, "prompt_embeds": cond["prompt_embeds"][:, :2]})
    torch.testing.assert_close(masked, short)
    labelled = moved(UNet2D(1, 8, 3, (8, 16), 1, groups=4).add_adapter(SETTINGS))
    x = torch.randn(1, 1, 8, 8)
    maps = []
    for label in (0, 3):
        labelled.read(x, torch.ones(1), {"labels": torch.tensor([label]), "guidance": torch.ones(1)})
        maps.append(labelled.call["0"])
    assert not torch.allclose(*maps)


def test_levels_of_the_pyramid_are_those_of_the_decoder():
    """Odd sizes round up, as diffusers does; nothing is spread. Each map sees all of the sample through the coarsest."""
    network = UNet2D(1, 20, None, (16,) * 3, 1, attention=(False,) * 3, groups=4)
    adapter = moved(network.add_adapter(GuideNetwork(8, depth=2)))
    x = torch.randn(1, 1, 20, 20)
    shapes: list[Any] = []
    for block in network.model.up_blocks:
        block.register_forward_hook(lambda module, args, out: shapes.append(out.shape[2:]))
    network(x, torch.ones(1), {"guidance": torch.ones(1)})
    levels = [adapter.call[injection.level].shape[2:] for injection in adapter.injections.values()]
    assert levels == shapes == [(10, 10), (20, 20), (20, 20)] and len(adapter.call) == 2
    assert len(adapter.guide.levels[0]) == 2
    adapter.read(torch.randn(1, 1, 7, 9), torch.ones(1), {"guidance": torch.ones(1)})
    assert [value.shape[2:] for value in adapter.call.values()] == [(7, 9), (4, 5)]


@pytest.mark.parametrize("name", ["sd15", "dit"])
def test_gradients_are_the_same_when_activations_are_computed_again(name):
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        network, cond = wrapped(name), conditions(name)
        torch.manual_seed(0)
        adapter = moved(network.add_adapter(SETTINGS))
        network.train()
        if checkpointing:
            network.model.enable_gradient_checkpointing()
        call(network, cond).square().sum().backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_deep_copies_call_their_own():
    network, cond = wrapped("dit"), conditions("dit")
    network.add_adapter(SETTINGS)
    before = call(network, cond)
    twin = copy.deepcopy(network)
    moved(twin.adapters["guide_network"])
    assert not torch.equal(call(twin, cond), before) and torch.equal(call(network, cond), before)


def test_half_precision_base():
    network, cond = wrapped("sd3"), conditions("sd3")
    network.model.bfloat16()
    before = call(network, cond)
    adapter = network.add_adapter(SETTINGS)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert torch.equal(call(network, cond), before)
    moved(adapter)
    assert not torch.equal(call(network, cond), before)


def test_saved_and_loaded_onto_another_checkpoint(tmp_path):
    first, second = (NetworkDenoiser(wrapped("dit"), RectifiedFlow()) for _ in range(2))
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    others = moved(first.network.add_adapter(GuideNetwork(width=24, depth=2)))
    save_adapters(first, tmp_path / "guide.safetensors")
    load_adapters(second, tmp_path / "guide.safetensors")
    own: Any = second.network.adapters["guide_network"]
    assert own.settings == GuideNetwork(width=24, depth=2)
    for key, value in others.state_dict().items():
        assert torch.equal(own.state_dict()[key], value), key


def test_share_of_stable_diffusion():
    """Counted on a model without memory."""
    import diffusers

    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(64, cross_attention_dim=768, down_block_types=down, up_block_types=up)
        adapter = GuideNetwork().build(NETWORKS["UNet2DConditionModel"].of(model))
    total, own = (sum(p.numel() for p in module.parameters()) for module in (model, adapter))
    assert total == 859_520_964 and own / total == pytest.approx(0.0093, abs=1e-3)


def test_bad_settings_are_named():
    for settings in ({"width": 12}, {"width": 0}, {"depth": 0}):
        with pytest.raises(ValueError, match="give a multiple of 8 and at least one block"):
            GuideNetwork(**settings)
    network = wrapped("dit")
    network.add_adapter(SETTINGS)
    with pytest.raises(ValueError, match=r"cond\['guidance'\] is missing"):
        call(network, FAMILIES["dit"].cond(2)[0])
