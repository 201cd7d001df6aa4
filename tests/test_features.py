"""Inner features of every family: the right layer's, the full evaluation's to the bit, and no more of it than they need."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES
from oracle import Gaussian
from torch import Tensor, nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.features import bottleneck_of, denoise_with_features, features_of
from distill.guidance import ClassifierFreeGuidance
from distill.lora import LoRA, start_student
from distill.networks.base import Network
from distill.networks.edm import EDM
from distill.networks.edm2 import EDM2
from distill.networks.families import FAMILIES as WRAPPERS
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.types import Cond, label_conditions

TINY_EDM: dict[str, Any] = dict(
    sample_size=8, num_classes=10, multipliers=(1, 2), blocks=1, attention=(4,), head_width=16, dropout=0.0
)
EDM_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ddpmpp": lambda: EDM(**TINY_EDM, width=16, architecture="ddpmpp"),
    "ncsnpp": lambda: EDM(**TINY_EDM, width=16, architecture="ncsnpp"),
    "adm": lambda: EDM(**TINY_EDM, width=16, architecture="adm"),
    "edm2": lambda: EDM2(16, **TINY_EDM),
}
UNETS = {"ddpm", "sd15", "sd2", "sdxl", *EDM_NETWORKS}
NAMES = [*FAMILIES, *EDM_NETWORKS]

# Layers by name inside the model, the channels there, and how many times smaller the map is than the sample.
DIFFUSERS_UNET = {"middle": "mid_block", "encoder": "down_blocks.1"}
EDM_UNET = {"middle": "decoder.0.entry.1", "encoder": "encoder.1.blocks.0"}
PLACES: dict[str, tuple[dict[str, str], int, int]] = {name: (DIFFUSERS_UNET, 16, 2) for name in FAMILIES}
PLACES |= {name: (EDM_UNET, 32, 2) for name in EDM_NETWORKS}
for transformer, width, patch in (
    ("dit", 16, 2),
    ("pixart-alpha", 24, 2),
    ("pixart-sigma", 24, 2),
    ("sd3", 16, 2),
    ("flux", 32, 2),
    ("flux-schnell", 32, 2),
    ("sana", 16, 1),
):
    PLACES[transformer] = (dict.fromkeys(("middle", "encoder"), "transformer_blocks.0"), width, patch)

CASES = [(name, layer) for name in NAMES for layer in (("middle", "encoder") if name in UNETS else ("middle",))]


@cache
def denoiser(name: str) -> NetworkDenoiser:
    """In evaluation mode, with weights of which none is zero. Not to be changed."""
    torch.manual_seed(0)
    if name in EDM_NETWORKS:
        network = EDM_NETWORKS[name]()
    else:
        network = WRAPPERS[FAMILIES[name].model_class].of(FAMILIES[name].model())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if name in EDM_NETWORKS:
        return NetworkDenoiser(network, VarianceExploding(), "edm").eval()
    return NetworkDenoiser(network, VariancePreserving(), "eps").eval()


def inputs(name: str, shape: tuple[int, ...] | None = None, count: int = 2) -> tuple[Tensor, Tensor, Cond]:
    """Two samples of 8x8, or of another ``shape``, times and conditions."""
    channels, size = (3, 8) if name in EDM_NETWORKS else (FAMILIES[name].channels, FAMILIES[name].size)
    x = torch.randn(count, *(shape or (channels, size, size)), generator=torch.Generator().manual_seed(1))
    cond = label_conditions(torch.arange(count), 10)[0] if name in EDM_NETWORKS else FAMILIES[name].cond(count)[0]
    return x, (torch.tensor([0.7, 3.0]) if name in EDM_NETWORKS else torch.tensor([200.0, 700.0]))[:count], cond


def module_at(name: str, layer: str) -> nn.Module:
    return denoiser(name).network.model.get_submodule(PLACES[name][0][layer])


def as_map(name: str, output: Any, shape: tuple[int, ...]) -> Tensor:
    """The map in what the layer returns: the image's stream comes second, a down block's skips too; tokens go row by row."""
    if isinstance(output, tuple):
        output = output[0 if name in UNETS else 1]
    if output.dim() == 4:
        return output
    patch = PLACES[name][2]
    rows = output.reshape(len(output), shape[-2] // patch, shape[-1] // patch, -1)
    return rows.permute(0, 3, 1, 2)


def reference(name: str, layer: str, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
    """x0 and features by a full evaluation."""
    kept: list[Any] = []
    handle = module_at(name, layer).register_forward_hook(lambda module, inputs, output: kept.append(output))
    x0 = denoiser(name)(x, t, cond)
    handle.remove()
    return x0, as_map(name, kept[0], tuple(x.shape))


@contextmanager
def calls(module: nn.Module) -> Iterator[list[str]]:
    """Names of the modules inside, in the order in which they begin to work."""
    begun: list[str] = []
    handles = []
    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda part, inputs, name=name: begun.append(name)))
    yield begun
    for handle in handles:
        handle.remove()


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def gradients(value: Tensor, x: Tensor, module: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a projection of ``value``: in ``x``, and in the parameters that have one."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    of_x, *others = torch.autograd.grad((weights * value).sum(), [x, *parameters], allow_unused=True)
    return of_x, {name: other for name, other in zip(names, others, strict=True) if other is not None}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ------------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name, layer", CASES)
def test_features_are_those_of_the_full_evaluation(name, layer):
    x, t, cond = inputs(name)
    with torch.no_grad():
        x0, expected = reference(name, layer, x, t, cond)
        both = denoise_with_features(denoiser(name), x, t, cond, layer)
        alone = features_of(denoiser(name), x, t, cond, layer)
    assert torch.equal(both[0], x0) and torch.equal(both[1], expected) and torch.equal(alone, expected)
    assert torch.equal(both[0], denoiser(name)(x, t, cond))
    assert alone.dtype == torch.float32 and alone.shape == (2, PLACES[name][1], *(8 // PLACES[name][2],) * 2)
    assert alone.std() > 0.01


@pytest.mark.parametrize("name, layer", CASES)
def test_nothing_is_computed_after_the_layer(name, layer):
    """The very modules that the full evaluation calls before the layer is done work, and no other."""
    network, (x, t, cond) = denoiser(name).network, inputs(name)
    with torch.no_grad(), calls(network) as full:
        place = "model." + PLACES[name][0][layer]
        ends: list[int] = []
        handle = module_at(name, layer).register_forward_hook(lambda *args: ends.append(len(full)))
        denoiser(name)(x, t, cond)
        handle.remove()
    with torch.no_grad(), calls(network) as partial:
        features_of(denoiser(name), x, t, cond, layer)
    assert place in partial
    assert partial == full[: ends[0]] and len(partial) < len(full)


@pytest.mark.parametrize("name, layer", CASES)
def test_gradients_are_those_of_the_full_evaluation(name, layer):
    """In the input and in what lies before the layer; what lies after it has none."""
    x, t, cond = inputs(name)
    x.requires_grad_()
    network = denoiser(name)
    expected_x, expected = gradients(reference(name, layer, x, t, cond)[1], x, network)
    of_x, of_parameters = gradients(features_of(network, x, t, cond, layer), x, network)
    assert torch.equal(of_x, expected_x) and of_x.abs().amax((1, 2, 3)).min() > 0
    assert equal(of_parameters, expected)
    place = f"network.model.{PLACES[name][0][layer]}."
    assert any(key.startswith(place) for key in of_parameters)
    assert torch.equal(gradients(denoise_with_features(network, x, t, cond, layer)[1], x, network)[0], expected_x)
    of_x0 = gradients(denoise_with_features(network, x, t, cond, layer)[0], x, network)
    expected_x, expected = gradients(network(x, t, cond), x, network)
    assert torch.equal(of_x0[0], expected_x) and equal(of_x0[1], expected)
    assert set(of_parameters) < set(expected)


@pytest.mark.parametrize("name, layer", CASES)
def test_a_native_sample_has_the_map_that_the_bottleneck_states(name, layer):
    network = denoiser(name).network
    bottleneck = network.bottleneck(layer)
    assert name in UNETS or network.bottleneck("encoder") == bottleneck
    assert bottleneck.module is module_at(name, layer) is bottleneck_of(denoiser(name), layer).module
    x, t, cond = inputs(name, network.native_shape, count=1)
    with torch.no_grad():
        assert features_of(denoiser(name), x, t, cond, layer).shape == (1, bottleneck.channels, *bottleneck.size)


@pytest.mark.parametrize("layer", ["middle", "encoder"])
def test_an_odd_size_is_rounded_up(layer):
    network = WRAPPERS["UNet2DConditionModel"].of(FAMILIES["sd15"].model(sample_size=(9, 10)))
    x, t, cond = inputs("sd15", (4, 9, 10))
    features = features_of(NetworkDenoiser(network, VariancePreserving(), "eps"), x, t, cond, layer)
    assert network.bottleneck(layer).size == (5, 5) == features.shape[2:]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dit"])
def test_samples_of_another_shape(name):
    """Wide ones, of which the tokens are not to be put together the other way round; DiT takes its own alone."""
    x, t, cond = inputs(name)
    x = torch.cat([x, x[..., :4]], dim=-1)[..., :4, :]
    with torch.no_grad():
        x0, expected = reference(name, "middle", x, t, cond)
        features = features_of(denoiser(name), x, t, cond)
    factor = PLACES[name][2]
    assert features.shape == (2, PLACES[name][1], 4 // factor, 12 // factor)
    assert torch.equal(features, expected) and x0.shape == x.shape


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNETS])
def test_tokens_are_put_where_their_patches_are(name):
    """With no way from token to token left, a place of the map depends on its own patch of the sample alone."""
    network, (x, t, cond) = denoiser(name), inputs(name)
    if name != "dit":
        x = torch.cat([x, x[..., :4]], dim=-1)
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    mixing = ("to_out.0.weight", "to_out.0.bias", "conv_point.weight", "proj_out.weight")
    try:
        with torch.no_grad():
            for key, value in network.named_parameters():
                if key.endswith(mixing) and "blocks." in key:
                    value.zero_()
        patch, x = PLACES[name][2], x.requires_grad_()
        features = features_of(network, x, t, cond)
        (gradient,) = torch.autograd.grad(features[:, :, 1, 2].square().sum(), x)
    finally:
        network.load_state_dict(kept)
    inside = torch.zeros(x.shape[-2:], dtype=torch.bool)
    inside[patch : 2 * patch, 2 * patch : 3 * patch] = True
    assert gradient[..., inside].abs().min() > 0 and not gradient[..., ~inside].any()


def test_the_middle_of_many_blocks():
    """Half of the blocks are computed, counting Flux' single ones; the text's tokens are no part of the map."""
    tiny = FAMILIES["flux"]
    network = WRAPPERS[tiny.model_class].of(tiny.model(num_layers=2, num_single_layers=4))
    assert network.bottleneck().module is network.model.single_transformer_blocks[0]
    x, t, cond = inputs("flux")
    deep = NetworkDenoiser(network, RectifiedFlow()).eval()
    kept: list[Any] = []
    handle = network.model.single_transformer_blocks[0].register_forward_hook(lambda *args: kept.append(args[2][1]))
    with torch.no_grad():
        features = features_of(deep, x, t / 1000, cond)
    handle.remove()
    assert torch.equal(features, as_map("flux", kept[0], tuple(x.shape)))
    four = WRAPPERS["DiTTransformer2DModel"].of(FAMILIES["dit"].model(num_layers=4))
    assert four.bottleneck().module is four.model.transformer_blocks[1]


# -------------------------------------------------------------------------------------------- under what training adds


@pytest.mark.parametrize("call", [features_of, lambda *args: denoise_with_features(*args)[1]], ids=["alone", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(name, call):
    """Also not what is saved for gradients afterwards: no part of an interrupted forward stays at work."""
    network = NetworkDenoiser(WRAPPERS[FAMILIES[name].model_class].of(FAMILIES[name].model()), VariancePreserving(), "eps")
    x, t, cond = inputs(name)
    x.requires_grad_()
    expected_x, expected = gradients(call(network.eval(), x, t, cond), x, network)
    network.network.model.enable_gradient_checkpointing()
    gc.disable()
    try:
        features = call(network.train(), x, t, cond)
        after = torch.ones(3, requires_grad=True).exp()
        assert after.grad_fn._saved_result.data_ptr() == after.data_ptr()
    finally:
        gc.enable()
    of_x, of_parameters = gradients(features, x, network)
    torch.testing.assert_close(of_x, expected_x)
    assert of_parameters.keys() == expected.keys()
    for key, value in of_parameters.items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_lora_layers_are_read_and_trained(name):
    base = NetworkDenoiser(WRAPPERS[FAMILIES[name].model_class].of(FAMILIES[name].model()), VariancePreserving(), "eps")
    x, t, cond = inputs(name)
    student = start_student(base, LoRA(2)).eval()
    assert torch.equal(features_of(student, x, t, cond), features_of(base.eval(), x, t, cond))
    features_of(student, x, t, cond).sum().backward()
    moved = [key for key, value in student.named_parameters() if value.grad is not None]
    assert moved and all("lora_" in key for key in moved)
    assert not [key for key in moved if "up_blocks" in key or "transformer_blocks.1" in key and name == "sd3"]


@pytest.mark.parametrize("name", ["sd15", "dit", "adm", "edm2"])
def test_autocast(name):
    """The network computes in bfloat16; features are handed on in float32."""
    x, t, cond = inputs(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = reference(name, "middle", x, t, cond)
        features = features_of(denoiser(name), x, t, cond)
        x0, again = denoise_with_features(denoiser(name), x, t, cond)
    assert features.dtype == again.dtype == torch.float32
    assert torch.equal(features, expected[1].float()) and torch.equal(again, features) and torch.equal(x0, expected[0])
    exact = features_of(denoiser(name), x, t, cond)
    assert 0 < (features - exact).abs().max() < 0.1 * exact.abs().max()


def test_float64_stays():
    network = NetworkDenoiser(EDM_NETWORKS["ddpmpp"]().double(), VarianceExploding(), "edm")
    x, t, cond = inputs("ddpmpp")
    assert features_of(network, x.double(), t.double(), cond).dtype == torch.float64


def test_a_compiled_network_is_read_as_it_was_written():
    """Compiled code does not know of hooks that come later. It stays as it is, and is not compiled again."""
    network = NetworkDenoiser(WRAPPERS["UNet2DModel"].of(FAMILIES["ddpm"].model()), VariancePreserving(), "eps").eval()
    x, t, cond = inputs("ddpm")
    with torch.no_grad():
        expected = features_of(network, x, t, cond)
        compiled: list[Any] = []
        network.network.model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
        x0 = network(x, t, cond)
        graphs = len(compiled)
        assert torch.equal(features_of(network, x, t, cond), expected)
        both = denoise_with_features(network, x, t, cond)
        assert torch.equal(network(x, t, cond), x0)
    torch.testing.assert_close(both[0], x0)
    assert torch.equal(both[1], expected)
    assert len(compiled) == graphs > 0


def test_a_view_under_another_schedule_is_read_where_it_calls_the_network():
    base, (x, _, cond) = denoiser("sd15"), inputs("sd15")
    t = torch.tensor([0.2, 0.9])
    view = base.under(RectifiedFlow())
    seen: list[Any] = []
    handle = base.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        features = features_of(view, x, t, cond)
        x0, again = denoise_with_features(view, x, t, cond)
        handle.remove()
        assert not torch.equal(seen[0][0], x)
        assert torch.equal(features, features_of(base, *seen[0], cond)) and torch.equal(again, features)
        assert torch.equal(x0, view(x, t, cond))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("call", [features_of, denoise_with_features])
@pytest.mark.parametrize("name", ["sd15", "flux", "edm2"])
def test_no_hook_stays_behind(name, call):
    network, (x, t, cond) = denoiser(name), inputs(name)
    before = hooks(network)
    with torch.no_grad():
        call(network, x, t, cond)
    assert hooks(network) == before
    handle = module_at(name, "middle").register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(network, x, t, cond)
    handle.remove()
    with pytest.raises(KeyError):
        call(network, x, t, {})
    assert hooks(network) == before


def test_guided_pairs_are_refused():
    x, t, cond = inputs("dit")
    rule = ClassifierFreeGuidance(2.0)(denoiser("dit"), FAMILIES["dit"].cond(2)[1])
    refused: list[Denoiser] = [rule, rule.under(RectifiedFlow())]
    for guided in refused:
        for call in (features_of, denoise_with_features):
            with pytest.raises(ValueError, match="features of a GuidedDenoiser are not defined"):
                call(guided, x, t, cond)


def test_what_has_no_such_layer_is_refused():
    x, t, cond = inputs("sd15")
    with pytest.raises(ValueError, match="Gaussian"):
        features_of(Gaussian(VariancePreserving(), torch.zeros(4, 8, 8), torch.ones(4, 8, 8)), x, t, cond)
    plain = NetworkDenoiser(nn.Conv2d(4, 4, 1), RectifiedFlow())
    with pytest.raises(ValueError, match="Conv2d does not say where"):
        features_of(plain, x, t, cond)
    with pytest.raises(ValueError, match="UNet2D does not say where"):
        Network.bottleneck(denoiser("ddpm").network)
    headless = NetworkDenoiser(
        WRAPPERS["UNet2DConditionModel"].of(FAMILIES["sd15"].model(mid_block_type=None)), VariancePreserving(), "eps"
    )
    with pytest.raises(ValueError, match="no middle block; give layer='encoder'"):
        features_of(headless, x, t, cond)
    assert features_of(headless, x, t, cond, "encoder").shape == (2, 16, 4, 4)
