"""Guidance distillation: its optimum is the guided teacher, at drawn scales, on stored points, away from negative prompts."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from adapted import base
from families import FAMILIES
from helpers import SHAPE, Watch, batch_of, evaluation, fit, same, small, two_classes
from oracle import SCHEDULES, Mixture
from torch import nn

from distill.adapters import AttentionGuidance, NegativePrompt
from distill.denoiser import Denoiser
from distill.guidance import AdaptiveProjectedGuidance, CfgPlusPlus, ClassifierFreeGuidance
from distill.guidance_error import squared_errors
from distill.methods.guidance_distillation import GuidanceDistillation
from distill.negatives import Negatives
from distill.noise import SeededNoise
from distill.optimization import LearningRate, Optimization
from distill.schedules import RectifiedFlow
from distill.times import UniformTimes
from distill.types import Batch, Cond, DataSpec, Sample, Time
from distill.weights import TruncatedSnrWeight

RANGE = (1.0, 5.0)


class Sharpened(Denoiser):
    """``x0_null + (1 + gain (k - 1)) (x0_cond - x0_null)`` of the exact two classes; with ``gain = 1`` guided at scale k.

    k is the condition ``guidance``, or ``fixed``.
    """

    def __init__(self, teacher: Mixture, gain: float = 1.0, fixed: float | None = None):
        super().__init__()
        self.describe_as(teacher)
        self.scalar_inputs = ("guidance",) if fixed is None else ()
        self.exact, self.fixed = teacher, fixed
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        null = self.exact(x, t, {"labels": torch.full_like(cond["labels"], 2)})
        k = (cond["guidance"] if self.fixed is None else torch.full_like(t, self.fixed)).double()
        scale = (1 + self.gain * (k - 1)).reshape(-1, 1, 1, 1)
        return (null + scale * (self.exact(x, t, cond) - null)).to(x.dtype)


def distil(teacher: Denoiser, student: Denoiser, **settings: Any) -> GuidanceDistillation:
    """The method; an oracle takes the place of the student that it made."""
    with patch("distill.methods.guidance_distillation.read_guidance"):  # a network is given an input; there is none
        method = GuidanceDistillation(teacher, Optimization(), evaluation(), **settings)
    method.student = student
    return method


def exact_batch(size: int = 64) -> Batch:
    batch = batch_of(0, size, tied=False)
    labels = {"labels": batch.cond["labels"]}
    return Batch(batch.x0.double(), labels, {"labels": torch.full_like(labels["labels"], 2)})


# ---------------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_guided_teacher_is_the_optimum_at_every_scale(name):
    """Zero there, with zero gradient; not for a student that is guided too little, nor for the unguided teacher."""
    teacher = two_classes(SCHEDULES[name])
    found = {}
    for gain in (1.0, 0.9, 0.0):
        student = Sharpened(teacher, gain)
        torch.manual_seed(0)
        loss = distil(teacher, student, guidance_range=RANGE).losses(exact_batch())["loss"]
        gradient = torch.autograd.grad(loss, student.gain)[0]
        found[gain] = float(loss.detach()), float(gradient)
    assert found[1.0][0] < 1e-12 and abs(found[1.0][1]) < 1e-6
    assert found[0.9][0] > 1e-5 and found[0.0][0] == pytest.approx(100 * found[0.9][0], rel=0.05)
    assert found[0.9][1] < 0 and found[0.0][1] < 0


def test_a_rule_at_its_own_scale_needs_no_input():
    teacher = two_classes()
    for fixed, rule in ((3.0, ClassifierFreeGuidance(3.0)), (1.0, ClassifierFreeGuidance(3.0, sigma_high=1e-9))):
        method = distil(teacher, Sharpened(teacher, 1.0, fixed), guidance=rule)
        assert float(method.losses(exact_batch())["loss"]) < 1e-12, fixed
    wrong = distil(teacher, Sharpened(teacher, 1.0, 2.0), guidance=ClassifierFreeGuidance(3.0))
    assert float(wrong.losses(exact_batch())["loss"]) > 1e-3


def test_the_kind_of_rule_is_distilled_at_drawn_scales():
    """APG without projection is classifier-free guidance; with it, it is something else."""
    teacher = two_classes()
    found = {}
    for eta in (1.0, 0.0):
        rule = AdaptiveProjectedGuidance(2.0, eta, None)
        method = distil(teacher, Sharpened(teacher), guidance=rule, guidance_range=RANGE)
        found[eta] = float(method.losses(exact_batch())["loss"])
    assert found[1.0] < 1e-12 and found[0.0] > 1e-3


def test_weights_and_scales_by_hand(monkeypatch):
    """L = mean w(t) (1 - g)^2 (k - 1)^2 |x0_cond - x0_null|^2 / D for a student that guides g of what it should."""
    teacher, batch = two_classes(), exact_batch(4)
    method = distil(teacher, Sharpened(teacher, 0.5), guidance_range=RANGE, weight=TruncatedSnrWeight())
    torch.manual_seed(5)
    loss = float(method.losses(batch)["loss"])
    torch.manual_seed(5)
    t = UniformTimes().sample(4, teacher.schedule)
    x_t = teacher.schedule.add_noise(batch.x0, torch.randn_like(batch.x0), t)
    k = RANGE[0] + (RANGE[1] - RANGE[0]) * torch.rand(4)
    gap = (teacher(x_t, t, batch.cond) - teacher(x_t, t, batch.null)).square().flatten(1).mean(1)
    weight = (((1 - t) / t) ** 2).clamp(min=1)
    assert loss == pytest.approx(float((weight * (0.5 * (k - 1)) ** 2 * gap).mean()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- stored points


class Refuses(Mixture):
    """A teacher that is not to be called."""

    def forward(self, x: Sample, t: Time, cond: Cond, r: Time | None = None) -> Sample:
        raise AssertionError("called")


def test_stored_points_are_learned_without_the_teacher():
    """x_t is made of the stored x0 and noise, the target is the stored x0, the scale that of the point."""
    oracle = two_classes()
    idle = Refuses(oracle.schedule, oracle.means, oracle.std)
    batch, k = exact_batch(6), torch.linspace(1.5, 4.5, 6)
    t = torch.linspace(0.1, 1.0, 6)
    x_t = oracle.schedule.add_noise(batch.x0, torch.randn_like(batch.x0), t)
    guided = ClassifierFreeGuidance(k.double())(oracle, batch.null)(x_t, t, batch.cond)
    cond = {**batch.cond, "guidance": k}
    stored = Batch(guided, cond, batch.null, oracle.schedule.eps(x_t, guided, t), time=t)
    exact, wrong = (distil(idle, Sharpened(oracle, gain), guidance_range=RANGE) for gain in (1.0, 0.8))
    assert float(exact.losses(stored)["loss"]) < 1e-12
    assert float(wrong.losses(stored)["loss"]) > 1e-4


def test_only_this_method_takes_stored_points():
    method = distil(two_classes(), Sharpened(two_classes()), guidance_range=RANGE)
    method.check_data(DataSpec(SHAPE, 2, trajectories=True, guidance_range=RANGE))
    for other in ((1.0, 3.0), None):
        with pytest.raises(ValueError, match=r"guidance_range=\(1.0, 5.0\): the trajectories' scales"):
            method.check_data(DataSpec(SHAPE, 2, trajectories=True, guidance_range=other))
    widths, rule = {"prompt_embeds": FAMILIES["sd15"].config["cross_attention_dim"]}, ClassifierFreeGuidance(3.0)
    points = DataSpec((4, 8, 8), widths=widths, trajectories=True)
    for negatives in (None, Negatives(0.5)):
        prompted = GuidanceDistillation(
            base("sd15"), Optimization(), evaluation(), guidance=rule, adapter=NegativePrompt(), negatives=negatives
        )
        if negatives is None:
            prompted.check_data(points)
        else:
            with pytest.raises(ValueError, match="negatives: stored trajectories"):
                prompted.check_data(points)


# ------------------------------------------------------------------------------------------------------------- training


class Rows(nn.Module):
    """Counts the rows that a network is given."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.rows: list[int] = []
        network.register_forward_hook(lambda module, args, output: self.rows.append(len(output)))


