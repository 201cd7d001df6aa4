"""Piecewise rectified flow: its fixed point, the loss by its parts, who moves, and students that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chords import Chords, ExactFlow
from helpers import SHAPE, Watch, batch_of, energy_distance, fit, gaussian, of_part, small, two_classes
from oracle import SCHEDULES, Mixture

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.distances import PseudoHuber
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.grids import UniformGrid
from distill.guidance import ClassifierFreeGuidance, GuidanceRule
from distill.lora import LoRA
from distill.methods.piecewise_flow import PiecewiseFlow
from distill.networks.unet2d import UNet2D
from distill.noise import SeededNoise
from distill.optimization import LearningRate, Optimization
from distill.piecewise import PiecewiseLinear
from distill.samplers import OdeSampler
from distill.schedules import NoiseSchedule, RectifiedFlow, VariancePreserving
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun, Solver
from distill.types import Batch, Cond, Sample, Time, label_conditions
from distill.weights import PredictionWeight

CASES = [
    ("rf", "velocity"),
    ("rf-shift3", "velocity"),
    ("trig", "velocity"),
    ("vp-scaled", "velocity"),
    ("vp-scaled", "ddim_eps"),
    ("vp-scaled", "diff_eps"),
    ("ve", "diff_eps"),
]


def piecewise(teacher: Denoiser, solver: Solver | None = None, **settings: Any) -> PiecewiseFlow:
    settings = {"optimization": Optimization(), "evaluation": Evaluation(steps=[4]), "null_probability": 0.0} | settings
    return PiecewiseFlow(teacher, solver or DDIM(), **settings)


# --------------------------------------------------------------------------------------------------------- fixed points


def gaussian_loss(name: str, kind: Any, power: float, solver: Solver | None = None, solver_steps: int = 1) -> float:
    """The loss on Gaussian data of a student that is the piecewise linear flow with spreads to a power."""
    teacher = gaussian(SCHEDULES[name])
    torch.manual_seed(1)
    batch = Batch(teacher.data(4000).float(), {}, {})
    student = Chords(teacher, PiecewiseLinear(4, kind), power)
    method = piecewise(teacher, solver or ExactFlow(), student=student, parameterisation=kind, solver_steps=solver_steps)
    return float(method.losses(batch)["loss"])


@pytest.mark.parametrize("name, kind", CASES)
def test_loss_is_zero_at_the_exact_student_alone(name, kind):
    exact, *wrong = [gaussian_loss(name, kind, power) for power in (1.0, 0.9, 1.1)]
    print(f"{name} {kind}: loss {exact:.1e} at the exact student, {wrong} at wrong ones")
    assert exact < 1e-4 * min(wrong)


@pytest.mark.parametrize("name, kind", [("rf", "velocity"), ("vp-scaled", "ddim_eps")])
def test_loss_at_the_exact_student_falls_with_the_solvers_steps(name, kind):
    """DDIM's error in a window is of first order in its steps, the loss is the square."""
    coarse, fine = (gaussian_loss(name, kind, 1.0, DDIM(), steps) for steps in (16, 32))
    assert 3.2 < coarse / fine < 4.8


@pytest.mark.parametrize("solver", [Euler(), DDIM(), Heun(), DPMSolver2M()], ids=lambda solver: type(solver).__name__)
def test_any_solver_reaches_the_windows_ends_of_a_flow(solver):
    """From pure noise and to none, where a solver must not be called again; each sample in its own window."""
    teacher, s, e = gaussian(RectifiedFlow()), torch.tensor([1.0, 0.75, 0.5, 0.25]), torch.tensor([0.75, 0.5, 0.25, 0.0])
    x_s = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    method = piecewise(teacher, solver, solver_steps=64)
    torch.testing.assert_close(method.solve(x_s, s, e, {}, {}), teacher.flow(x_s, s, e), rtol=0, atol=0.01)


