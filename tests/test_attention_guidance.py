"""Guidance adapters beside attentions: their formulas, where they are added, what they read, and their size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import nn

from distill.adapters import AttentionGuidance, remove_hooks, sinusoid
from distill.adapters.additions import AttentionAddition, ScaleEmbedding, places
from distill.adapters.base import Values
from distill.ema import EMA, DecayAveraging
from distill.networks.families import FAMILIES as NETWORKS

KINDS = ("attention", "additive")


def network(family: str, **changes: Any) -> Any:
    tiny = FAMILIES[family]
    return NETWORKS[tiny.model_class].of(tiny.model(**changes))


def call(net: Any, family: str, scales: tuple[float, float] = (2.0, 5.0), graph: bool = False, **conditions: Any) -> Any:
    tiny, generator = FAMILIES[family], torch.Generator().manual_seed(3)
    x = torch.randn(2, tiny.channels, tiny.size, tiny.size, generator=generator)
    cond = {**tiny.cond(2)[0], "guidance": torch.tensor(scales), **conditions}
    with torch.set_grad_enabled(graph):
        return net(x, torch.tensor([10.0, 500.0]), cond)


def moved(adapter: nn.Module) -> Any:
    """With trained weights."""
    torch.manual_seed(1)
    for weight in adapter.parameters():
        nn.init.normal_(weight, std=0.3)
    return adapter


def values(adapter: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in adapter.call.items()}


def test_the_scale_is_embedded_by_fixed_fourier_features():
    """LayerNorm(MLP(cos(2 pi (f w m + p)))); f and p are saved and not trained."""
    torch.manual_seed(0)
    embedding = ScaleEmbedding(6, 3.0)
    w = torch.tensor([0.0, 0.5, 4.0])
    features = torch.cos(2 * torch.pi * (embedding.frequencies * w[:, None] + embedding.phases))
    torch.testing.assert_close(embedding(w), embedding.layers(features))
    assert {"frequencies", "phases"} <= embedding.state_dict().keys()
    assert not {"frequencies", "phases"} & {name for name, _ in embedding.named_parameters()}
    torch.manual_seed(0)
    assert torch.allclose(ScaleEmbedding(6, 1.0).frequencies * 3, embedding.frequencies)


def test_no_guidance_is_embedded_as_zero_and_each_sample_has_its_scale():
    net = network("dit")
    adapter = net.add_adapter(AttentionGuidance(width=8))
    call(net, "dit", (1.0, 4.0))
    torch.testing.assert_close(adapter.call["scale"][:, 0], adapter.scale(torch.tensor([0.0, 3.0])))


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_over_scale_time_and_conditions(heads):
    """Each head's softmax(Q K^T / sqrt(h)) V, K and V of ``[w, t, prompt ...]`` plus positions, masked tokens left out."""
    torch.manual_seed(0)
    told = {name: torch.randn(2, n, 8) for name, n in (("scale", 1), ("time", 1), ("prompt", 3))}
    mask = torch.tensor([[True, True, False], [True, False, False]])
    part = moved(AttentionAddition(6, 5, 8, Values(told, mask=mask), heads))
    x = torch.randn(2, 4, 6)
    asked = torch.cat([told["scale"], told["time"], told["prompt"]], 1) + sinusoid(torch.arange(5.0), 8)
    seen, answers = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool(), []
    for own in torch.arange(8).split(8 // heads):
        query, key, value = (layer(tokens)[..., own] for layer, tokens in zip(layers(part), (x, asked, asked), strict=True))
        scores = query @ key.transpose(1, 2) / len(own) ** 0.5
        answers.append(scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value)
    torch.testing.assert_close(part.tokens(x), part.out(torch.cat(answers, -1)))


@pytest.mark.parametrize(("family", "names"), [("dit", ("scale", "time", "label")), ("sd15", ("scale", "time"))])
def test_joint_tokens_are_an_mlp_of_all_embeddings_and_stand_in_their_place(family, names):
    net = network(family)
    adapter = moved(net.add_adapter(AttentionGuidance(width=12, tokens=5, embedding_width=6)))
    call(net, family)
    told, block = values(adapter), next(iter(adapter.blocks.values()))
    together = adapter.joint.layers(torch.cat([told[name][:, 0] for name in names], 1)).reshape(2, 5, 6)
    asked = torch.cat([together, *(told[name] for name in ("prompt",) if name in told)], 1)
    asked = asked + sinusoid(torch.arange(float(asked.shape[1])), 6)
    x = torch.randn(2, 4, block.query.in_features)
    query, key, value = (layer(tokens) for layer, tokens in zip(layers(block), (x, asked, asked), strict=True))
    answer = (query @ key.transpose(1, 2) / 12**0.5).softmax(-1) @ value
    torch.testing.assert_close(block.tokens(x), block.out(answer))


def layers(part: AttentionAddition) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return part.query, part.key, part.value


def test_the_additive_kind_is_an_mlp_of_the_sum():
    net = network("pixart-sigma")
    adapter = moved(net.add_adapter(AttentionGuidance("additive", 8)))
    call(net, "pixart-sigma")
    told, mask = values(adapter), FAMILIES["pixart-sigma"].cond(2)[0]["prompt_mask"].bool()
    prompt = torch.stack([told["prompt"][row][mask[row]].mean(0) for row in range(2)])
    total = told["scale"][:, 0] + told["time"][:, 0] + prompt
    (block,) = adapter.blocks.values()
    torch.testing.assert_close(block.tokens(torch.randn(2, 7, 24))[:, 0], block.layers(total))


def test_time_and_class_are_the_bases_own_embeddings():
    net = network("dit")
    adapter = moved(net.add_adapter(AttentionGuidance(width=8)))
    call(net, "dit")
    own = net.model.transformer_blocks[0].norm1.emb
    time = own.timestep_embedder(own.time_proj(torch.tensor([10.0, 500.0])))
    label = own.class_embedder(FAMILIES["dit"].cond(2)[0]["labels"])
    torch.testing.assert_close(adapter.call["time"][:, 0], adapter.time(time))
    torch.testing.assert_close(adapter.call["label"][:, 0], adapter.label(label))


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("ddpm", ("attentions.0", "attentions.1")),
        ("sd15", ("attn2",)),
        ("sdxl", ("attn2",)),
        ("dit", ("attn1",)),
        ("pixart-alpha", ("attn1",)),
        ("sd3", ("attn",)),
        ("flux", ("attn",)),
        ("sana", ("attn1",)),
    ],
)
def test_the_usual_places(family, ends):
    """Self-attention of transformers and unconditional U-Nets, cross-attention of conditional ones: all of them."""
    net = network(family)
    adapter = net.add_adapter(AttentionGuidance(width=8))
    names = [name for name, _ in net.model.named_modules() if name.endswith(tuple("." + end for end in ends))]
    assert list(adapter.blocks) == [name.replace(".", "-") for name in names] and names


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_added_to_the_attentions_output(kind):
    """``attn(x) + A(x)``, of the attention's own input; in joint attention the text's part stays as it is."""
    net = network("sd3")
    adapter = moved(net.add_adapter(AttentionGuidance(kind, 8)))
    seen: list[Any] = []
    module = net.model.transformer_blocks[0].attn
    module.register_forward_hook(lambda m, a, k, out: seen.append((k, out)), with_kwargs=True)
    call(net, "sd3")
    (kwargs, after), block = seen[0], next(iter(adapter.blocks.values()))
    with torch.no_grad():
        added = block.tokens(kwargs["hidden_states"])
        net.adapters.clear()
        remove_hooks(net.model, adapter)
        before = module(**kwargs)
    torch.testing.assert_close(after[0], before[0] + added)
    assert torch.equal(after[1], before[1]) and added.abs().min() > 0


