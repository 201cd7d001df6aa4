"""Guidance rules of two evaluations against closed forms and against diffusers' guiders, and what they remember and save."""

from __future__ import annotations

import math

import pytest
import torch
from guiding import IMAGES, LEVELS, Counted, assert_near, both, no_fresh, rules, setting
from oracle import SCHEDULES, Mixture
from torch.nn.functional import cosine_similarity

from distill.grids import UniformGrid
from distill.guidance import AdaptiveGuidance, AdaptiveProjectedGuidance, CfgPlusPlus, ClassifierFreeGuidance
from distill.guidance.weights import (
    ClampedLinearGuidanceWeight,
    CosineGuidanceWeight,
    LinearGuidanceWeight,
    PoweredCosineGuidanceWeight,
)
from distill.samplers import JumpSampler, OdeSampler, RenoiseSampler
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM, DPMSolver2M, Euler, Heun
from distill.types import label_conditions

VP = VariancePreserving()


@pytest.mark.parametrize("name", ["cfg", "rescaled", "apg", "cfg++", "adaptive", "auto", "icg"])
def test_outside_of_the_interval_no_rule_asks_twice(name):
    """Two samples of four are inside: they alone are changed, and cost a row; a batch outside costs one evaluation."""
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    rule = rules(VP, IMAGES)[name]
    torch.manual_seed(1)
    found = rule(denoiser, null)(x, t, cond)
    assert denoiser.rows == ([4] if name == "auto" else [6])
    own = denoiser(x, t, cond)
    changed = [not torch.equal(one, other) for one, other in zip(found, own, strict=True)]
    assert not changed[0] and not changed[3] and (any(changed) if name == "icg" else all(changed[1:3]))
    denoiser.rows.clear()
    cond, null = ({"labels": side["labels"][[0, 3]]} for side in (cond, null))
    x0, eps = rule(denoiser, null).x0_and_eps(x[[0, 3]], t[[0, 3]], cond)
    assert denoiser.rows == [2] and torch.equal(x0, own[[0, 3]])
    assert_near(eps, VP.eps(x, own, t)[[0, 3]])


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("name", ["cfg", "rescaled", "apg", "cfg++", "adaptive", "auto"])
def test_rules_work_above_and_below_a_view(name, above):
    """In another schedule at equal noise-to-signal ratio: the same x0 and the same unit noise, but for what is in the
    denoiser's own space: ``v`` of a flow is another than ``v`` of DDPM, here told apart by rescaling."""
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    rule, flow = rules(VP, IMAGES)[name], RectifiedFlow()
    if name == "rescaled":
        rule = ClassifierFreeGuidance(3.0, rescale=0.7, rescale_space="eps")
        flow = VarianceExploding()
    s = flow.time_of_nsr(VP.nsr(t))
    seen = x * (flow.scale(s) / VP.scale(t)).reshape(-1, 1, 1, 1)
    guided = rule(denoiser, null).under(flow) if above else rule(denoiser.under(flow), null)
    for one, other in zip(guided.x0_and_eps(seen, s, cond), rule(denoiser, null).x0_and_eps(x, t, cond), strict=True):
        assert_near(one, other, 1e-9)
    assert guided.own_noise == (name == "cfg++")


# -------------------------------------------------------------------------------------------------- rescaling and weights


@pytest.mark.parametrize("space", ["v", "eps", "x0"])
def test_rescaling_is_that_of_diffusers_on_a_prediction(space):
    from diffusers.guiders import ClassifierFreeGuidance as Theirs

    denoiser, x, t, cond, null = setting(VP, IMAGES)
    own, without = both(denoiser, x, t, cond, null)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (VP.alpha(t), VP.sigma(t)))

    def seen(x0):
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}[space]

    theirs = Theirs(guidance_scale=4.0, guidance_rescale=0.7).forward(seen(own), seen(without)).pred
    back = {"x0": lambda y: y, "eps": lambda y: (x - sigma * y) / alpha, "v": lambda y: alpha * x - sigma * y}[space]
    found = ClassifierFreeGuidance(4.0, rescale=0.7, rescale_space=space)(denoiser, null)(x, t, cond)
    assert_near(found, back(theirs), 1e-9)
    others = {"x0", "eps", "v"} - {space}
    for other in others:
        one = ClassifierFreeGuidance(4.0, rescale=0.7, rescale_space=other)(denoiser, null)(x, t, cond)
        assert (one - found).abs().max() > 1e-3, "the space matters"


