"""Extra scalar inputs and adapters: without effect at first, their own in every copy, felt once they are trained, and gone
without a trace when they are detached."""

from __future__ import annotations

import copy
import json

import adapted
import pytest
import torch
from families import FAMILIES
from torch import nn

from distill.adapters import (
    Adapter,
    AttachedAdapter,
    AttentionGuidance,
    ScalarInput,
    adapter_of,
    find_modules,
    required,
    sinusoid,
)
from distill.denoiser import NetworkDenoiser
from distill.ema import EMA, DecayAveraging
from distill.export.networks import check_network
from distill.networks.unet2d import UNet2D
from distill.pretrained import check_exportable
from distill.schedules import RectifiedFlow
from distill.types import label_conditions

COND, _ = label_conditions(torch.tensor([0, 2]), 3)
GUIDANCE = {**COND, "guidance": torch.tensor([2.0, 5.0])}


def network() -> UNet2D:
    return UNet2D(1, 8, 3, (8, 16), layers_per_block=1, attention=(False, False), groups=4).eval()


def call(net: UNet2D, cond) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return net(torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([10.0, 500.0]), cond)


def moved(net: UNet2D) -> UNet2D:
    """With a trained projection."""
    nn.init.normal_(net.scalars["guidance"].projection.weight)
    return net


def test_sinusoid_is_that_of_latent_consistency_models():
    """Frequencies 10000^(-j / (half - 1)), sines then cosines, as diffusers' training script embeds w."""
    half, value = 4, torch.tensor([0.0, 7.0])
    angles = value.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    torch.testing.assert_close(sinusoid(value, 8).double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-6)


def test_no_effect_at_first():
    net = network()
    plain, keys = call(net, COND), set(net.model.state_dict())
    net.add_scalar_input("guidance")
    assert torch.equal(call(net, GUIDANCE), plain) and set(net.model.state_dict()) == keys
    # It can learn: the first gradient is not zero.
    net(torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]), GUIDANCE).square().sum().backward()
    assert float(net.scalars["guidance"].projection.weight.grad.abs().sum()) > 0


def test_projection_of_the_scaled_value_is_added_to_what_the_time_embedding_is_made_of():
    """MLP(time + W sinusoid(1000 (scale - 1))); each sample has its own."""
    embedding = nn.Sequential(nn.Linear(3, 6), nn.SiLU())
    scalar = ScalarInput(embedding, 3, origin=1.0, dimension=8)
    time = torch.randn(2, 3)
    scalar.value = torch.tensor([1.0, 1.0])
    layers = nn.Sequential(*embedding)  # without the hook
    nn.init.normal_(scalar.projection.weight)
    scalar.value = torch.tensor([1.003, 3.5])
    added = sinusoid(1000 * (scalar.value - 1.0), 8) @ scalar.projection.weight.T
    torch.testing.assert_close(embedding(time), layers(time + added))


def test_value_matters_once_trained():
    net = network()
    net.add_scalar_input("guidance")
    plain = call(moved(net), GUIDANCE)
    other = call(net, {**COND, "guidance": torch.tensor([2.0, 6.0])})
    assert torch.equal(plain[0], other[0]) and not torch.isclose(plain[1], other[1]).all()


def test_deep_copies_hook_their_own():
    net = network()
    net.add_scalar_input("guidance")
    twin = moved(copy.deepcopy(net))
    before = call(net, GUIDANCE)
    assert not torch.equal(call(twin, GUIDANCE), before)
    # The twin's call and its weights leave the first as it was, and no value is shared.
    call(twin, {**COND, "guidance": torch.tensor([9.0, 9.0])})
    assert torch.equal(call(net, GUIDANCE), before) and net.scalars["guidance"].value.tolist() == [2.0, 5.0]


def test_adding_twice_is_once():
    net = network()
    net.add_scalar_input("guidance")
    first = call(moved(net), GUIDANCE)
    net.add_scalar_input("guidance")
    assert torch.equal(call(net, GUIDANCE), first)


def test_missing_value_is_named():
    net = network()
    net.add_scalar_input("guidance")
    with pytest.raises(ValueError, match=r"cond\['guidance'\] is missing"):
        call(net, COND)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"channels": (8, 16), "attention": (True,)}, "attention="),
        ({"channels": (8, 18), "attention": (True, True)}, "channels="),
        ({"sample_size": 7, "channels": (8, 16)}, "sample_size=7"),
    ],
)
def test_bad_networks_are_named(settings, key):
    with pytest.raises(ValueError, match=key):
        UNet2D(**settings)


# ------------------------------------------------------------------------------------------- everything that is attached


