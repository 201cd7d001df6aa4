"""Files of additions: exact round trips, onto another checkpoint of the same architecture, and onto no other."""

from __future__ import annotations

import json
from typing import Any

import adapted
import pytest
import torch
from torch import nn

from distill.adapter_files import METADATA, additions, load_adapters, save_adapters
from distill.adapters import AttentionGuidance
from distill.lora import LoRA, adapted_copy, read_guidance


def moved(denoiser: Any) -> Any:
    """With trained additions."""
    torch.manual_seed(1)
    for weight in denoiser.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.2)
    return denoiser


def with_parts(teacher: Any, *parts: str) -> Any:
    lora = LoRA(3, alpha=6, targets=["to_q", "to_v"], dropout=0.1) if "lora" in parts else None
    student = adapted_copy(teacher, lora, AttentionGuidance("additive", 8) if "adapters" in parts else None)
    if "scalars" in parts:
        student.network.add_scalar_input("guidance")  # type: ignore[operator, union-attr]
    return moved(student.eval())


@pytest.mark.parametrize("family", ["ddpm", "sd15", "dit"])
@pytest.mark.parametrize("parts", [("adapters",), ("scalars",), ("lora",), ("adapters", "scalars", "lora")])
def test_a_round_trip_is_exact(tmp_path, family, parts):
    teacher = adapted.base(family)
    student = with_parts(teacher, *parts)
    save_adapters(student, tmp_path / "added.safetensors")
    loaded = adapted.base(family)
    load_adapters(loaded, tmp_path / "added.safetensors")
    before, after = additions(student.network), additions(loaded.network)
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(adapted.call(loaded.eval(), family), adapted.call(student, family))
    assert not torch.isclose(adapted.call(loaded, family), adapted.call(teacher, family)).all()


def test_the_file_holds_the_additions_alone_and_says_what_they_are(tmp_path):
    from safetensors import safe_open

    teacher = adapted.base("sd15")
    teacher.identity = {"path": "teachers/one", "sha256": "12ab"}
    student = moved(adapted.student(teacher, "sd15"))
    save_adapters(student, tmp_path / "added.safetensors")
    own = {id(weight) for weight in teacher.parameters()}
    with safe_open(tmp_path / "added.safetensors", "pt") as file:
        described, names = json.loads(file.metadata()[METADATA]), set(file.keys())
    buffers = {f"adapters.attention_guidance.scale.{name}" for name in ("frequencies", "phases")}
    assert names == buffers | {name for name, value in student.network.named_parameters() if id(value) not in own}
    assert {name.split(".")[0] for name in names} == {"adapters", "scalars", "model"}
    assert described["base"] == {"path": "teachers/one", "sha256": "12ab"}
    assert [part["class"] for part in described["adapters"]] == ["AttentionGuidance", "GuideNetwork", "NegativePrompt"]
    assert described["model_class"] == "UNet2DConditionModel" and described["scalars"] == ["guidance"]
    assert described["lora"]["rank"] == 2


def test_another_checkpoint_of_the_same_architecture_takes_them(tmp_path):
    """Its own weights stay, byte by byte, and detached it is what it was."""
    student = moved(adapted.student(adapted.base("sd15"), "sd15"))
    save_adapters(student, tmp_path / "added.safetensors")
    sibling = adapted.base("sd15", seed=7, sample_size=16)
    state, plain = {name: value.clone() for name, value in sibling.state_dict().items()}, adapted.call(sibling, "sd15")
    load_adapters(sibling, tmp_path / "added.safetensors")
    out = adapted.call(sibling.eval(), "sd15")
    assert not torch.isclose(out, plain).all() and not torch.isclose(out, adapted.call(student, "sd15")).all()
    sibling.network.detach_adapters()
    now = sibling.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())
    assert torch.equal(adapted.call(sibling, "sd15"), plain)
    load_adapters(sibling, tmp_path / "added.safetensors")
    assert torch.equal(adapted.call(sibling.eval(), "sd15"), out)


def test_another_architecture_is_refused_and_stays_as_it_is(tmp_path):
    file = tmp_path / "added.safetensors"
    save_adapters(with_parts(adapted.base("sd15"), "adapters"), file)
    velocity = adapted.base("sd15")
    velocity.prediction = "eps"
    for other, message in [
        (adapted.base("dit"), "model_class='UNet2DConditionModel'.*model_class='DiTTransformer2DModel'"),
        (adapted.base("sd15", layers_per_block=2), "config.layers_per_block=1, .*config.layers_per_block=2"),
        (adapted.base("sd2"), r"config.attention_head_dim=2, .*config.attention_head_dim=\[2, 4\]"),
        (velocity, "prediction='flow', .*prediction='eps'"),
    ]:
        keys = list(other.state_dict())
        with pytest.raises(ValueError, match=message):
            load_adapters(other, file)
        assert list(other.state_dict()) == keys


def test_weights_that_do_not_fit_leave_the_network_as_it_was(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file, broken = tmp_path / "added.safetensors", tmp_path / "broken.safetensors"
    save_adapters(with_parts(adapted.base("ddpm"), "adapters", "lora", "scalars"), file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    name = "adapters.attention_guidance.time.weight"
    less = {key: value for key, value in state.items() if key != name}
    for wrong, message in [
        (less, f"{name} is only in the network"),
        (state | {"adapters.other": torch.zeros(1)}, "adapters.other is only in the file"),
        (state | {name: torch.zeros(2, 3)}, rf"{name} has shape \(2, 3\), the network needs \(8, 32\)"),
    ]:
        save_file(wrong, broken, metadata=metadata)
        denoiser = adapted.base("ddpm")
        keys = list(denoiser.state_dict())
        with pytest.raises(ValueError, match=message):
            load_adapters(denoiser, broken)
        assert list(denoiser.state_dict()) == keys


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path):
    from helpers import small
    from safetensors.torch import save_file

    file = tmp_path / "added.safetensors"
    with pytest.raises(ValueError, match="has no adapters, extra scalar inputs or LoRA layers"):
        save_adapters(adapted.base("ddpm"), file)
    with pytest.raises(ValueError, match="not on SmallNetwork"):
        save_adapters(small(), file)
    assert not file.exists()
    with pytest.raises(FileNotFoundError, match="added.safetensors"):
        load_adapters(adapted.base("ddpm"), file)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="was not written by save_adapters"):
        load_adapters(adapted.base("ddpm"), file)
    student = adapted.base("ddpm")
    read_guidance(student, "guidance_range=(1, 2)")
    save_adapters(student, file)
    with pytest.raises(ValueError, match=r"additions already \(scalars.guidance.projection.weight.*detach_adapters"):
        load_adapters(student, file)