def test_one_row_of_the_student_for_two_of_the_teacher_and_who_moves():
    batches = [Batch(b.x0, {"labels": b.cond["labels"]}, {"labels": b.null["labels"]}) for b in map(batch_of, range(3))]
    method = GuidanceDistillation(small(num_classes=2), Optimization(), evaluation(), guidance_range=RANGE)
    counts = [Rows(each.network) for each in (method.student, method.teacher)]
    before, watch = {key: value.clone() for key, value in method.teacher.state_dict().items()}, Watch()
    fit(method, batches, 3, watch)
    assert [count.rows for count in counts] == [[8] * 3, [16] * 3]
    assert same(before, method.teacher.state_dict())
    assert all(watch.moved(step, "student") for step in range(3))
    assert watch.moved(0, "student.network.scalars") and not any("teacher" in key for key in watch.states[0])


def test_a_small_network_learns_to_be_guided():
    """The relative error on other data falls to a quarter at each scale, and sampling at a scale takes one evaluation."""
    batches = []
    for number in range(20):
        batch = batch_of(number, 256, tied=False)
        batches.append(Batch(batch.x0, {"labels": batch.cond["labels"]}, {"labels": batch.null["labels"]}))
    teacher = small(num_classes=2, width=64)
    optimizer = Optimization(lambda p: torch.optim.Adam(p, 3e-3, fused=True), LearningRate(20, "cosine", 400))
    method = GuidanceDistillation(teacher, optimizer, evaluation(), guidance_range=RANGE)
    with torch.no_grad():  # a teacher whose conditions matter
        method.teacher.network.labels.weight.mul_(3)
        method.student.network.labels.weight.mul_(3)
    held_out = [batches.pop()]

    def errors(student: Denoiser) -> torch.Tensor:
        sums = squared_errors(student, method.teacher, held_out, (2.0, 5.0), None, 0)
        return (sums[:, 0] / sums[:, 1]).sqrt()

    before = errors(method.student.eval())
    fit(method, batches, 400)
    after = errors(method.ema.module)
    assert (after < before / 4).all() and (before > 0.05).all(), (before, after)
    rows = Rows(method.ema.module.network)
    cond, null = {"labels": torch.zeros(3, dtype=torch.long)}, {"labels": torch.full((3,), 2)}
    default, middle, other = (method.draw(2, range(3), cond, null, guidance=scale) for scale in (None, 3.0, 5.0))
    assert rows.rows == [3] * 6 and torch.equal(default, middle) and not torch.equal(middle, other)


