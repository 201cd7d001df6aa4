"""Students of LoRA layers or adapters: equal to their teacher at first, on its very weights; additions alone are trained and
saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import evaluation, fit

from distill.adapter_files import additions
from distill.adapters import Adapter, AttentionGuidance, GuideNetwork
from distill.denoiser import NetworkDenoiser
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.lora import LoRA, read_guidance, start_student
from distill.methods.consistency import Consistency
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.schedules import RectifiedFlow
from distill.solvers import DDIM
from distill.types import Batch, label_conditions

SHAPE = (1, 8, 8)


def teacher(seed: int = 0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    network = UNet2D(1, 8, 3, (8, 16), layers_per_block=1, attention=(False, True), heads_width=8, groups=4)
    return NetworkDenoiser(network, RectifiedFlow(), "flow")


def batch(number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return Batch(torch.randn(4, *SHAPE, generator=generator), *label_conditions(torch.arange(4) % 3, 3))


def method(base: NetworkDenoiser | None = None, **settings: Any) -> Consistency:
    settings = {"lora": LoRA(4), "guidance": ClassifierFreeGuidance(1.5)} | settings
    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)),
        SquaredDistance(),
        Optimization(
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
            averaging=DecayAveraging(0.9),
            gradient_checkpointing=settings.pop("gradient_checkpointing", False),
            compile=settings.pop("compile", False),
        ),
        evaluation(steps=[1]),
        teacher=base or teacher(),
        solver=DDIM(),
        **settings,
    )


def call(denoiser: Any, guidance: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(3, *SHAPE, generator=generator)
        cond = {**label_conditions(torch.arange(3), 3)[0], "guidance": torch.full((3,), guidance)}
        return denoiser.eval()(x, torch.tensor([0.2, 0.5, 0.9]), cond)


def test_a_student_equals_its_teacher_at_first_and_holds_no_copy_of_its_weights():
    base = teacher()
    student = start_student(base, LoRA(4))
    assert torch.equal(call(student), call(base))
    own = {id(parameter) for parameter in base.parameters()}
    added = [(name, value) for name, value in student.named_parameters() if id(value) not in own]
    assert own <= {id(value) for value in student.parameters()}
    assert added and all("lora_" in name and value.requires_grad for name, value in added)
    assert all(value.requires_grad is (id(value) not in own) for value in student.parameters())


def test_rank_and_alpha_are_those_asked_for():
    """A layer's weight becomes ``W + alpha / rank B A``."""
    base = teacher()
    student = start_student(base, LoRA(rank=3, alpha=12, targets=["to_q"]))
    layer = next(module for name, module in student.network.model.named_modules() if name.endswith("attentions.0.to_q"))
    down, up = layer.lora_A["student"].weight, layer.lora_B["student"].weight
    assert down.shape[0] == up.shape[1] == 3
    with torch.no_grad():
        up.normal_()
        x = torch.randn(2, down.shape[1])
        expected = layer.base_layer(x) + 4.0 * x @ down.T @ up.T
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_only_the_layers_move_and_the_teacher_keeps_its_bits():
    base = teacher()
    before = copy.deepcopy(base.state_dict())
    trained = method(base)
    outputs = call(trained.teacher)
    fit(trained, [batch(n) for n in range(3)], 3)
    assert all(value.equal(before[name]) for name, value in base.state_dict().items())
    assert torch.equal(call(trained.teacher), outputs)
    for denoiser in (trained.student, trained.ema.module):
        moved = [name for name, value in denoiser.named_parameters() if "lora_B" in name and value.abs().sum() > 0]
        assert len(moved) == len([name for name, _ in denoiser.named_parameters() if "lora_B" in name])
    assert not torch.equal(call(trained.student), outputs)


def test_a_checkpoint_holds_the_layers_alone_and_loads_strictly():
    first, second = method(), method()
    fit(first, [batch(n) for n in range(2)], 2)
    state = first.state_dict()
    parts = ("skipped.",)
    assert all("lora_" in key or key.startswith(parts) for key in state), [key for key in state if "lora_" not in key]
    assert any(key.startswith("ema.") for key in state)
    second.load_state_dict(state)
    assert torch.equal(call(second.student), call(first.student))
    missing = next(key for key in state if key.startswith("student."))
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({key: value for key, value in state.items() if key != missing})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        second.load_state_dict({**state, "student.else": torch.zeros(1)})


def test_a_copy_that_is_trained_whole_is_saved_whole():
    whole = method(lora=None)
    state = whole.state_dict()
    assert {key for key in state if key.startswith("student.")} == {f"student.{key}" for key in whole.student.state_dict()}


@pytest.mark.parametrize("lora", [None, LoRA(4)])
def test_a_teacher_in_bfloat16_leaves_its_student_in_float32(lora):
    base, exact = teacher(), teacher()
    base.frozen_dtype = torch.bfloat16
    trained = method(base, lora=lora)
    assert {value.dtype for value in trained.teacher.parameters()} == {torch.bfloat16}
    own = {id(value) for value in trained.teacher.parameters()}
    assert {value.dtype for value in trained.student.parameters() if id(value) not in own} == {torch.float32}
    if lora is None:
        assert torch.equal(call(trained.student), call(exact))
    x0 = call(trained.teacher)
    assert x0.dtype == torch.float32 and 0 < (x0 - call(exact)).abs().max() < 0.1
    fit(trained, [batch()], 2)
    assert torch.isfinite(call(trained.student)).all()