def test_a_diffusion_teacher_is_straightened_in_a_flows_time():
    """Under `RectifiedFlow` the exact student is that of the same data's flow."""
    teacher = gaussian(VariancePreserving("cosine"))
    torch.manual_seed(1)
    batch = Batch(teacher.data(4000).float(), {}, {})
    losses = []
    for power in (1.0, 0.9, 1.1):
        student = Chords(gaussian(RectifiedFlow()), PiecewiseLinear(4), power)
        method = piecewise(teacher, Heun(), schedule=RectifiedFlow(), student=student, solver_steps=16)
        losses.append(float(method.losses(batch)["loss"]))
    print(f"cosine teacher under the flow: {losses}")
    assert losses[0] < 0.02 * min(losses[1:])


def test_a_diffusion_student_is_trained_and_drawn_under_the_methods_schedule():
    """As the same student is that was put there beforehand."""
    student, batch = small(SCHEDULES["vp-scaled"], "eps", num_classes=2), batch_of(0, 32)
    losses, drawn = [], []
    for view in (student, student.under(RectifiedFlow())):
        method = piecewise(two_classes(SCHEDULES["vp-scaled"]), schedule=RectifiedFlow(), student=view, solver_steps=2)
        torch.manual_seed(3)
        losses.append(float(method.losses(batch)["loss"]))
        drawn.append(method.draw(5, range(32), batch.cond, batch.null))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*drawn)


# ------------------------------------------------------------------------------------------------- the loss, by its parts


class Seen(Mixture):
    """A teacher that keeps what it was given."""

    calls: list[tuple[Sample, Time, Cond]]

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        self.__dict__.setdefault("calls", []).append((x, t, cond))
        return super().forward(x, t, cond, r)


def seen(schedule: NoiseSchedule) -> Seen:
    return Seen(schedule, two_classes().means, 0.2)


class Listening(NetworkDenoiser):
    """A student that keeps what it was given."""

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        self.__dict__.setdefault("calls", []).append((x, t, cond))
        return super().forward(x, t, cond, r)


def listening(schedule: NoiseSchedule, prediction: Any) -> Any:
    return Listening(small(schedule, prediction, num_classes=2).network, schedule, prediction)


def scaled(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, 1, 1, 1)


def test_loss_is_the_formula_with_guidance_on_a_flow():
    """Three DDIM steps of the guided teacher in each sample's own window; the chord's velocity; a distance and a weight."""
    teacher, student, batch = seen(RectifiedFlow()), listening(RectifiedFlow(), "flow"), batch_of(0, 64)
    method = piecewise(
        teacher, student=student, solver_steps=3, guidance=ClassifierFreeGuidance(2.5), distance=PseudoHuber(0.1),
        weight=PredictionWeight("flow"),
    )  # fmt: skip
    loss = float(method.losses(batch)["loss"])
    (x_c, c, cond), s = student.calls[0], teacher.calls[0][1][:64]
    assert {round(4 * float(each), 6) for each in s} == {1, 2, 3, 4} and torch.equal(cond["labels"], batch.cond["labels"])
    x_s, e = scaled(1 - s) * batch.x0 + scaled(s) * batch.noise, s - 0.25
    assert bool(((e < c) & (c <= s)).all())
    exact, x, t = two_classes(), x_s, s
    for u in (s - 0.25 / 3, s - 0.5 / 3, e):
        x0 = exact(x, t, batch.null) * (1 - 2.5) + 2.5 * exact(x, t, batch.cond)
        x, t = x0 + scaled(u / t) * (x - x0), u
    torch.testing.assert_close(x_c, x_s + scaled((s - c) / 0.25) * (x - x_s), rtol=0, atol=1e-5)
    error = student.raw(x_c, c, batch.cond) - (x_s - x) / 0.25
    huber = (error.square().sum((1, 2, 3)) + 0.1**2).sqrt() - 0.1
    assert loss == pytest.approx(float((huber / c**2).mean()), rel=1e-3)


