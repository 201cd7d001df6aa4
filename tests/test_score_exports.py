"""Students of score distillation are sampled at the times they were trained on, here and by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import conditions, draw_all, plan_of, teacher_of, written
from helpers import trainer
from score_methods import SHAPE, method, teacher
from torch import Tensor

from distill.callbacks.export import ExportDenoiser
from distill.evaluation import Evaluation
from distill.export.check import LIMIT
from distill.export.student import export_student
from distill.few_step import FewStepSampler
from distill.methods.score_distillation import ScoreDistillation
from distill.types import Batch, label_conditions


@pytest.mark.parametrize("source", ["ema", "student"])
def test_samples_are_drawn_at_the_first_of_the_trained_times(source: str):
    trained, seen = method(times=(0.9, 0.6, 0.3), evaluation=Evaluation(steps=[1, 3])), []
    network = {"ema": trained.ema.module, "student": trained.student}[source].network
    network.register_forward_pre_hook(lambda module, inputs: seen.append((float(inputs[1][0]), module.training)))
    cond, null = label_conditions(torch.arange(3) % 2, 2)
    for steps in (1, 2, 3):
        seen.clear()
        whole = trained.draw(steps, range(3), cond, null, source=source)
        assert seen == [(pytest.approx(1000 * time), False) for time in (0.9, 0.6, 0.3)[:steps]]
        last = ({key: value[2:] for key, value in each.items()} for each in (cond, null))
        part = trained.draw(steps, [2], *last, source=source)
        assert torch.allclose(whole[2:], part, atol=1e-6)
    assert trained.student_sampler is trained.sampler and trained.student.training
    with pytest.raises(ValueError, match="steps=4: this student was trained for 3 of them at most; give no more"):
        trained.draw(4, range(3), cond, null, source=source)


def test_the_teacher_is_drawn_by_its_own_sampler():
    trained = method(times=(0.9,))
    cond, null = label_conditions(torch.arange(2), 2)
    assert torch.isfinite(trained.draw(3, range(2), cond, null, source="teacher")).all()


# -------------------------------------------------------------------------------------------------------------- exports

STARTS: dict[str, tuple[list[float], Any, str]] = {
    "inner, marginal": ([0.7, 0.4], "marginal", "StudentScheduler"),
    "inner, prior": ([0.7, 0.4], "prior", "StudentScheduler"),
    "sd, inner, marginal": ([625.0, 300.0], "marginal", "StudentScheduler"),
    "sd, whole, prior": ([999.0, 499.0], "prior", "LCMScheduler"),
}
"""Trained times, start, and the scheduler that the folder gets: of our own network, and of one in Stable Diffusion's folder."""


def exported(name: str, folder: Path) -> tuple[ScoreDistillation, dict[str, Tensor]]:
    """A two-step student whose average is not its teacher, and conditions to sample it with."""
    times, start, _ = STARTS[name]
    if name.startswith("sd"):
        base, space = teacher_of("sd15", folder)
        cond, shape = conditions("sd15"), (4, 8, 8)
    else:
        base, space, cond, shape = teacher(dropout=0.0), None, {"labels": torch.tensor([0, 1])}, SHAPE
    made = method(teacher=base, sampler=FewStepSampler(times=times, start=start), space=space)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in made.ema.module.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
    made.sample_shape = shape
    return made, cond


def test_exported_students_are_sampled_at_the_trained_times_from_the_trained_start(tmp_path: Path):
    """The scheduler written for 1 and 2 steps, and samples of diffusers in a clean process, which are ours."""
    cases = {}
    for name, (times, start, scheduler) in STARTS.items():
        made, cond = exported(name, tmp_path / f"{name} teacher")
        plan, schedule = plan_of(made, cond, steps=(1, 2)), made.student.schedule
        scale = 1.0 if start == "prior" else float(schedule.sigma(torch.tensor(times[0], dtype=torch.float64)))
        assert type(plan.scheduling.scheduler).__name__ == scheduler, name
        assert plan.scheduling.scheduler.init_noise_sigma == pytest.approx(scale, rel=1e-6), name
        for steps in (1, 2):
            called = plan.scheduling.calls[steps]
            words = {key: value for key, value in called.items() if key in ("timesteps", "sigmas")}
            plan.scheduling.scheduler.set_timesteps(**(words or {"num_inference_steps": steps}))
            expected = schedule.network_time(torch.tensor(times[:steps])).tolist()
            assert plan.scheduling.scheduler.timesteps.tolist() == pytest.approx(expected, rel=1e-6), name
        cases[name] = written(name, tmp_path, plan, 2)
    for name, case in draw_all(cases).items():
        assert max(case.differences().values()) <= LIMIT, name
        one, two = (case.samples()[steps] for steps in ("1", "2"))
        assert ((two > 0) & (two < 1)).float().mean() > 0.5 and float((one - two).abs().max()) > 100 * LIMIT, name


@pytest.mark.parametrize(("family", "time"), [("sd3", 0.7), ("dit", 625.0)])
def test_a_pipeline_that_cannot_scale_its_noise_is_not_exported_with_a_marginal_start(family: str, time: float, tmp_path: Path):
    """It would be a silent error of a few percent; a start at the prior's scale can be exported."""
    base, space = teacher_of(family, tmp_path / "teacher")
    for start in ("marginal", "prior"):
        made = method(teacher=base, sampler=FewStepSampler(times=[time], start=start), space=space)  # type: ignore[arg-type]
        made.sample_shape = (4, 8, 8)
        if start == "prior":
            assert plan_of(made, conditions(family), steps=(1,)).scheduling.scheduler is not None
            continue
        cond = conditions(family)
        with pytest.raises(ValueError, match="first time is not pure noise .it starts from 0.*Pipeline cannot do"):
            export_student(made, tmp_path / "out", [1], Batch(None, cond, cond), 2)
        assert not list(tmp_path.glob("out*"))


def test_more_steps_than_were_trained_are_not_exported(tmp_path: Path):
    made, cond = exported("inner, prior", tmp_path)
    with pytest.raises(ValueError, match="steps=3: this student was trained for 2 of them at most"):
        export_student(made, tmp_path / "out", [2, 3], Batch(None, cond, cond), 2)
    assert not list(tmp_path.glob("out*"))


def test_trained_times_are_not_lost_by_a_plain_export():
    with pytest.raises(ValueError, match="ExportDenoiser writes no trained times.*tools/export.py"):
        ExportDenoiser().setup(trainer(1), method(), "fit")