def test_rescaling_in_a_flows_space_is_of_its_velocity():
    flow = RectifiedFlow()
    denoiser, x, t, cond, null = setting(flow, IMAGES)
    own, without = both(denoiser, x, t, cond, null)
    time = t.reshape(-1, 1, 1, 1)
    velocity, other = (x - own) / time, (x - without) / time
    made = other + 3.0 * (velocity - other)
    ratio = velocity.flatten(1).std(1) / made.flatten(1).std(1)
    made = made * (0.4 + 0.6 * ratio).reshape(-1, 1, 1, 1)
    found = ClassifierFreeGuidance(3.0, rescale=0.6, rescale_space="flow")(denoiser, null)(x, t, cond)
    assert_near(found, x - time * made)


WEIGHTS = {
    "linear": (LinearGuidanceWeight, lambda w, u: 2 * w * (1 - u)),
    "cosine": (CosineGuidanceWeight, lambda w, u: w * (math.cos(math.pi * u) + 1)),
    "clamped": (lambda **more: ClampedLinearGuidanceWeight(0.8, **more), lambda w, u: max(0.8, 2 * w * (1 - u))),
    "powered": (
        lambda **more: PoweredCosineGuidanceWeight(2.0, **more), lambda w, u: w * (1 - math.cos(math.pi * (1 - u) ** 2)) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("schedule", [RectifiedFlow(3.0), VP, TrigFlow(), VarianceExploding()], ids=repr)
def test_weights_are_of_the_share_of_time(schedule, name):
    """With a schedule of its own, of the share of that: a teacher in EDM's then has shares, the same under any view."""
    make, formula = WEIGHTS[name]
    of = RectifiedFlow(2.0) if isinstance(schedule, VarianceExploding) else None
    denoiser, x, t, cond, null = setting(schedule)
    own, without = both(denoiser, x, t, cond, null)
    if of is not None:
        shares = of.time_of_nsr(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
    else:
        shares = [float(time) / {RectifiedFlow: 1.0, VariancePreserving: 999.0}.get(type(schedule), math.pi / 2) for time in t]
    scales = torch.tensor([1 + formula(2.5, u) for u in shares], dtype=torch.float64)[:, None]
    rule = ClassifierFreeGuidance(3.5, weight=make() if of is None else make(schedule=of))
    assert_near(rule(denoiser, null)(x, t, cond), without + scales * (own - without), 1e-6)
    each = ClassifierFreeGuidance(torch.tensor([3.5, 2.0, 3.5, 1.5]), 0.3, weight=rule.weight)
    scales = torch.tensor([1 + formula(w, u) for w, u in zip((2.5, 1.0, 2.5, 0.5), shares, strict=True)])[:, None]
    expected = torch.cat([own[:1], (without + scales * (own - without))[1:]])
    assert_near(each(denoiser, null)(x, t, cond), expected, 1e-6)


def test_weights_rise_from_the_condition_itself_and_keep_their_mean():
    u, one = torch.linspace(1, 0, 10001, dtype=torch.float64), torch.ones(10001, dtype=torch.float64)
    for make, mean, end in ((LinearGuidanceWeight, 1.0, 2.0), (CosineGuidanceWeight, 1.0, 2.0)):
        values = make().at_share(one, u)
        assert values.mean() == pytest.approx(mean, abs=1e-3) and values[-1] == end and values[0] == 0
        assert bool((values.diff() >= 0).all())
    early, late = (PoweredCosineGuidanceWeight(power).at_share(one, u) for power in (0.5, 4.0))
    assert early[0] == late[0] == 0 and early[-1] == late[-1] == 1 and bool((early >= late).all()) and early[5000] > late[5000]


def test_a_time_without_shares_is_refused():
    denoiser, *_, null = setting(VarianceExploding())
    rule = ClassifierFreeGuidance(2.0, weight=LinearGuidanceWeight())
    with pytest.raises(ValueError, match="VarianceExploding.* is a noise level, which has no share.*set the schedule"):
        rule(denoiser, null)
    with pytest.raises(ValueError, match="no share"):
        LinearGuidanceWeight(VarianceExploding())
    rule(denoiser.under(VP), null)


# ---------------------------------------------------------------------------------------------------- projected guidance


@pytest.mark.parametrize("scale", [3.0, torch.tensor([3.0, 0.5, 7.0, 1.0], dtype=torch.float64)])
def test_apg_with_the_parallel_part_and_nothing_else_is_classifier_free(scale):
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    plain = ClassifierFreeGuidance(scale)(denoiser, null)(x, t, cond)
    assert_near(AdaptiveProjectedGuidance(scale, eta=1.0, momentum=0.0)(denoiser, null)(x, t, cond), plain)
    assert (AdaptiveProjectedGuidance(scale, momentum=0.0)(denoiser, null)(x, t, cond) - plain).abs().max() > 0.01


def test_apg_adds_nothing_along_the_condition():
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    own, without = (value.flatten(1) for value in both(denoiser, x, t, cond, null))
    found = AdaptiveProjectedGuidance(3.0, momentum=0.0)(denoiser, null)(x, t, cond).flatten(1)
    assert_near(((found - own) * own).sum(1), torch.zeros(4).double(), 1e-9)
    shift = own - without
    across = shift - (shift * own).sum(1, keepdim=True) / own.square().sum(1, keepdim=True) * own
    assert_near(found, own + 2.0 * across)
    bound = AdaptiveProjectedGuidance(3.0, 1.0, 0.25, 0.0)(denoiser, null)(x, t, cond).flatten(1)
    assert_near((bound - own).norm(dim=1), 2.0 * shift.norm(dim=1).clamp(max=0.25))
    assert bool((shift.norm(dim=1) > 0.25).any())


@pytest.mark.parametrize(("eta", "threshold", "momentum"), [(0.0, 0.5, -0.75), (0.4, None, -0.5), (1.0, 1.5, 0.0)])
def test_apg_along_a_trajectory_is_that_of_diffusers(eta, threshold, momentum):
    from diffusers.guiders import AdaptiveProjectedGuidance as Theirs
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    denoiser, x, t, cond, null = setting(VP, IMAGES)
    theirs = Theirs(3.0, momentum, threshold or 0.0, eta=eta, use_original_formulation=True)
    theirs.momentum_buffer = MomentumBuffer(momentum)
    guided = AdaptiveProjectedGuidance(4.0, eta, threshold, momentum)(denoiser, null).trajectory(no_fresh)
    for step in range(4):
        x, t = x * 0.8, t * 0.7
        expected = theirs.forward(*both(denoiser, x, t, cond, null)).pred
        assert_near(guided(x, t, cond), expected, 1e-6)
    if momentum:
        assert (guided(x, t, cond) - expected).abs().max() > 1e-3, "the momentum moves on"


@pytest.mark.parametrize("view", [None, RectifiedFlow()])
def test_momentum_is_of_one_trajectory(view):
    """Outside of one it is not used, in a second it begins anew, and samples outside of the interval do not take part."""
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    rule = AdaptiveProjectedGuidance(4.0, momentum=-0.75)
    guided, still = rule(denoiser, null), AdaptiveProjectedGuidance(4.0, momentum=0.0)(denoiser, null)
    if view is not None:
        t = view.time_of_nsr(VP.nsr(t))
        guided, still = guided.under(view), still.under(view)
    first = still(x, t, cond)
    assert torch.equal(guided(x, t, cond), first) and torch.equal(guided(x, t, cond), first)
    one, two = guided.trajectory(no_fresh), guided.trajectory(no_fresh)
    found = [one(x, t, cond), one(x, t, cond), two(x, t, cond), two(x, t, cond), one(x, t, cond)]
    assert torch.equal(found[0], first) and torch.equal(found[2], first)
    assert torch.equal(found[1], found[3]) and (found[1] - first).abs().max() > 0.01
    assert (found[4] - found[1]).abs().max() > 0.01
    assert torch.equal(guided(x, t, cond), first)


def test_momentum_of_samples_within_an_interval():
    """Row 0 comes into the interval at the second evaluation: it has no momentum there, the others have."""
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    guided = AdaptiveProjectedGuidance(4.0, momentum=-0.75, sigma_high=2.0)(denoiser, null).trajectory(no_fresh)
    plain = AdaptiveProjectedGuidance(4.0, momentum=0.0)(denoiser, null)
    guided(x, t, cond)
    t = t.flip(0)
    found, still = guided(x, t, cond), plain(x, t, cond)
    assert torch.equal(found[0], denoiser(x, t, cond)[0]) and torch.equal(found[3], still[3])
    assert not torch.isclose(found[1:3], still[1:3]).all(-1).any()


def test_samplers_follow_one_trajectory():
    """Momentum in `OdeSampler` is the hand-written loop's, and the next call begins anew."""
    flow = RectifiedFlow()
    denoiser, _, _, cond, null = setting(flow, IMAGES)
    noise = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    guided = AdaptiveProjectedGuidance(3.0, momentum=-0.5)(denoiser, null)
    x, shift = noise, 0.0
    for t in (1.0, 0.75, 0.5, 0.25):
        own, without = both(denoiser, x, torch.full((4,), t, dtype=torch.float64), cond, null)
        shift = own - without - 0.5 * shift
        along = (shift * own).sum((1, 2, 3), keepdim=True) / own.square().sum((1, 2, 3), keepdim=True) * own
        x0 = own + 2.0 * (shift - along)
        x = x0 if t == 0.25 else x0 * (1.25 - t) + (t - 0.25) * (x - (1 - t) * x0) / t
    sampler = OdeSampler(DDIM(), UniformGrid())
    assert_near(sampler(guided, noise, cond, 4), x)
    assert_near(sampler(guided, noise, cond, 4), x)


# ---------------------------------------------------------------------------------------------------------------- CFG++


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["vp-linear", "rf", "ve"])
def test_cfg_plus_plus_is_ddim_with_the_null_predictions_noise(name, scale):
    """Algorithm 2 of the paper written out: two steps, and the last to no noise."""
    schedule = SCHEDULES[name]
    oracle = Mixture(schedule, IMAGES, 0.4)
    cond, null = label_conditions(torch.tensor([0, 1, 2, 0]), 3)
    noise = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    x, times = schedule.prior_scale * noise, UniformGrid().times(schedule, 3)
    for t, s in zip(times, [*times[1:], None]):
        own, without = both(oracle, x, t.repeat(4), cond, null)
        x0 = without + scale * (own - without)
        eps_null = (x - schedule.alpha(t) * without) / schedule.sigma(t)
        x = x0 if s is None else schedule.alpha(s) * x0 + schedule.sigma(s) * eps_null
    found = OdeSampler(DDIM(), UniformGrid())(CfgPlusPlus(scale)(oracle, null), noise, cond, 3)
    assert_near(found, x, 1e-7)
    unguided = OdeSampler(DDIM(), UniformGrid())(oracle, noise, null if scale == 0 else cond, 3)
    assert (found - unguided).abs().max() < 1e-7 if scale == 0 else (found - unguided).abs().max() > 1e-5


def test_cfg_plus_plus_costs_two_rows_a_step_and_takes_a_scale_a_sample():
    denoiser, x, t, cond, null = setting()
    scale = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
    x0, eps = CfgPlusPlus(scale)(denoiser, null).x0_and_eps(x, t, cond)
    assert denoiser.rows == [8]
    own, without = both(denoiser, x, t, cond, null)
    assert_near(x0, without + scale[:, None] * (own - without))
    assert_near(eps, denoiser.schedule.eps(x, without, t))


@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMSolver2M()], ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("view", [False, True])
def test_solvers_that_would_not_step_by_its_noise_refuse_cfg_plus_plus(solver, view):
    denoiser, x, t, cond, null = setting()
    guided = CfgPlusPlus(0.6)(denoiser, null)
    guided = guided.under(VP) if view else guided
    with pytest.raises(ValueError, match=f"{type(solver).__name__}: .*use DDIM"):
        OdeSampler(solver, UniformGrid())(guided, x, cond, 2)
    with pytest.raises(ValueError, match="RenoiseSampler: .*use DDIM"):
        RenoiseSampler(UniformGrid())(guided, x, cond, 2)
    assert denoiser.rows == []
    OdeSampler(solver, UniformGrid())(ClassifierFreeGuidance(2.0)(denoiser, null), x, cond, 2)


def test_jumps_go_on_with_its_noise():
    """A network of two times; here it reads the first alone."""
    denoiser, x, _, cond, null = setting()
    one = torch.ones(4, dtype=torch.float64)
    x0, eps = CfgPlusPlus(0.6)(denoiser, null).x0_and_eps(x, one, cond)
    own, without = both(denoiser, 0.5 * (x0 + eps), one / 2, cond, null)
    found = JumpSampler(UniformGrid())(CfgPlusPlus(0.6)(denoiser, null), x, cond, 2)
    assert_near(found, without + 0.6 * (own - without))


# ---------------------------------------------------------------------------------------------------- adaptive guidance


@pytest.mark.parametrize("space", ["x0", "eps"])
def test_adaptive_guidance_is_decided_anew_where_there_is_no_trajectory(space):
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    own, without = both(denoiser, x, t, cond, null)
    sides = [own, without] if space == "x0" else [VP.eps(x, own, t), VP.eps(x, without, t)]
    cosines = cosine_similarity(*(side.flatten(1) for side in sides))
    threshold = float(cosines.sort().values[1:3].mean())
    guided = AdaptiveGuidance(3.0, threshold, space)(denoiser, null)
    denoiser.rows.clear()
    found = [guided(x, t, cond), guided(x, t, cond)]
    assert denoiser.rows == [8, 8] and torch.equal(*found)
    passed = (cosines > threshold).reshape(-1, 1, 1, 1)
    assert passed.sum() == 2
    assert_near(found[0], torch.where(passed, own, without + 3.0 * (own - without)))


def test_adaptive_guidance_saves_evaluations_along_a_trajectory():
    """Against the loop written out sample by sample; each stops for good, and the next trajectory begins anew."""
    flow, steps, threshold = RectifiedFlow(), 16, 0.98
    denoiser = Counted(flow, IMAGES, 0.4)
    cond, null = label_conditions(torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    noise = torch.randn(6, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    oracle, samples, rows = Mixture(flow, IMAGES, 0.4), [], torch.full((steps,), 6)
    for i in range(6):
        x, mine, stopped = noise[i : i + 1], {"labels": cond["labels"][i : i + 1]}, False
        for step, t in enumerate(torch.linspace(1, 1 / steps, steps).double()):
            own, without = both(oracle, x, t[None], mine, {"labels": null["labels"][:1]})
            rows[step] += not stopped
            stopped = stopped or bool(cosine_similarity(own.flatten(1), without.flatten(1)) > threshold)
            x0 = own if stopped else without + 3.0 * (own - without)
            s = t - 1 / steps
            x = (1 - s) * x0 + s * (x - (1 - t) * x0) / t
        samples.append(x)
    guided = AdaptiveGuidance(3.0, threshold, "x0")(denoiser, null)
    for _ in range(2):
        denoiser.rows.clear()
        found = OdeSampler(DDIM(), UniformGrid())(guided, noise, cond, steps)
        assert denoiser.rows == rows.tolist()
        assert_near(found, torch.cat(samples), 1e-9)
    assert rows[0] == 12 and 6 in rows.tolist() and len(set(rows.tolist())) > 2, "samples stop one by one, all in the end"


def test_a_cosine_that_is_never_passed_leaves_classifier_free_guidance():
    denoiser, x, t, cond, null = setting(VP, IMAGES)
    guided = AdaptiveGuidance(3.0, 1.0)(denoiser, null).trajectory(no_fresh)
    expected = ClassifierFreeGuidance(3.0)(denoiser, null)(x, t, cond)
    for _ in range(2):
        assert_near(guided(x, t, cond), expected)


# ---------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClassifierFreeGuidance(2.0, rescale=1.5), "rescale=1.5"),
        (lambda: AdaptiveProjectedGuidance(2.0, norm_threshold=0.0), "norm_threshold=0.0"),
        (lambda: AdaptiveProjectedGuidance(2.0, momentum=-1.0), "momentum=-1.0"),
        (lambda: AdaptiveProjectedGuidance(2.0, sigma_low=2.0, sigma_high=1.0), "sigma_low=2.0"),
        (lambda: CfgPlusPlus(7.5), "scale=7.5.*in \\[0, 1\\]"),
        (lambda: CfgPlusPlus(0.5).at(1.5), "scale=1.5"),
        (lambda: AdaptiveGuidance(2.0, 1.5), "threshold=1.5"),
        (lambda: ClampedLinearGuidanceWeight(-1.0), "least=-1.0"),
        (lambda: PoweredCosineGuidanceWeight(0.0), "power=0.0"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "rule",
    [AdaptiveGuidance(2.0), ClassifierFreeGuidance(2.0, rescale=0.5, rescale_space="eps")],
    ids=["adaptive", "rescaled"],
)
def test_noise_of_a_schedule_without_signal_is_refused(rule):
    """At a flow's start the noise is the sample itself: a cosine of 1 would end the guidance before it began."""
    denoiser, *_, null = setting()
    with pytest.raises(ValueError, match="space='eps': RectifiedFlow.* starts without signal"):
        rule(denoiser, null)
    rule(denoiser.under(VP), null)
