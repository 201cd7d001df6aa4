"""SpeedUpNet's adapter: no effect at first, then the attention to the negative prompt is taken off as the equation says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from distill.adapter_files import load_adapters, save_adapters
from distill.adapters.negative_prompt import NegativePrompt
from distill.denoiser import NetworkDenoiser
from distill.lora import LoRA, start_student
from distill.networks.base import DiffusersNetwork
from distill.networks.families import FAMILIES as NETWORKS
from distill.schedules import RectifiedFlow
from distill.types import Cond

CROSS = ["sd15", "sd2", "sdxl", "pixart-alpha", "pixart-sigma", "sana"]
OTHERS = ["ddpm", "dit", "sd3", "flux"]


def wrapped(name: str) -> DiffusersNetwork:
    tiny = FAMILIES[name]
    return NETWORKS[tiny.model_class].of(tiny.model()).eval().requires_grad_(False)


def conditions(name: str, count: int = 2) -> tuple[Cond, Cond]:
    """Without and with the null prompt as negative prompt."""
    cond, null = FAMILIES[name].cond(count)
    keys = [key for key in ("prompt_embeds", "prompt_mask") if key in cond]
    return cond, {**cond, **{f"negative_{key}": null[key] for key in keys}}


def call(network: DiffusersNetwork, cond: Cond) -> Tensor:
    count = len(cond["prompt_embeds"])
    x = torch.randn(count, network.shape[0], 8, 8, generator=torch.Generator().manual_seed(1))
    return network(x, torch.linspace(20, 700, count), cond)


def moved(adapter: Any) -> Any:
    """A trained adapter."""
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return adapter


@pytest.mark.parametrize("name", CROSS)
def test_without_effect_at_first_and_felt_when_trained(name):
    network, (plain, cond) = wrapped(name), conditions(name)
    before, bits = call(network, plain), {key: value.clone() for key, value in network.state_dict().items()}
    adapter = network.add_adapter(NegativePrompt())
    assert torch.equal(call(network, cond), before)
    assert not {id(p) for p in adapter.parameters()} & {id(p) for p in network.model.parameters()}
    call(network, cond).square().sum().backward()
    assert all(attention.gain.grad.any() and attention.offset.grad.any() for attention in adapter.attentions.values())
    assert not any(parameter.requires_grad for parameter in network.model.parameters())
    moved(adapter)
    after = call(network, cond)
    other = call(network, {**cond, "negative_prompt_embeds": cond["negative_prompt_embeds"].flip(1)[..., ::2].repeat(1, 1, 2)})
    assert not torch.allclose(after, before) and not torch.allclose(after, other)
    network.detach_adapters()
    assert torch.equal(call(network, plain), before)
    assert all(torch.equal(value, bits[key]) for key, value in network.state_dict().items()) and not network.adapters


@pytest.mark.parametrize("name", CROSS)
def test_prompts_come_to_the_attentions_alike(name):
    """Through the same layers of the model, if it has some: here the negative prompt is the positive one."""
    network, cond = wrapped(name), conditions(name)[0]
    adapter = network.add_adapter(NegativePrompt())
    seen: list[Tensor] = []
    module = network.model.get_submodule(next(iter(adapter.attentions)).replace("-", "."))
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    call(network, {**cond, **{f"negative_{key}": cond[key] for key in ("prompt_embeds", "prompt_mask") if key in cond}})
    assert torch.equal(adapter.call["prompt"], seen[0])


def test_beside_lora_layers():
    teacher, (plain, cond) = NetworkDenoiser(wrapped("sd15"), RectifiedFlow()), conditions("sd15")
    before = call(teacher.network, plain)
    student = start_student(teacher, LoRA(2), NegativePrompt()).eval()
    assert torch.equal(call(student.network, cond), before) and torch.equal(call(teacher.network, plain), before)
    student.network.detach_adapters()
    assert torch.equal(call(student.network, plain), before)


def one_attention(count: int = 3) -> tuple[DiffusersNetwork, Any, Any, Tensor, Tensor, Tensor]:
    """A network of SD's family, its first cross-attention and that one's part, tokens of an image and of two prompts."""
    network = wrapped("sd2")
    part = next(iter(moved(network.add_adapter(NegativePrompt())).attentions.values()))
    path = next(iter(network.adapters["negative_prompt"].attentions)).replace("-", ".")
    attention, generator = network.model.get_submodule(path), torch.Generator().manual_seed(4)
    tokens, positive, negative = (
        torch.randn(count, n, d, generator=generator) for n, d in ((6, attention.to_q.in_features), (5, 12), (4, 12))
    )
    return network, attention, part, tokens, positive, negative


def seen_by_output(network: Any, attention: Any, tokens: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """What the attention's output layer is given."""
    seen: list[Tensor] = []
    handle = attention.to_out[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    network.adapters["negative_prompt"].read(tokens, torch.zeros(len(tokens)), {"negative_prompt_embeds": negative})
    attention(tokens, encoder_hidden_states=positive)
    handle.remove()
    return seen[0]


def hand_written(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention head by head."""
    split = [each.chunk(attention.heads, -1) for each in (query, key, value)]
    heads = [(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*split, strict=True)]
    return torch.cat(heads, -1)


def test_the_difference_is_the_papers_with_norms_of_each_sample():
    network, attention, part, tokens, positive, negative = one_attention()
    query = tokens @ attention.to_q.weight.T
    first = hand_written(attention, query, positive @ attention.to_k.weight.T, positive @ attention.to_v.weight.T)
    second = hand_written(attention, query, negative @ part.to_k.weight.T, negative @ part.to_v.weight.T)
    rows = []
    for a, b in zip(first, second, strict=True):
        rows.append(a - (part.gain * (b * a.square().sum().sqrt() / b.square().sum().sqrt()) + part.offset))
    found = seen_by_output(network, attention, tokens, positive, negative)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-5, atol=1e-6)
    # A sample does not depend on the others of its batch.
    alone = seen_by_output(network, attention, tokens[:1], positive[:1], negative[:1])
    torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-6)


def test_swapped_prompts_point_the_other_way():
    """With K' = K, V' = V, A = 1 and B = 0, as the release starts: opposite directions, and nothing between equal prompts."""
    network, attention, part, tokens, positive, negative = one_attention()
    with torch.no_grad():
        for own, base in ((part.to_k, attention.to_k), (part.to_v, attention.to_v)):
            own.weight.copy_(base.weight)
        part.gain.fill_(1.0), part.offset.zero_()
    there = seen_by_output(network, attention, tokens, positive, negative).flatten(1)
    back = seen_by_output(network, attention, tokens, negative, positive).flatten(1)
    torch.testing.assert_close(torch.cosine_similarity(there, back), -torch.ones(3), rtol=0, atol=1e-5)
    nothing = seen_by_output(network, attention, tokens, positive, positive)
    assert bool((nothing.abs() < 1e-5).all()) and bool((there.abs() > 1e-3).any())


def test_masked_tokens_are_not_seen():
    network, (_, cond) = wrapped("sana"), conditions("sana")
    moved(network.add_adapter(NegativePrompt()))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    before = call(network, {**cond, "negative_prompt_mask": mask})
    changed = cond["negative_prompt_embeds"].clone()
    changed[:, 2:] += 1
    after = call(network, {**cond, "negative_prompt_mask": mask, "negative_prompt_embeds": changed})
    assert torch.allclose(before[0], after[0], atol=1e-5) and not torch.allclose(before[1], after[1], atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sana"])
def test_gradients_are_the_same_when_activations_are_computed_again(name):
    """And queries are computed once: the base's layers run as often as without the adapter."""
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        network, (_, cond) = wrapped(name), conditions(name)
        adapter = moved(network.add_adapter(NegativePrompt()))
        network.train()
        if checkpointing:
            network.model.enable_gradient_checkpointing()
        calls: list[int] = []
        for path, module in network.model.named_modules():
            if path.endswith("attn2.to_q"):
                module.register_forward_hook(lambda *_: calls.append(1))
        loss = call(network, cond).square().sum()
        assert len(calls) == len(adapter.attentions)
        loss.backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_deep_copies_call_their_own():
    network, (_, cond) = wrapped("pixart-sigma"), conditions("pixart-sigma")
    network.add_adapter(NegativePrompt())
    before = call(network, cond)
    twin = copy.deepcopy(network)
    moved(twin.adapters["negative_prompt"])
    with torch.no_grad():
        twin.model.caption_projection.linear_1.weight.mul_(2)
    assert not torch.equal(call(twin, cond), before) and torch.equal(call(network, cond), before)
    assert twin.adapters["negative_prompt"].prompt_layers[0] is twin.model.caption_projection


def test_half_precision_base():
    network, (plain, cond) = wrapped("sd15"), conditions("sd15")
    network.model.bfloat16()
    before = call(network, plain)
    adapter = network.add_adapter(NegativePrompt())
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert torch.equal(call(network, cond), before)


def test_saved_and_loaded_onto_another_checkpoint(tmp_path):
    (first, second), (_, cond) = (NetworkDenoiser(wrapped("sd15"), RectifiedFlow()) for _ in range(2)), conditions("sd15")
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    first.network.add_adapter(NegativePrompt(targets=["attn2"]))
    moved(first.network.adapters["negative_prompt"])
    save_adapters(first, tmp_path / "adapter.safetensors")
    plain = call(second.network, cond)
    load_adapters(second, tmp_path / "adapter.safetensors")
    own, others = (network.network.adapters["negative_prompt"] for network in (second, first))
    assert own.settings == others.settings and not torch.equal(call(second.network, cond), plain)
    for key, value in others.state_dict().items():
        assert torch.equal(own.state_dict()[key], value), key


def test_share_of_stable_diffusion():
    """Counted on a model without memory."""
    import diffusers

    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(64, cross_attention_dim=768, down_block_types=down, up_block_types=up)
        network = NETWORKS["UNet2DConditionModel"].of(model)
        adapter = NegativePrompt().build(network)
    total, own = (sum(p.numel() for p in module.parameters()) for module in (model, adapter))
    assert total == 859_520_964 and len(adapter.attentions) == 16
    assert own / total == pytest.approx(0.0223, abs=5e-4)


def test_what_cannot_be_is_named():
    for name in OTHERS:
        with pytest.raises(ValueError, match="adapter=NegativePrompt: this .* has no cross-attention to a prompt"):
            wrapped(name).add_adapter(NegativePrompt())
    with pytest.raises(ValueError, match="adapter.targets: .*attn1 is no cross-attention but a Attention; leave it out"):
        wrapped("sd15").add_adapter(NegativePrompt(targets=["attn1"]))
    with pytest.raises(ValueError, match=r"adapter.targets=\['attn9'\]"):
        wrapped("sd15").add_adapter(NegativePrompt(targets=["attn9"]))
    network, (plain, cond) = wrapped("sana"), conditions("sana")
    network.model.transformer_blocks[0].attn2.norm_q = nn.LayerNorm(16)
    with pytest.raises(ValueError, match="normalises queries, keys or its prompt"):
        network.add_adapter(NegativePrompt())
    network = wrapped("sana")
    network.add_adapter(NegativePrompt())
    with pytest.raises(ValueError, match=r"cond\['negative_prompt_embeds'\] is missing"):
        call(network, plain)
    with pytest.raises(ValueError, match=r"cond\['negative_prompt_mask'\] is missing"):
        call(network, {key: value for key, value in cond.items() if key != "negative_prompt_mask"})