# ---------------------------------------------------------------------------------------------------- negative prompts


def test_negative_prompts_are_read_and_the_teacher_is_guided_away_from_them():
    """At first the student is the unguided teacher: the loss is that of guidance away from what was drawn."""
    teacher, tiny = base("sd15"), FAMILIES["sd15"]
    cond, null = tiny.cond(4)
    cond["prompt_embeds"] = torch.randn(cond["prompt_embeds"].shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.randn(4, tiny.channels, tiny.size, tiny.size), cond, null, encoded=True)
    rule = ClassifierFreeGuidance(3.0)
    method = GuidanceDistillation(
        teacher, Optimization(), evaluation(), guidance=rule, adapter=NegativePrompt(), negatives=Negatives(0.0)
    )
    torch.manual_seed(1)
    loss = float(method.losses(batch)["loss"])
    torch.manual_seed(1)
    t = UniformTimes().sample(4, RectifiedFlow())
    x_t = RectifiedFlow().add_noise(batch.x0, torch.randn_like(batch.x0), t)
    shift = int(torch.randint(1, 4, ()))
    others = {"prompt_embeds": cond["prompt_embeds"].roll(shift, 0)}
    with torch.no_grad():
        gap = teacher(x_t, t, cond) - teacher(x_t, t, {**cond, **others})
    assert loss == pytest.approx(float((2 * gap).square().mean()), rel=1e-4)


