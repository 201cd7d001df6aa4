"""Settings of score distillation that contradict each other are refused, before any work is done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import fit, same, small
from score_methods import BATCHES, CFG, KINDS, method, teacher

from distill.adversarial import Adversarial, JointAdversarial
from distill.denoiser import NetworkDenoiser
from distill.distances import SquaredDistance
from distill.divergences import FDivergence
from distill.evaluation import Evaluation
from distill.grids import UniformGrid
from distill.lora import LoRA
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization, PlayerOptimization
from distill.samplers import RenoiseSampler
from distill.schedules import RectifiedFlow, VariancePreserving
from distill.times import IndexTimes, UniformTimes


def without_null_class() -> NetworkDenoiser:
    network = UNet2D.of(UNet2D(1, 4, 1, (8, 8), 1, heads_width=8, groups=4).model, null_class=False)
    return NetworkDenoiser(network, RectifiedFlow())


def on_another_schedule() -> NetworkDenoiser:
    student = teacher(1)
    student.schedule = VariancePreserving()
    return student


SMALL = small(num_classes=2)
CHECKPOINTING = PlayerOptimization(gradient_checkpointing=True)
ONLY_DIFFUSERS = "optimization.gradient_checkpointing=true: only networks of diffusers can; set it to false"
F_DIVERGENCE = FDivergence("forward_kl")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"evaluation": Evaluation(RenoiseSampler(UniformGrid()), steps=[1])},
            "evaluation.sampler is set: the student is sampled by model.sampler; leave it out",
        ),
        (
            {"evaluation": Evaluation(steps=[1, 2])},
            r"evaluation.steps=\[1, 2\]: model.sampler has 1 times; give no more",
        ),
        ({"times": (1.5,)}, r"sampler.times=\[1.5\]: give times above 0.0 and up to 1.0"),
        ({"fake": {"steps": 0}}, "steps=0: give at least 1"),
        ({"fake": {"warmup_steps": -1}}, "warmup_steps=-1: give 0 or more"),
        ({"fake": {"null_probability": 1.0}}, r"null_probability=1.0: give a share in \[0, 1\)"),
        ({"fake": {"null_probability": -0.1}}, r"null_probability=-0.1: give a share in \[0, 1\)"),
        ({"teacher": without_null_class(), "fake": {"null_probability": 0.5}}, "fake_score.null_probability=0.5.*null class"),
        ({"fake": {"times": IndexTimes(0, 9)}}, "fake_score.times: IndexTimes on RectifiedFlow"),
        ({"kind": "dmd2", "adversarial": Adversarial(IndexTimes(0, 9))}, "adversarial.times: IndexTimes on RectifiedFlow"),
        ({"student": on_another_schedule()}, "model.student's schedule is VariancePreserving.*the teacher's RectifiedFlow"),
        ({"student": teacher(1), "lora": LoRA(2)}, r"model.student and model.lora=LoRA\(rank=2.*set one only"),
        ({"teacher": SMALL, "lora": LoRA(2)}, "only networks of diffusers take LoRA layers"),
        ({"teacher": SMALL, "optimization": Optimization(gradient_checkpointing=True)}, ONLY_DIFFUSERS),
        ({"teacher": SMALL, "fake": {"optimization": CHECKPOINTING}}, f"fake_score.{ONLY_DIFFUSERS}"),
        ({"fake_guidance": "teacher"}, "fake_guidance='teacher' and guidance=null: there is no rule to share"),
        (
            {"kind": "dmd2", "adversarial": None, "divergence": F_DIVERGENCE},
            "divergence is set: a discriminator estimates its density ratio; set adversarial too",
        ),
        (
            {"kind": "dmd2", "divergence": F_DIVERGENCE, "fake_guidance": CFG},
            r"fake_guidance=ClassifierFreeGuidance\(.* and divergence are set: a guided pair has no features",
        ),
        ({"kind": "dmd2", "teacher": SMALL}, "SmallNetwork does not say where its inner features are read"),
        (
            {"kind": "vsd", "regression": SquaredDistance(), "times": (1.0, 0.5)},
            "regression is set with 2 times of sampler: pairs are of one step",
        ),
        ({"kind": "vsd", "shared_dropout": True, "guidance": CFG}, "shared_dropout=true: .*set fake_guidance to teacher"),
        ({"kind": "vsd", "shared_dropout": True, "fake_guidance": CFG}, "shared_dropout=true: .*set fake_guidance to teacher"),
        (
            {"kind": "vsd", "shared_dropout": True, "fake": {"lora": LoRA(2, dropout=0.1)}},
            "shared_dropout=true with fake_score.lora.dropout=0.1: set that to 0",
        ),
    ],
)
def test_settings_that_contradict_are_named(settings: Any, words: str):
    with pytest.raises(ValueError, match=words):
        method(**settings)


@pytest.mark.parametrize("kind", [Adversarial, JointAdversarial])
@pytest.mark.parametrize("weights", [{"generator_weight": 0.0}, {"critic_weight": -1.0}])
def test_adversarial_factors_are_positive(kind: Any, weights: dict[str, float]):
    first = {"times": UniformTimes()} if kind is Adversarial else {}
    with pytest.raises(ValueError, match="give positive factors, or adversarial: null"):
        kind(**first, **weights)


def test_a_discriminator_starts_at_a_step_of_the_generator():
    with pytest.raises(ValueError, match="start_step=-1: give 0 or more"):
        JointAdversarial(start_step=-1)


def test_the_teacher_itself_is_no_student():
    one = teacher()
    with pytest.raises(ValueError, match="the student has no parameter that is trained: give one that has"):
        fit(method(teacher=one, student=one), BATCHES, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_float16_teacher_is_refused_where_it_is_differentiated(kind: str):
    """In SiD and SIM gradients pass through it; distribution matching only reads it, and moves none of its bits."""
    half = teacher()
    half.frozen_dtype = torch.float16  # type: ignore[assignment]
    trained = method(kind, teacher=half)
    if kind in ("sid", "sida", "sim"):
        with pytest.raises(ValueError, match="model.teacher.dtype=float16: .*in its input.*set it to null, or to bfloat16"):
            fit(trained, BATCHES, 2)
        return
    before = copy.deepcopy(half.state_dict())
    fit(trained, BATCHES, 2)
    assert int(trained.skipped.total) == 0 and {value.dtype for value in half.parameters()} == {torch.float16}
    assert same(before, dict(half.state_dict())) and {p.dtype for p in trained.parameters()} == {torch.float32}


def test_a_float16_teacher_is_refused_under_layers_of_the_fake_score():
    half = teacher()
    half.frozen_dtype = torch.float16  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model.teacher.dtype=float16 with LoRA layers or adapters on its weights"):
        fit(method("vsd", teacher=half, fake={"lora": LoRA(2)}), BATCHES, 1)