def test_a_frozen_teacher_computes_in_its_own_precision_also_under_autocast():
    base = teacher()
    base.frozen_dtype = torch.bfloat16
    trained = method(base, lora=None)
    plain = call(trained.teacher)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(call(trained.teacher), plain)
    assert trained.teacher.own_precision and not trained.student.own_precision


def test_lora_on_a_float16_teacher_is_refused():
    base = teacher()
    base.frozen_dtype = torch.float16
    with pytest.raises(ValueError, match="model.teacher.dtype=float16.*precision=bf16-mixed"):
        fit(method(base), [batch()], 1)


def gradients(trained: Consistency) -> list[torch.Tensor]:
    trained.seed_draws = lambda stream="": torch.manual_seed(len(stream))  # type: ignore[method-assign]
    trained.seed_draws()
    trained.losses(batch())["loss"].backward()
    return [value.grad.clone() for value in trained.student.parameters() if value.grad is not None]


@pytest.mark.parametrize("lora", [None, LoRA(4)])
def test_checkpointed_activations_give_the_same_gradients(lora):
    runs = [method(teacher(), lora=lora, gradient_checkpointing=on) for on in (False, True)]
    runs[1].student.load_state_dict(runs[0].student.state_dict())
    plain, again = (gradients(run) for run in runs)
    assert [run.student.network.model.is_gradient_checkpointing for run in runs] == [False, True]
    assert plain and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_checkpointing_of_other_networks_is_refused():
    from helpers import small

    with pytest.raises(ValueError, match="gradient_checkpointing=true"):
        Consistency(
            GridPairs(UniformGrid(), ConstantPoints(8)),
            SquaredDistance(),
            Optimization(gradient_checkpointing=True),
            evaluation(steps=[1]),
            student=small(),
        )


def test_compiled_and_plain_checkpoints_are_the_same(monkeypatch):
    """``torch.compile`` with a backend that only counts: the names of the weights are what is tested."""
    compiled = []
    real = torch.compile

    def counting(function: Any, *args: Any, **settings: Any) -> Any:
        compiled.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", counting(self._call_impl))
    )
    first, second = method(compile=True), method()
    fit(first, [batch(n) for n in range(2)], 2)
    assert len(compiled) == 3
    assert first.state_dict().keys() == second.state_dict().keys()
    second.load_state_dict(first.state_dict())
    assert torch.allclose(call(second.student), call(first.student), atol=1e-6)
    third = method(compile=True)
    third.load_state_dict(second.state_dict())


def test_what_cannot_be_adapted_is_named():
    from helpers import small, two_classes

    with pytest.raises(ValueError, match=r"lora.targets=\['to_z'\]"):
        start_student(teacher(), LoRA(targets=["to_q", "to_z"]))
    with pytest.raises(ValueError, match="lora: only networks of diffusers"):
        start_student(small(), LoRA())
    with pytest.raises(ValueError, match="adapter: only networks of diffusers"):
        start_student(small(), None, AttentionGuidance())
    with pytest.raises(ValueError, match=r"guidance_range=\(1, 2\): the student's network cannot take"):
        read_guidance(two_classes(), "guidance_range=(1, 2)")
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="model.student and model.lora"):
        method(student=teacher())


# ------------------------------------------------------------------------------------------------------------- adapters


def guided(base: NetworkDenoiser, lora: LoRA | None, adapter: Adapter | None) -> Consistency:
    """A method whose student is made of additions and reads a drawn guidance scale."""
    return method(base, student=start_student(base, lora, adapter), lora=None, guidance=None, guidance_range=(1.0, 4.0))


@pytest.mark.parametrize(
    ("lora", "adapter"),
    [(None, AttentionGuidance(width=8)), (LoRA(4), None), (LoRA(4), GuideNetwork(width=8))],
)
def test_a_checkpoint_of_a_student_of_additions_holds_them_alone(lora, adapter):
    first, second = (guided(teacher(), lora, adapter) for _ in range(2))
    before = copy.deepcopy(first.teacher.state_dict())
    fit(first, [batch(n) for n in range(2)], 2)
    state = first.state_dict()
    held = {key.split(".", 2)[2] for key in state if key.startswith("student.")}
    assert held == set(additions(first.student.network))
    assert {key.split(".")[0] for key in state} == {"student", "ema", "skipped"}
    assert all(torch.equal(value, before[name]) for name, value in first.teacher.state_dict().items())
    second.load_state_dict(state)
    for denoisers in ((first.student, second.student), (first.ema.module, second.ema.module)):
        assert torch.equal(*(call(denoiser, guidance=3.0) for denoiser in denoisers))
    assert not torch.equal(call(first.student, guidance=3.0), call(first.teacher))


@pytest.mark.parametrize("lora", [None, LoRA(4)])
def test_the_scale_is_read_by_the_adapter_or_by_an_input_that_is_trained(lora):
    base = teacher()
    adapted = start_student(base, lora, AttentionGuidance(width=8))
    read_guidance(adapted, "guidance_range=(1, 4)")
    assert adapted.scalar_inputs == ("guidance",) and not adapted.network.scalars
    plain = start_student(base, LoRA(4))
    read_guidance(plain, "guidance_range=(1, 4)")
    assert plain.scalar_inputs == ("guidance",)
    assert [value.requires_grad for value in plain.network.scalars.parameters()] == [True]
    assert base.scalar_inputs == () and torch.equal(call(plain, guidance=3.0), call(base))
