"""Guidance by a second network, rules from config, and every rule as the teacher's in a method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from guiding import MEANS, Counted, assert_near, no_fresh, setting
from helpers import SHAPE, evaluation, gaussian, small, two_classes
from oracle import Mixture

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.distances import SquaredDistance
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import (
    AdaptiveGuidance,
    AdaptiveProjectedGuidance,
    Autoguidance,
    CfgPlusPlus,
    ClassifierFreeGuidance,
    GuidanceRule,
    IndependentConditionGuidance,
    RandomGuidance,
)
from distill.guidance.weights import LinearGuidanceWeight
from distill.methods.base import Method
from distill.methods.consistency import Consistency
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.schedules import RectifiedFlow, VariancePreserving
from distill.solvers import DDIM
from distill.types import Batch, label_conditions

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- autoguidance


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving()], ids=repr)
def test_autoguidance_leads_away_from_the_guide_whatever_its_schedule(schedule):
    from diffusers.guiders import AutoGuidance as Theirs

    denoiser, x, t, cond, null = setting()
    bad = Counted(schedule, MEANS, 0.8)
    found = Autoguidance(bad, 2.1)(denoiser, {})(x, t, cond)
    assert denoiser.rows == [4] and bad.rows == [4] and torch.equal(bad.cond["labels"], cond["labels"])
    own, worse = denoiser(x, t, cond), Mixture(RectifiedFlow(), MEANS, 0.8)(x, t, cond)
    assert_near(found, worse + 2.1 * (own - worse), 1e-9)
    assert_near(found, Theirs(2.1, auto_guidance_layers=[0], dropout=1.0).forward(own, worse).pred, 1e-6)
    scales = torch.tensor([2.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    assert_near(Autoguidance(bad, 2.1).at(scales)(denoiser, null)(x, t, cond), worse + scales[:, None] * (own - worse), 1e-9)


def test_an_unconditional_guide_and_its_interval():
    denoiser, x, t, cond, null = setting()
    bad = Counted(RectifiedFlow(), MEANS, 0.8)
    rule = Autoguidance(bad, 2.1, conditional=False, sigma_low=0.3, sigma_high=2.0)
    found = rule(denoiser, null)(x, t, cond)
    assert denoiser.rows == [4] and bad.rows == [2] and bad.cond["labels"].tolist() == [3, 3]
    own, worse = denoiser(x, t, cond), bad(x, t, null)
    assert_near(found, torch.cat([own[:1], (worse + 2.1 * (own - worse))[1:3], own[3:]]))
    bad.rows.clear()
    rule(denoiser, {"labels": null["labels"][:1]})(x[:1], t[:1], {"labels": cond["labels"][:1]})
    assert bad.rows == [] and Autoguidance(bad, 1.0)(denoiser, {}) is denoiser


def test_a_guide_that_does_not_fit_is_refused():
    denoiser, *_, null = setting()
    with pytest.raises(ValueError, match=r"guidance.guide has shape=\(3,\), the denoiser \(2,\)"):
        Autoguidance(Mixture(RectifiedFlow(), torch.randn(3, 3), 1.0), 2.0)(denoiser, null)
    with pytest.raises(ValueError, match="guidance.guide has num_classes=2, the denoiser 3"):
        Autoguidance(Mixture(RectifiedFlow(), MEANS[:2], 1.0), 2.0)(denoiser, null)
    prompted = Mixture(RectifiedFlow(), MEANS, 1.0)
    prompted.widths = {"prompt_embeds": 8}
    with pytest.raises(ValueError, match="guidance.guide reads prompt_embeds=8, the denoiser {}"):
        Autoguidance(prompted, 2.0)(denoiser, null)
    guide = Mixture(RectifiedFlow(), MEANS, 1.0)
    for nulls, known in ((null, False), ({}, True)):
        guide.null_class = known
        with pytest.raises(ValueError, match="guidance.conditional=false: there is no null condition"):
            Autoguidance(guide, 2.0, conditional=False)(denoiser, nulls)
    with pytest.raises(ValueError, match="sigma_low=2.0"):
        Autoguidance(guide, 2.0, sigma_low=2.0, sigma_high=1.0)


class Plain(Method):
    """A method with a guided teacher and no losses."""

    def __init__(self, teacher: Denoiser, guidance: GuidanceRule | None):
        super().__init__(small(num_classes=2), teacher, guidance, Optimization(), evaluation())

    def losses(self, batch: Batch) -> Any:
        raise NotImplementedError


def test_the_guide_is_frozen_unseen_and_moves_with_its_owner():
    guide = small(num_classes=2, seed=3)
    guide.identity = {"path": "guide", "sha256": "ab"}
    rule = Autoguidance(guide, 2.0)
    with_guide, without = Plain(two_classes(), rule), Plain(two_classes(), None)
    assert [name for name, _ in with_guide.named_parameters()] == [name for name, _ in without.named_parameters()]
    assert with_guide.state_dict().keys() == without.state_dict().keys()
    with_guide.load_state_dict(without.state_dict(), strict=True)
    assert not guide.training and not any(parameter.requires_grad for parameter in guide.parameters())
    with_guide.train()
    assert not guide.training
    with_guide.to(torch.float64)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float64}
    assert rule.identity == {"guide": guide.identity} and ClassifierFreeGuidance(2.0).identity == {}
    assert copy.deepcopy(rule).guide is guide and rule.at(3.0).guide is guide  # type: ignore[attr-defined]


def test_gradients_pass_a_guided_fake_score_and_not_its_guide():
    network, guide = small(num_classes=2), small(num_classes=2, seed=3)
    x, t = torch.randn(4, *SHAPE, requires_grad=True), torch.full((4,), 0.5)
    cond, null = label_conditions(torch.tensor([0, 1, 0, 1]), 2)
    found = Autoguidance(guide, 2.0)(network, null)(x, t, cond)
    gradients = torch.autograd.grad(found.sum(), [x, *network.parameters()])
    own = torch.autograd.grad(2.0 * network(x, t, cond).sum(), list(network.parameters()))
    for one, other in zip(gradients[1:], own, strict=True):
        assert_near(one, other, 1e-5)
    # the guide's own slope in x is a part of the input's
    slopes = [torch.autograd.grad(part(x, t, cond).sum(), x)[0] for part in (network, guide)]
    assert_near(gradients[0], 2.0 * slopes[0] - slopes[1], 1e-5)


# ------------------------------------------------------------------------------------------------------------ from config


NETWORK = {"class_path": "UNet2D", "init_args": {"sample_size": 4, "channels": [8, 16], "groups": 4, "num_classes": 3}}
GUIDE = {"class_path": "NetworkDenoiser", "init_args": {"network": NETWORK, "schedule": {"class_path": "RectifiedFlow"}}}
CONFIGS: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {
        "scale": 2.0, "sigma_low": 0.1, "rescale": 0.7, "rescale_space": "flow",
        "weight": {"class_path": "ClampedLinearGuidanceWeight",
                   "init_args": {"least": 0.5, "schedule": {"class_path": "TrigFlow"}}},
    },
    "RandomGuidance": {"low": 1.0, "high": 3.0},
    "AdaptiveProjectedGuidance": {"scale": 2.0, "eta": 0.1, "norm_threshold": 2.5, "momentum": -0.75, "sigma_high": 1.5},
    "CfgPlusPlus": {"scale": 0.6},
    "AdaptiveGuidance": {"scale": 2.0, "threshold": 0.99, "space": "x0"},
    "Autoguidance": {"guide": GUIDE, "scale": 2.0, "conditional": False},
    "IndependentConditionGuidance": {"scale": 2.0, "conditions": ["labels"]},
    "TimeStepGuidance": {"scale": 2.0, "strength": 0.5, "power": 1.5, "schedule": {"class_path": "RectifiedFlow"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def parser() -> Any:
    from jsonargparse import ArgumentParser

    from distill.cli import import_parts

    import_parts()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--guidance", type=GuidanceRule)
    return parser


@pytest.mark.parametrize("name", CONFIGS)
def test_every_rule_comes_from_config_and_guides(parser, name):
    """By its short name; drawn, under another schedule, along a trajectory and outside, of a network of three classes."""
    config = parser.parse_object({"guidance": {"class_path": name, "init_args": CONFIGS[name]}})
    rule = parser.instantiate_classes(config).guidance
    assert type(rule).__name__ == name
    torch.manual_seed(0)
    teacher = NetworkDenoiser(UNet2D(1, 4, 3, (8, 16), 1, (False, True), 8, 4), RectifiedFlow(), "flow")
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([100.0, 300.0, 600.0, 900.0])
    cond, null = label_conditions(torch.tensor([0, 1, 2, 0]), 3)
    view = teacher.under(VariancePreserving())
    guided = rule.drawn(CPU)(view, null)
    for denoiser in (guided, guided.trajectory(torch.randn_like)):
        found = denoiser(x, t, cond)
        assert found.dtype == torch.float32 and (found - view(x, t, cond)).abs().max() > 1e-4
        assert torch.isfinite(DDIM().step(denoiser, x, t, t - 50, cond)).all()
    assert type(rule.at(0.5)) is (ClassifierFreeGuidance if name == "RandomGuidance" else type(rule))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ClassifierFreeGuidance", {"scale": 2.0, "rescale_space": "edm"}),
        ("AdaptiveProjectedGuidance", {"scale": 2.0, "threshold": 2.5}),
        ("Autoguidance", {"scale": 2.0}),
    ],
)
def test_what_a_rule_does_not_take_fails_while_parsing(parser, name, arguments):
    from jsonargparse import ArgumentError

    with pytest.raises(ArgumentError):
        parser.parse_object({"guidance": {"class_path": name, "init_args": arguments}})


# ------------------------------------------------------------------------------------------------------------- in methods


class Anonymous(GuidanceRule):
    """A rule that has no scale."""

    def __call__(self, denoiser, null):
        return denoiser


def test_a_rule_without_a_scale_says_so():
    with pytest.raises(ValueError, match="guidance=Anonymous: this rule has no scale to set"):
        Anonymous().at(2.0)
    assert RandomGuidance(1.0, 3.0).at(2.5) == ClassifierFreeGuidance(2.5)


RULES = {
    "apg": AdaptiveProjectedGuidance(3.0, 0.2, 0.5),
    "cfg++": CfgPlusPlus(0.6),
    "adaptive": AdaptiveGuidance(3.0, 0.9, "x0"),
    "auto": Autoguidance(Mixture(RectifiedFlow(), two_classes().means, 0.5), 2.0),
    "icg": IndependentConditionGuidance(3.0),
    "weighted": ClassifierFreeGuidance(3.0, weight=LinearGuidanceWeight(RectifiedFlow())),
}


@pytest.mark.parametrize("name", RULES)
def test_a_consistency_method_steps_by_the_guided_teacher(name):
    """The rule is what its teacher's step sees, in the method's own schedule; nothing is remembered from batch to batch."""
    rule, schedule = RULES[name], VariancePreserving()
    method = Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)), SquaredDistance(), Optimization(), evaluation(),
        student=small(num_classes=2), teacher=two_classes(), solver=DDIM(), schedule=schedule, guidance=rule,
    )  # fmt: skip
    x, t = torch.randn(4, *SHAPE, dtype=torch.float64), torch.tensor([200.0, 400.0, 600.0, 800.0], dtype=torch.float64)
    cond, null = label_conditions(torch.tensor([0, 1, 0, 1]), 2)
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        steps.append(method.teacher_step(method.solver, method.drawn(rule), x, t, t - 100, cond, null))
    torch.manual_seed(0)
    x0, eps = rule(two_classes().under(schedule), null).x0_and_eps(x, t, cond)
    assert_near(steps[0], schedule.add_noise(x0, eps, t - 100), 1e-9)
    assert torch.equal(*steps)
    assert (steps[0] - DDIM().step(two_classes().under(schedule), x, t, t - 100, cond)).abs().max() > 1e-3


def test_denoisers_without_memory_are_their_own_trajectory():
    oracle = gaussian(RectifiedFlow())
    view = oracle.under(VariancePreserving())
    assert oracle.trajectory(no_fresh) is oracle and view.trajectory(no_fresh) is view
    x, t = torch.randn(3, *SHAPE, dtype=torch.float64), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    x0, eps = oracle.x0_and_eps(x, t, {})
    assert torch.equal(x0, oracle(x, t, {})) and torch.equal(eps, RectifiedFlow().eps(x, x0, t))
    assert not oracle.own_noise and not view.own_noise