@pytest.mark.parametrize("family", FAMILIES)
def test_all_additions_change_nothing_at_first_learn_alone_and_leave_no_trace(family):
    """LoRA layers, scalar input and every adapter together, in each family."""
    teacher = adapted.base(family)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    plain = adapted.call(teacher, family)
    student = adapted.student(teacher, family)
    assert torch.equal(adapted.call(student, family), plain)
    assert "guidance" in student.scalar_inputs and student.scalar_inputs.count("guidance") == 1
    # Gradients reach the additions, all parts of them in three steps, and nothing else.
    own = {id(weight) for weight in teacher.parameters()}
    trained = adapted.train(student, family)
    assert not own & {id(weight) for weight in trained} and all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in trained)
    parts = [name for name in added(student.network) if float(student.network.get_parameter(name).grad.abs().max()) > 0]
    assert {name.split(".")[0] for name in parts} >= {"adapters", "model"}
    assert {name.split(".")[1] for name in parts if name.startswith("adapters")} == set(student.network.adapters)
    assert not torch.isclose(adapted.call(student, family), plain).all()
    assert unchanged(teacher, state)
    student.network.detach_adapters()
    assert unchanged(student, state) and torch.equal(adapted.call(student, family), plain)
    assert student.scalar_inputs == teacher.scalar_inputs
    names = [name for name, _ in student.network.named_modules()]
    assert names == [name for name, _ in teacher.network.named_modules()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    assert not any(getattr(module, kind) for module in student.modules() for kind in kinds)


def added(net) -> list[str]:
    return [name for name, weight in net.named_parameters() if weight.requires_grad]


def unchanged(denoiser, state: dict[str, torch.Tensor]) -> bool:
    now = denoiser.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())


def test_an_average_of_a_student_has_additions_of_its_own_on_the_same_weights():
    teacher = adapted.base("sd15")
    student = adapted.student(teacher, "sd15")
    average = EMA(student, DecayAveraging(0.5, warmup=False))
    adapted.train(student, "sd15")
    after = adapted.call(student, "sd15")
    assert torch.equal(adapted.call(average.module, "sd15"), adapted.call(teacher, "sd15"))
    average.update(student, 0, 1)
    own = {id(weight) for weight in teacher.parameters()}
    assert own <= {id(weight) for weight in average.module.parameters()}
    changed = adapted.call(average.module, "sd15")
    assert not torch.equal(changed, adapted.call(teacher, "sd15")) and not torch.equal(changed, after)
    average.module.network.detach_adapters()
    assert torch.equal(adapted.call(average.module, "sd15"), adapted.call(teacher, "sd15"))
    assert torch.equal(adapted.call(student, "sd15"), after)


class Shift(Adapter):
    """Adds the guidance scale to what a module gives."""

    name = "shift"

    def build(self, network):
        return AttachedShift(self, network)


class AttachedShift(AttachedAdapter):
    scalar_inputs = ("guidance", "gamma")

    def __init__(self, settings, network):
        super().__init__(settings)
        for module in find_modules(network, ["conv_out"], (), "adapter.targets").values():
            self.after(module, self.shift)

    def read(self, x, time, cond):
        self.call["scale"] = required(cond, "guidance")

    def shift(self, module, args, kwargs, output):
        return output + self.call["scale"][:, None, None, None]


def test_adapters_of_ones_own():
    net = network()
    plain = call(net, COND)
    net.add_adapter(Shift())
    torch.testing.assert_close(call(net, GUIDANCE), plain + torch.tensor([2.0, 5.0])[:, None, None, None])
    denoiser = NetworkDenoiser(net, RectifiedFlow())
    assert denoiser.scalar_inputs == ("guidance", "gamma")
    net.add_scalar_input("guidance")
    assert denoiser.scalar_inputs == ("guidance", "gamma")
    with pytest.raises(ValueError, match=r"cond\['guidance'\] is missing"):
        call(net, COND)
    with pytest.raises(ValueError, match="one of this kind already"):
        net.add_adapter(Shift())
    net.detach_adapters()
    assert torch.equal(call(net, COND), plain) and denoiser.scalar_inputs == ()


def test_hooks_that_copies_would_share_are_refused():
    net = network()
    adapter = net.add_adapter(Shift())
    for hook in (lambda *args: None, AttachedShift(Shift(), net).shift):
        with pytest.raises(TypeError, match="copies of the network would share it"):
            adapter.after(net.model, hook)


def test_modules_are_found_by_the_ends_of_their_paths():
    net = network()
    found = find_modules(net, ["mid_block.resnets.0.conv1", "conv_out"], (), "key")
    assert list(found) == ["mid_block.resnets.0.conv1", "conv_out"] and found["conv_out"] is net.model.conv_out
    # Whole names only, and the usual ones may be missing.
    assert list(find_modules(net, None, ("out", "conv_out"), "key")) == ["conv_out"]
    with pytest.raises(ValueError, match=r"key=\['out'\]: no module of UNet2DModel"):
        find_modules(net, ["out", "conv_out"], (), "key")
    with pytest.raises(ValueError, match="key=None: UNet2DModel has none of"):
        find_modules(net, None, ("out",), "key")


def test_settings_survive_json():
    for settings in (AttentionGuidance("additive", 8, ["attn1"], 2.0), AttentionGuidance(tokens=3), *adapted.adapters("sd15")):
        assert adapter_of(json.loads(json.dumps(settings.as_dict()))) == settings
    with pytest.raises(ValueError, match="adapter class='Other' is not known here; known are AttentionGuidance, GuideNetwork"):
        adapter_of({"class": "Other"})
    with pytest.raises(ValueError, match="AttentionGuidance does not take it"):
        adapter_of({"class": "AttentionGuidance", "depth": 3})


def test_a_folder_of_diffusers_cannot_hold_adapters(tmp_path):
    student = adapted.base("ddpm")
    student.network.add_adapter(AttentionGuidance(width=8))
    for refusing in (check_exportable, lambda denoiser: check_network(denoiser.network)):
        with pytest.raises(ValueError, match=r"adapters \(attention_guidance\).*save_adapters"):
            refusing(student)