def test_no_sample_is_its_own_negative_and_the_null_prompt_has_its_share():
    prompts = torch.arange(6.0).reshape(6, 1, 1)
    cond, null = {"prompt_embeds": prompts, "time_ids": torch.ones(6, 2)}, {"prompt_embeds": -torch.ones(1, 1, 1)}
    for seed in range(20):
        torch.manual_seed(seed)
        student, teacher = Negatives(0.0).draw(cond, null)
        assert not (student["negative_prompt_embeds"] == prompts).any()
        assert torch.equal(student["negative_prompt_embeds"], teacher["prompt_embeds"]) and "negative_time_ids" not in student
        assert sorted(teacher["prompt_embeds"].flatten().tolist()) == list(range(6))
    torch.manual_seed(0)
    wide = {"prompt_embeds": torch.zeros(4000, 1, 1)}
    share = (Negatives(0.3).draw(wide, null)[0]["negative_prompt_embeds"] == -1).float().mean()
    assert abs(float(share) - 0.3) < 0.03
    with pytest.raises(ValueError, match="hold no prompt"):
        Negatives().draw({"labels": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="a batch of one"):
        Negatives().draw({"prompt_embeds": torch.zeros(1, 1, 1)}, null)


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "both null"),
        ({"guidance_range": (3.0, 2.0)}, "guidance_range"),
        ({"guidance_range": RANGE, "negatives": Negatives()}, "reads no negative prompt"),
        ({"guidance_range": RANGE, "adapter": NegativePrompt()}, "adapter: only networks of diffusers"),
        ({"guidance_range": RANGE, "guidance": CfgPlusPlus(0.6)}, "GuidanceDistillation: CfgPlusPlus goes on with a noise"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceDistillation(small(num_classes=2), Optimization(), evaluation(), **settings)


def test_students_and_teachers_that_read_a_scale_are_told_apart():
    """A teacher that reads one has nothing to teach; an adapter that reads one must be given a range."""
    teacher = small(num_classes=2)
    teacher.network.add_scalar_input("guidance")
    with pytest.raises(ValueError, match="teacher reads a guidance scale by itself"):
        GuidanceDistillation(teacher, Optimization(), evaluation(), guidance_range=RANGE)
    rule, adapter = ClassifierFreeGuidance(3.0), AttentionGuidance(width=8)
    with pytest.raises(ValueError, match="guidance_range=null: the adapter reads"):
        GuidanceDistillation(base("dit"), Optimization(), evaluation(), guidance=rule, adapter=adapter)
    fixed = GuidanceDistillation(small(num_classes=2), Optimization(), evaluation(), guidance=rule)
    with pytest.raises(ValueError, match="guidance=2.0: the student is guided at one scale"):
        fixed.guided_generator(fixed.student, {}, {}, 2.0)


def test_the_teacher_is_compared_under_the_rule_that_is_distilled():
    """At the middle of the range, and not by classifier-free guidance."""
    teacher = two_classes()
    rule = AdaptiveProjectedGuidance(2.0, 0.0)
    method = distil(teacher, Sharpened(teacher), guidance=rule, guidance_range=RANGE)
    cond, null = {"labels": torch.tensor([0, 1])}, {"labels": torch.full((2,), 2)}
    drawn = method.draw(4, range(2), cond, null, source="teacher")
    noise = SeededNoise(0, range(2), SHAPE)
    for other, equal in ((rule.at(3.0), True), (ClassifierFreeGuidance(3.0), False)):
        unit = SeededNoise(0, range(2), SHAPE).draw()
        expected = method.evaluation.sample_teacher(other(teacher, null), unit, cond, 4, noise)
        assert torch.allclose(drawn, expected) == equal


# ---------------------------------------------------------------------------------------------------- the relative error


def test_relative_error_of_known_students():
    """A student that guides g of what it should has error (1 - g) times that of the unguided teacher, an exact one none."""
    teacher = two_classes()
    batches = [exact_batch(16), exact_batch(16)]
    found = {}
    for gain in (1.0, 0.75, 0.0):
        sums = squared_errors(Sharpened(teacher, gain), teacher, batches, (1.0, 3.0), None, 0)
        found[gain] = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
    assert found[1.0][1] < 1e-6 and max(each[0] for each in found.values()) < 1e-6
    assert found[0.75][1] == pytest.approx(found[0.0][1] / 4, rel=1e-5) and found[0.0][1] > 0.01


def test_relative_error_depends_on_the_samples_not_on_their_batches():
    teacher, whole = two_classes(), exact_batch(12)
    parts = [
        Batch(whole.x0[rows], *({"labels": side["labels"][rows]} for side in (whole.cond, whole.null)))
        for rows in (slice(0, 5), slice(5, 12))
    ]
    unguided = Sharpened(teacher, 0.0)
    one, two, other = (
        squared_errors(unguided, teacher, batches, (3.0,), None, seed)
        for batches, seed in (([whole], 0), (parts, 0), ([whole], 1))
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=0)
    assert not torch.allclose(one, other, rtol=1e-3)