def test_loss_is_the_formula_without_guidance_on_ddpms_indices():
    """The student's own noise is held to the one that noises x_e to x_s."""
    schedule, batch = SCHEDULES["vp-scaled"], batch_of(0, 64)
    teacher, student = seen(schedule), listening(schedule, "eps")
    method = piecewise(teacher, student=student, solver_steps=2, parameterisation="diff_eps", windows=3)
    loss = float(method.losses(batch)["loss"])
    (x_c, c, _), s = student.calls[0], teacher.calls[0][1]
    e = s - 333
    a_s, a_e = (scaled(schedule.alpha(t)) for t in (s, e))
    x_s = a_s * batch.x0 + (1 - a_s**2).sqrt() * batch.noise
    half = DDIM().step(two_classes(schedule), x_s, s, s - 166.5, batch.cond)
    x_e = DDIM().step(two_classes(schedule), half, s - 166.5, e, batch.cond)
    torch.testing.assert_close(x_c, x_s + scaled((s - c) / 333) * (x_e - x_s), rtol=0, atol=1e-5)
    noise = (x_s - a_s / a_e * x_e) / (1 - (a_s / a_e) ** 2).sqrt()
    assert loss == pytest.approx(float((student.raw(x_c, c, batch.cond) - noise).square().mean()), rel=1e-3)


@pytest.mark.parametrize("guidance", [None, ClassifierFreeGuidance(3.0)], ids=["unguided", "guided"])
def test_the_teacher_is_called_once_a_step_on_twice_the_rows_if_guided_and_the_student_once(guidance):
    teacher, student = seen(RectifiedFlow()), listening(RectifiedFlow(), "flow")
    piecewise(teacher, student=student, solver_steps=5, guidance=guidance).losses(batch_of(0, 16))
    assert [len(x) for x, *_ in teacher.calls] == [16 if guidance is None else 32] * 5
    assert [len(x) for x, *_ in student.calls] == [16]


@pytest.mark.parametrize("guidance", [None, ClassifierFreeGuidance(3.0)], ids=["unguided", "guided"])
def test_conditions_are_dropped_for_the_student_and_for_an_unguided_teacher_with_it(guidance: GuidanceRule | None):
    teacher, student, batch = seen(RectifiedFlow()), listening(RectifiedFlow(), "flow"), batch_of(0, 4000)
    piecewise(teacher, student=student, solver_steps=1, guidance=guidance, null_probability=0.3).losses(batch)
    labels, given, followed = batch.cond["labels"], student.calls[0][2]["labels"], teacher.calls[0][2]["labels"][:4000]
    dropped = given == 2
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.03) and torch.equal(given[~dropped], labels[~dropped])
    assert torch.equal(followed, given if guidance is None else labels)


# -------------------------------------------------------------------------------------------------------- who moves