def test_maps_are_read_and_written_row_by_row():
    """The attention of ``UNet2DModel`` has ``(b, c, h, w)``: a token's place is kept, and its channels are normalised."""
    net = network("ddpm")
    adapter = moved(net.add_adapter(AttentionGuidance(width=8)))
    seen: list[Any] = []
    module = net.model.mid_block.attentions[0]
    module.register_forward_hook(lambda m, a, k, out: seen.append((a[0], out)), with_kwargs=True)
    call(net, "ddpm")
    x, after = seen[0]
    block = adapter.blocks["mid_block-attentions-0"]
    with torch.no_grad():
        remove_hooks(net.model, adapter)
        added = after - module(x)
        token = nn.functional.layer_norm(x[:, :, 2, 1], (16,))
        torch.testing.assert_close(added[:, :, 2, 1], block.tokens(token[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    assert x.shape[2:] == (4, 4)


def test_places_are_the_cosine_basis_of_both_axes():
    """At half steps the cosines are orthogonal, ``sum_i cos cos = n/2``; a row's place does not say the column."""
    basis = places(4, 6, 3, torch.device("cpu")).reshape(4, 6, 6)
    rows, columns = basis[:, 0, :3], basis[0, :, 3:]
    torch.testing.assert_close(rows.T @ rows, 2 * torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(columns.T @ columns, 3 * torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis[2, 5], torch.cat([rows[2], columns[5]]))
    torch.testing.assert_close(rows[0], torch.tensor([torch.pi * k / 8 for k in (1, 2, 3)]).cos())


def test_a_token_of_a_map_asks_with_its_place():
    """Behind the normalised channels; a map that is the same everywhere is then not added to alike."""
    net = network("ddpm")
    adapter = moved(net.add_adapter(AttentionGuidance(width=8, targets=["conv_out"], positions=2)))
    call(net, "ddpm")
    block, module = adapter.blocks["conv_out"], net.model.conv_out
    x = torch.arange(8.0)[None, :, None, None].expand(2, 8, 8, 8)
    with torch.no_grad():
        added = block.add(module, (x,), {}, torch.zeros(2, 1, 8, 8))
        channels = nn.functional.layer_norm(x[:, :, 3, 6], (8,))
        token = torch.cat([channels, places(8, 8, 2, x.device)[3 * 8 + 6].expand(2, -1)], 1)
        torch.testing.assert_close(added[:, :, 3, 6], block.tokens(token[:, None])[:, 0])
    assert added[0].unique().numel() > 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["resnets.0", "conv_out"])
def test_residual_blocks_and_convolutions_can_be_targets(kind, target):
    net = network("ddpm")
    plain = call(net, "ddpm")
    adapter = net.add_adapter(AttentionGuidance(kind, 8, targets=[target]))
    assert torch.equal(call(net, "ddpm"), plain)
    moved(adapter)
    assert not torch.isclose(call(net, "ddpm"), plain).all()


def test_joint_tokens_and_places_have_no_effect_at_first():
    net = network("ddpm")
    plain = call(net, "ddpm")
    adapter = net.add_adapter(AttentionGuidance(width=8, targets=["resnets.0", "attentions.0"], tokens=3, positions=2))
    assert torch.equal(call(net, "ddpm"), plain)
    moved(adapter)
    assert not torch.isclose(call(net, "ddpm"), plain).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["dit", "sd15"])
def test_scale_time_and_condition_matter(family, kind):
    net = network(family)
    moved(net.add_adapter(AttentionGuidance(kind, 8)))
    first, second = call(net, family), call(net, family, (2.0, 6.0))
    assert torch.equal(first[0], second[0]) and not torch.isclose(first[1], second[1]).all()


def test_masked_tokens_are_not_read():
    net = network("pixart-sigma")
    moved(net.add_adapter(AttentionGuidance(width=8)))
    cond, first = FAMILIES["pixart-sigma"].cond(2)[0], call(net, "pixart-sigma")
    changed = cond["prompt_embeds"] + 9 * (1 - cond["prompt_mask"])[..., None]
    assert torch.equal(call(net, "pixart-sigma", prompt_embeds=changed), first)
    assert not torch.equal(call(net, "pixart-sigma", prompt_embeds=cond["prompt_embeds"] + 9), first)


def test_copies_hook_their_own_also_with_shared_weights_and_after_a_call_with_a_graph():
    net = network("sd15").requires_grad_(False)
    moved(net.add_adapter(AttentionGuidance(width=8)))
    before = call(net, "sd15", graph=True).detach()
    shared = {id(weight): weight for weight in net.model.parameters()}
    for twin in (copy.deepcopy(net), copy.deepcopy(net, dict(shared)), EMA(net, DecayAveraging()).module):
        assert torch.equal(call(twin, "sd15"), before)
        for weight in twin.adapters.parameters():
            nn.init.zeros_(weight)
        call(twin, "sd15", (9.0, 9.0))
        assert not torch.equal(call(twin, "sd15"), before) and torch.equal(call(net, "sd15"), before)
        # Detaching a copy takes the copy's hooks, and no others.
        twin.detach_adapters()
        plain = call(twin, "sd15")
        assert not any(hooks(twin.model)) and any(hooks(net.model)) and torch.equal(call(net, "sd15"), before)
    net.detach_adapters()
    assert torch.equal(call(net, "sd15"), plain) and not any(hooks(net.model))


def hooks(model: nn.Module) -> list[Any]:
    """All hooks, and what says that they want keywords."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).items()]


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("family", ["dit", "sd15"])
def test_checkpointed_activations_give_the_same_gradients(family, tokens):
    gradients = []
    for checkpointed in (False, True):
        net = network(family).requires_grad_(False).train()
        net.add_scalar_input("guidance")
        torch.manual_seed(0)
        adapter = moved(net.add_adapter(AttentionGuidance(width=8, tokens=tokens)))
        if checkpointed:
            net.model.enable_gradient_checkpointing()
        call(net, family, graph=True).square().mean().backward()
        gradients.append([weight.grad for part in (adapter, net.scalars) for weight in part.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[0])


def test_the_model_may_be_in_bfloat16():
    net = network("sd15")
    net.model.to(torch.bfloat16)
    plain = call(net, "sd15")
    adapter = net.add_adapter(AttentionGuidance(width=8))
    assert torch.equal(call(net, "sd15"), plain) and plain.dtype == torch.bfloat16
    assert {weight.dtype for weight in adapter.parameters()} == {torch.float32}
    assert not torch.equal(call(moved(net), "sd15"), plain)


SD15 = dict(sample_size=64, in_channels=4, out_channels=4, cross_attention_dim=768)
XL = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SDXL = SD15 | dict(
    cross_attention_dim=2048,
    block_out_channels=(320, 640, 1280),
    down_block_types=XL,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@pytest.mark.parametrize(
    ("family", "config", "kind", "width", "millions"),
    [
        ("DiTTransformer2DModel", dict(in_channels=4, out_channels=8, sample_size=32), "additive", 256, 675),
        ("DiTTransformer2DModel", dict(in_channels=4, out_channels=8, sample_size=32), "attention", 160, 675),
        ("UNet2DConditionModel", SD15, "attention", 320, 859),
        ("UNet2DConditionModel", SDXL, "attention", 240, 2567),
    ],
)
def test_two_percent_at_full_size(family, config, kind, width, millions):
    """DiT-XL/2 (675 M parameters as published; diffusers repeats its embeddings in each block), SD 1.5 and SDXL."""
    import diffusers

    with torch.device("meta"):
        net = NETWORKS[family].of(getattr(diffusers, family)(**config))
        added = net.add_adapter(AttentionGuidance(kind, width))
    base = sum(weight.numel() for weight in net.model.parameters())
    share = sum(weight.numel() for weight in added.parameters()) / (1e6 * millions)
    assert 1e6 * millions <= base < 1.12e6 * millions and 0.01 < share <= 0.02


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="width=9"):
        AttentionGuidance(width=9)
    with pytest.raises(ValueError, match="frequency=0.0"):
        AttentionGuidance(frequency=0.0)
    for key, value in {"tokens": 0, "embedding_width": 5, "positions": -1}.items():
        with pytest.raises(ValueError, match=f"{key}={value}: give"):
            AttentionGuidance(**{key: value})
        with pytest.raises(ValueError, match=f"{key}=4: the additive kind asks no tokens"):
            AttentionGuidance("additive", **{key: 4})
    net = network("dit")
    with pytest.raises(ValueError, match="adapter.positions=2: transformer_blocks.0.attn1 reads a sequence"):
        net.add_adapter(AttentionGuidance(positions=2))
    with pytest.raises(ValueError, match=r"adapter.targets=\['attn7'\]"):
        net.add_adapter(AttentionGuidance(targets=["attn1", "attn7"]))
    with pytest.raises(ValueError, match="transformer_blocks.0.norm1 is a AdaLayerNormZero"):
        net.add_adapter(AttentionGuidance(targets=["transformer_blocks.0.norm1"]))
    with pytest.raises(ValueError, match="pos_embed.proj is a Conv2d, no attention, residual block or convolution of stride 1"):
        net.add_adapter(AttentionGuidance(targets=["pos_embed.proj"]))
    with pytest.raises(ValueError, match="adapter.targets=None: UNet2DModel has none"):
        unattended = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)
        network("ddpm", **unattended).add_adapter(AttentionGuidance())
    # Nothing was hooked before the mistake was seen.
    assert not hooks(net.model)
