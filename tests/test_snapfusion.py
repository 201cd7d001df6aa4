"""SnapFusion: guided on both sides or on neither, with gradient; a loss on data of a given share; sampled guided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SHAPE, Watch, batch_of, fit, same, small
from torch import Tensor, nn

from distill.denoiser import NetworkDenoiser
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.guidance import CfgPlusPlus, ClassifierFreeGuidance
from distill.halving import two_step_target
from distill.methods.snapfusion import SnapFusion
from distill.noise import SeededNoise
from distill.optimization import Optimization
from distill.samplers import OdeSampler
from distill.solvers import DDIM
from distill.types import Batch, DataSpec
from distill.weights import TruncatedSnrWeight


def snapfusion(teacher: NetworkDenoiser | None = None, **settings: Any) -> SnapFusion:
    optimization = Optimization(
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2), averaging=DecayAveraging(0.0, warmup=False)
    )
    rounds = [settings.pop(name, value) for name, value in (("start", 2), ("end", 1), ("lengths", [1, 3]))]
    scales = settings.pop("guidance_range", (2.0, 6.0))
    teacher = teacher or small(num_classes=2, width=8)
    return SnapFusion(teacher, *rounds, scales, optimization, Evaluation(), **settings)


def another_student(method: SnapFusion) -> SnapFusion:
    """The student is not its teacher."""
    method.student = small(num_classes=2, width=8, seed=7)
    return method


def by_hand(method: SnapFusion, batch: Batch, guided: bool) -> Tensor:
    """L_d, with the draws of `distillation`: the scales last."""
    torch.manual_seed(3)
    steps = method.halved.draw(batch.x0)
    x_t = method.schedule.add_noise(batch.x0, batch.noise, steps.t)
    teacher, student = method.teacher, method.student
    if guided:
        rule = ClassifierFreeGuidance(2 + 4 * torch.rand(len(x_t)))
        teacher, student = rule(teacher, batch.null), rule(student, batch.null)
    target = two_step_target(teacher, x_t, steps, batch.cond)
    errors = (student(x_t, steps.t, batch.cond) - target).square().mean((1, 2, 3))
    return (TruncatedSnrWeight()(method.schedule, steps.t, steps.end) * errors).mean()


def loss(method: SnapFusion, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return method.losses(batch)


@pytest.mark.parametrize(("share", "guided"), [(1.0, True), (1e-9, False)])
def test_teacher_and_student_are_guided_at_the_same_scales_or_neither_is(share, guided):
    method, batch = another_student(snapfusion(guided_share=share, denoising_share=0.0)), batch_of(1)
    found = loss(method, batch)
    torch.testing.assert_close(found["loss"], by_hand(method, batch, guided), rtol=1e-5, atol=0)
    assert (found["loss"] - by_hand(method, batch, not guided)).abs() > 1e-4 and set(found) == {"loss"}


def test_the_students_null_prediction_is_trained_too():
    """Of what the null class embeds alone, a guided batch has a gradient and a plain one has none."""
    for share, moves in ((1.0, True), (1e-9, False)):
        method = another_student(snapfusion(guided_share=share, denoising_share=0.0))
        loss(method, batch_of(1))["loss"].backward()
        assert bool(method.student.network.labels.weight.grad[2].any()) == moves


def test_the_loss_is_zero_at_the_exact_student_and_not_elsewhere():
    """Of a teacher whose estimate does not change along the way, the teacher itself, guided as it is."""

    class Constant(nn.Module):
        shape, num_classes = SHAPE, 2

        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor([0.3, -0.2]))

        def forward(self, x: Tensor, time: Tensor, cond: dict, r: Tensor | None = None) -> Tensor:
            return self.value.reshape(SHAPE).expand_as(x) * (1 + cond["labels"].reshape(-1, 1, 1, 1))

    teacher = NetworkDenoiser(Constant(), small().schedule, "x0")
    method = snapfusion(teacher, guided_share=1.0, denoising_share=0.0)
    exact = float(loss(method, batch_of(1))["loss"].detach())
    method.student.network.value.data += 0.01
    assert exact < 1e-11 and float(loss(method, batch_of(1))["loss"].detach()) > 1e-5


def test_the_loss_on_data_has_its_share_and_its_gradient():
    """L = L_d + g L_o with g L_o = share L_d, and g a constant to the gradient."""
    method, batch = another_student(snapfusion(guided_share=1.0, denoising_share=0.4, null_probability=0.0)), batch_of(1)
    found, parameters = loss(method, batch), list(method.student.parameters())
    of_distillation = torch.autograd.grad(found["distillation"], parameters, retain_graph=True)
    of_data = torch.autograd.grad(found["denoising"], parameters, retain_graph=True)
    of_both = torch.autograd.grad(found["loss"], parameters)
    torch.testing.assert_close(found["loss"], 1.4 * found["distillation"])
    balance = 0.4 * float(found["distillation"].detach() / found["denoising"].detach())
    for each, one, other in zip(of_both, of_distillation, of_data, strict=True):
        torch.testing.assert_close(each, one + balance * other, rtol=1e-4, atol=1e-6)
    # The denoising loss is that of the flow: eps - x0.
    torch.manual_seed(11)
    denoising = method.denoising(batch)
    torch.manual_seed(11)
    s, eps = torch.rand(len(batch)), torch.randn_like(batch.x0)
    x_s = method.schedule.add_noise(batch.x0, eps, s)
    flow = method.student.network(x_s, 1000 * s, batch.cond)
    torch.testing.assert_close(denoising, (flow - (eps - batch.x0)).square().mean(), rtol=1e-5, atol=0)


def test_rows_of_a_guided_and_of_a_plain_step_in_both_rounds():
    """Later teachers are guided again: the student is not guided by itself."""
    for share, rows in ((1.0, 16), (1e-9, 8)):
        for steps in (0, 2):
            method = snapfusion(guided_share=share)
            if steps:
                fit(method, [batch_of(0), batch_of(1)], steps)
            log: dict[str, list[int]] = {"teacher": [], "student": []}
            for name, module in (("teacher", method.round_teacher), ("student", method.student)):
                module.network.register_forward_pre_hook(lambda _, args, name=name: log[name].append(len(args[0])))
            method.losses(batch_of(0))
            assert log == {"teacher": [rows, rows], "student": [rows, 8]}  # the last one is the loss on data


def test_batches_are_guided_with_their_share_alike_on_all_ranks(monkeypatch):
    method, guided = snapfusion(guided_share=0.3, denoising_share=0.0), []
    rows: list[int] = []
    method.student.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    batch = batch_of(0)
    for rank in (0, 1):
        monkeypatch.setattr(SnapFusion, "global_rank", rank)
        for method.batches_seen in range(150):
            method.seed_draws()
            method.losses(batch)
        guided.append([each == 16 for each in rows])
        rows.clear()
    assert guided[0] == guided[1] and abs(sum(guided[0]) / 150 - 0.3) < 4 * (0.3 * 0.7 / 150) ** 0.5


def test_students_are_sampled_guided():
    """At the middle of the range, at the scale of a rule that is given, or at the one asked for."""
    batch = batch_of(3)
    noise_to = {}
    for name, method, scale in (
        ("middle", snapfusion(), 4.0),
        ("rule", snapfusion(guidance=ClassifierFreeGuidance(3.0)), 3.0),
        ("asked", snapfusion(), 7.0),
    ):
        method.check_data(DataSpec(SHAPE, 2))
        asked = 7.0 if name == "asked" else None
        found = {
            source: method.draw(2, range(8), batch.cond, batch.null, source=source, guidance=asked)
            for source in ("student", "ema")
        }
        noise = SeededNoise(0, range(8), SHAPE).draw(torch.device("cpu"))
        guided = ClassifierFreeGuidance(scale)(method.student, batch.null)
        with torch.no_grad():
            expected = OdeSampler(DDIM(), method.grid)(guided, noise, batch.cond, 2)
        torch.testing.assert_close(found["student"], expected, rtol=0, atol=1e-6)
        assert found["ema"].equal(found["student"])
        noise_to[name] = expected
    assert not noise_to["middle"].equal(noise_to["rule"])


def test_four_steps_move_the_student_alone_and_hand_over():
    method, watch = snapfusion(guided_share=1.0), Watch()
    teacher = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    fit(method, [batch_of(number, tied=False) for number in range(4)], 4, watch)
    assert all(watch.moved(batch, "student") for batch in range(4)) and not watch.moved(2, "previous")
    assert same(teacher, method.teacher.state_dict())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(guidance_range=(6.0, 2.0)), "guidance_range="),
        (dict(guided_share=0.0), "guided_share=0.0, .* without guidance in training, take Progressive"),
        (dict(guided_share=1.5), "guided_share=1.5"),
        (dict(denoising_share=-0.1), "denoising_share=-0.1"),
        (dict(null_probability=1.0), "null_probability=1.0"),
        (dict(start=3), "start_steps=3"),
        (dict(guidance=CfgPlusPlus(0.6)), "SnapFusion: CfgPlusPlus goes on with a noise"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        snapfusion(**settings)


def test_a_teacher_that_reads_a_scale_is_refused():
    teacher = small(num_classes=2)
    teacher.network.add_scalar_input("guidance")
    with pytest.raises(ValueError, match="teacher reads a guidance scale by itself.*take Progressive"):
        snapfusion(teacher)