def unet() -> NetworkDenoiser:
    torch.manual_seed(0)
    network = UNet2D(1, 8, 3, (8, 16), layers_per_block=1, attention=(False, True), heads_width=8, groups=4)
    return NetworkDenoiser(network, RectifiedFlow(), "flow")


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["copy", "lora"])
def test_student_moves_from_the_teacher_which_does_not(lora):
    teacher = unet()
    batch = Batch(torch.randn(4, 1, 8, 8), *label_conditions(torch.arange(4) % 3, 3))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    method = piecewise(teacher, solver_steps=2, lora=lora, guidance=ClassifierFreeGuidance(2.0))
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.6)
    torch.testing.assert_close(method.student.eval()(x, t, batch.cond), teacher(x, t, batch.cond), rtol=0, atol=1e-6)
    method.sample_shape = (1, 8, 8)
    watch = Watch()
    fit(method, [batch], 2, watch)
    assert watch.moved(1, "student") and watch.moved(1, "ema") and not any("teacher" in key for key in watch.states[0])
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
    trained = of_part(watch.states[0], "student")
    assert all("lora" in key for key in trained) == (lora is not None)


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"windows": 0, "evaluation": Evaluation()}, "windows=0"),
        ({"solver_steps": 0}, "solver_steps=0: give at least one"),
        ({"null_probability": 1.0}, r"null_probability=1.0: give a share in \[0, 1\)"),
        ({"evaluation": Evaluation(steps=[2, 4])}, r"evaluation.steps=\[2, 4\].*windows=4.*give 4 steps or more"),
        ({"evaluation": Evaluation(OdeSampler(Euler(), UniformGrid()), steps=[4])}, "evaluation.sampler is set"),
        ({"parameterisation": "diff_eps"}, "parameterisation='diff_eps': RectifiedFlow.*without signal"),
        ({"student": small(), "lora": LoRA(4)}, "model.student and model.lora"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        piecewise(two_classes(), **{"student": small()} | settings)


def test_dropping_needs_a_null_class():
    teacher = small(num_classes=2)
    teacher.null_class = False
    with pytest.raises(ValueError, match="null_probability=0.1: the network has no null class"):
        piecewise(teacher, null_probability=0.1)


def test_a_student_of_other_windows_is_not_continued(tmp_path):
    batch = batch_of(0)
    fit(piecewise(two_classes(), student=small(num_classes=2), solver_steps=1), [batch], 1).save_checkpoint(tmp_path / "a.ckpt")
    for other in ({"windows": 2}, {"windows": 4, "schedule": SCHEDULES["vp-scaled"], "parameterisation": "ddim_eps"}):
        method = piecewise(two_classes(), student=small(num_classes=2), solver_steps=1, **other)
        with pytest.raises(ValueError, match="trained with .*'windows': 4, 'parameterisation': 'velocity'"):
            fit(method, [batch], 2, ckpt_path=tmp_path / "a.ckpt")
    same = piecewise(two_classes(), student=small(num_classes=2), solver_steps=1)
    fit(same, [batch], 2, ckpt_path=tmp_path / "a.ckpt")
    assert same.batches_seen == 2


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "schedule, kind, prediction",
    [(RectifiedFlow(), "velocity", "flow"), (SCHEDULES["vp-scaled"], "diff_eps", "eps")],
    ids=["velocity", "diff_eps"],
)
def test_student_learns_in_as_many_steps_as_windows_what_its_teacher_cannot(schedule, kind, prediction):
    """From scratch, in two steps: closer to the data and to the teacher's samples than two steps of the teacher's own ODE."""
    teacher, rates = two_classes(schedule), LearningRate(decay="linear", total_steps=200, end=0.05)
    method = piecewise(
        teacher, DDIM(), student=small(schedule, prediction, num_classes=2), windows=2, solver_steps=6, parameterisation=kind,
        optimization=Optimization(lambda p: torch.optim.Adam(p, lr=1e-2, fused=True), rates, averaging=DecayAveraging(0.97)),
    )  # fmt: skip
    labels = torch.arange(2000) % 2
    data, (cond, null) = two_classes().data(labels).float(), label_conditions(labels, 2)
    exact = method.draw(32, range(2000), cond, null, source="teacher")

    def measures(found: torch.Tensor) -> tuple[float, float]:
        law = sum(energy_distance(found[labels == k], data[labels == k]) for k in (0, 1))
        return law, float((found - exact).square().mean().sqrt())

    before = measures(method.draw(2, range(2000), cond, null))
    noise = SeededNoise(0, range(2000), SHAPE).draw()
    euler = measures(OdeSampler(Euler(), UniformGrid())(teacher, noise, cond, 2))
    fit(method, [batch_of(number, 128, tied=False) for number in range(100)], 200)
    after = measures(method.draw(2, range(2000), cond, null))
    print(f"{kind}: (energy distance, from the teacher) {before} -> {after}; the teacher's two steps {euler}")
    assert after[0] < before[0] / 20 and after[0] < euler[0] / 2 and after[1] < euler[1]
