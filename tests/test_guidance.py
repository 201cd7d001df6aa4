"""Guidance: the formula, the interval, scales of each sample and of each batch, what it costs, and dropped conditions."""

from __future__ import annotations

import pytest
import torch
from guiding import MEANS, assert_near, both, setting
from helpers import small
from oracle import SCHEDULES, Mixture

from distill.denoiser import Denoiser
from distill.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    RandomGuidance,
    check_range,
    draw_scales,
    drop_conditions,
    guided,
)
from distill.schedules import RectifiedFlow, VarianceExploding, per_sample
from distill.types import label_conditions


def test_classes_without_a_null_class_are_not_guided():
    """Class 2 of two would be read from beyond the table of embeddings."""
    denoiser = small(num_classes=2)
    denoiser.null_class = False
    cond, null = label_conditions(torch.arange(2), 2)
    ClassifierFreeGuidance(1.0)(denoiser, null)
    with pytest.raises(ValueError, match="guidance.scale=2.0.*no null class"):
        ClassifierFreeGuidance(2.0)(denoiser, null)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), RectifiedFlow(3.0), VarianceExploding()], ids=repr)
def test_formula_by_two_separate_evaluations_in_one_forward(schedule):
    denoiser, x, t, cond, null = setting(schedule)
    guided = ClassifierFreeGuidance(3.5)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [8]
    with_class, without = denoiser(x, t, cond), denoiser(x, t, null)
    torch.testing.assert_close(guided, without + 3.5 * (with_class - without), rtol=0, atol=1e-12)
    assert (with_class - without).abs().max() > 0.1


def test_each_sample_may_have_its_scale():
    denoiser, x, t, cond, null = setting()
    scale = torch.tensor([0.0, 1.0, 2.0, 7.5])
    guided = ClassifierFreeGuidance(scale)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [8]
    with_class, without = denoiser(x, t, cond), denoiser(x, t, null)
    torch.testing.assert_close(guided, without + scale[:, None] * (with_class - without), rtol=0, atol=1e-12)


def test_scale_1_is_the_denoiser_itself():
    denoiser, x, t, cond, null = setting()
    unguided = ClassifierFreeGuidance(1.0)(denoiser, null)
    assert unguided is denoiser and ClassifierFreeGuidance(1.0)(denoiser, {}) is denoiser
    unguided(x, t, cond)
    assert denoiser.rows == [4]


@pytest.mark.parametrize(
    ("low", "high", "guided"),
    [
        (None, None, [True, True, True, True]),
        (1.0, None, [False, False, True, True]),
        (None, 1.0, [True, True, False, False]),
        (0.25, 1.0, [False, True, False, False]),
        (0.2, 2.5, [True, True, True, False]),
    ],
)
def test_interval_is_open_below_and_closed_above(low, high, guided):
    """Samples outside of it cost one row, and are the denoiser's own, to the bit."""
    denoiser, x, _, cond, null = setting(VarianceExploding())
    t = torch.tensor([0.25, 1.0, 1.5, 4.0], dtype=torch.float64)
    found = ClassifierFreeGuidance(3.0, low, high)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [4 + sum(guided)]
    inside, own = torch.tensor(guided), denoiser(x, t, cond)
    everywhere = ClassifierFreeGuidance(3.0)(denoiser, null)(x, t, cond)
    assert torch.equal(found, torch.where(inside[:, None], everywhere, own))
    assert (everywhere - own).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("name", SCHEDULES)
def test_interval_is_in_noise_to_signal_ratio_on_every_schedule(name):
    schedule = SCHEDULES[name]
    oracle = Mixture(schedule, MEANS, 0.4)
    t = schedule.time_of_nsr(torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64))
    x = torch.randn(4, 2, dtype=torch.float64) * schedule.scale(t)[:, None]
    cond, null = label_conditions(torch.tensor([0, 1, 2, 0]), 3)
    guided = ClassifierFreeGuidance(2.0, 0.3, 5.0)(oracle, null)(x, t, cond)
    scale = per_sample(torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64), x)
    with_class, without = oracle(x, t, cond), oracle(x, t, null)
    torch.testing.assert_close(guided, without + scale * (with_class - without), rtol=0, atol=1e-12)


def test_scales_of_each_sample_within_an_interval():
    """Two of four inside: one forward of six rows, the last two with the null condition, each at its own scale."""
    denoiser, x, t, cond, null = setting()
    scale = torch.tensor([5.0, 2.0, 7.5, 3.0])
    found = ClassifierFreeGuidance(scale, 0.3, 2.0)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [6] and denoiser.cond["labels"].tolist() == [0, 1, 2, 0, 3, 3]
    own, without = both(denoiser, x, t, cond, null)
    assert_near(found[1:3], without[1:3] + torch.tensor([[2.0], [7.5]]) * (own - without)[1:3])
    assert torch.equal(found[[0, 3]], own[[0, 3]])


def test_a_batch_outside_of_its_interval_costs_one_evaluation():
    denoiser, x, t, cond, null = setting()
    found = ClassifierFreeGuidance(3.0, 5.0)(denoiser, null)(x, t, cond)
    assert denoiser.rows == [4] and denoiser.cond["labels"].tolist() == [0, 1, 2, 0]
    assert torch.equal(found, denoiser(x, t, cond))


def test_pure_noise_lies_above_every_interval():
    denoiser, x, _, cond, null = setting()
    t = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(ClassifierFreeGuidance(3.0, None, 80.0)(denoiser, null)(x, t, cond), denoiser(x, t, cond))


def test_conditions_without_a_null_are_shared():
    denoiser, x, t, cond, null = setting()
    strength = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ClassifierFreeGuidance(2.0)(denoiser, null)(x, t, {**cond, "strength": strength})
    assert denoiser.cond["strength"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert denoiser.cond["labels"].tolist() == [0, 1, 2, 0, 3, 3, 3, 3]


def test_second_time_is_given_to_both_halves():
    class Second(Denoiser):
        schedule = RectifiedFlow()

        def forward(self, x, t, cond, r=None):
            return x * r[:, None]

    x, r = torch.ones(2, 1), torch.tensor([0.1, 0.2])
    cond, null = label_conditions(torch.tensor([0, 1]), 3)
    guided = ClassifierFreeGuidance(2.0)(Second(), null)(x, torch.tensor([0.5, 0.6]), cond, r)
    torch.testing.assert_close(guided, r[:, None])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="sigma_low=2.0"):
        ClassifierFreeGuidance(2.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="guidance.scale=2.0"):
        ClassifierFreeGuidance(2.0)(Mixture(RectifiedFlow(), MEANS, 0.4), {})


@pytest.mark.parametrize("interval", [(None, None), (0.3, 2.0)])
def test_gradients_and_tangents_are_the_formulas(interval):
    """Guided scores of trained networks: every weight's gradient passes both evaluations; forward-mode too."""
    network, (_, x, t, cond, null) = small(num_classes=3).double(), setting()
    x = x[:, :, None, None]
    rule = ClassifierFreeGuidance(2.5, *interval)
    inside = torch.tensor([interval == (None, None) or 0.3 < level <= 2.0 for level in (0.25, 0.7, 1.5, 4.0)])

    def by_hand(x, t):
        own, without = both(network, x, t, cond, null)
        return torch.where(inside[:, None, None, None], without + 2.5 * (own - without), own)

    weights = list(network.parameters())
    found, expected = rule(network, null)(x, t, cond), by_hand(x, t)
    assert_near(found, expected)
    grads = [torch.autograd.grad(value.square().sum(), weights) for value in (found, expected)]
    for one, other in zip(*grads, strict=True):
        assert_near(one, other)
    assert max(float(grad.abs().max()) for grad in grads[0]) > 0.01
    tangents = torch.randn_like(x), torch.ones_like(t)
    along = [torch.func.jvp(f, (x, t), tangents)[1] for f in (lambda x, t: rule(network, null)(x, t, cond), by_hand)]
    assert_near(*along)


def test_under_autocast_sums_stay_in_float32():
    network, (_, x, t, cond, null) = small(num_classes=3), setting()
    x, t = x.float()[:, :, None, None], t.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = ClassifierFreeGuidance(2.5)(network, null)(x, t, cond)
        own, without = both(network, x, t, cond, null)
    assert found.dtype == torch.float32 and not torch.equal(own, network(x, t, cond))
    assert_near(found, without + 2.5 * (own - without), 1e-6)


# ------------------------------------------------------------------------------------------------ a scale, whoever reads it


def test_a_denoiser_at_a_scale_is_guided_classifier_free_or_by_a_rule():
    denoiser, x, t, cond, null = setting()
    own, without = both(denoiser, x, t, cond, null)
    scales = torch.tensor([2.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    for scale in (2.5, scales):
        at, conditions = guided(denoiser, cond, null, scale)
        expected = without + (scale if isinstance(scale, float) else scale[:, None]) * (own - without)
        assert_near(at(x, t, conditions), expected)
        assert conditions is cond
    at, _ = guided(denoiser, cond, null, 2.5, AdaptiveProjectedGuidance(9.0, 0.3, None, 0.0, sigma_low=1.0))
    assert_near(at(x, t, cond), AdaptiveProjectedGuidance(2.5, 0.3, None, 0.0, sigma_low=1.0)(denoiser, null)(x, t, cond))
    assert guided(denoiser, cond, null, 1.0)[0] is denoiser


def test_a_denoiser_that_reads_the_scale_is_given_it_and_no_rule():
    denoiser, x, t, cond, null = setting()
    denoiser.scalar_inputs = ("guidance",)
    at, conditions = guided(denoiser, cond, null, 2.5, AdaptiveProjectedGuidance(9.0))
    assert at is denoiser and conditions["guidance"].tolist() == [2.5] * 4 and "guidance" not in cond
    scales = torch.tensor([2.0, 3.0, 1.0, 0.5])
    assert guided(denoiser, cond, null, scales)[1]["guidance"] is scales


def test_ranges_of_scales():
    torch.manual_seed(2)
    found = draw_scales((2.0, 6.0), 4000)
    torch.manual_seed(2)
    assert torch.equal(found, 2.0 + 4.0 * torch.rand(4000)) and found.shape == (4000,)
    check_range((0.0, 3.0))
    for bad in ((-0.5, 2.0), (2.0, 2.0), (3.0, 2.0), (1.0, float("nan")), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="w_range=.*give 0 <= low < high"):
            check_range(bad, key="w_range")


# ----------------------------------------------------------------------------------------------------- drawn scales


def test_a_drawn_scale_guides_the_whole_batch_in_one_forward():
    denoiser, x, t, cond, null = setting()
    rule = RandomGuidance(2.0, 6.0).drawn(torch.device("cpu"))
    assert isinstance(rule.scale, torch.Tensor) and rule.scale.shape == ()
    guided = rule(denoiser, null)(x, t, cond)
    assert denoiser.rows == [8]
    with_class, without = denoiser(x, t, cond), denoiser(x, t, null)
    torch.testing.assert_close(guided, without + rule.scale.double() * (with_class - without), rtol=0, atol=1e-12)


def test_drawn_scales_are_uniform_in_their_range():
    torch.manual_seed(1)
    rule, device = RandomGuidance(0.5, 4.0), torch.device("cpu")
    scales = torch.stack([rule.drawn(device).scale for _ in range(4000)])
    # quartiles of the uniform law, within four standard errors: 3.5 sqrt(p (1 - p) / 4000)
    quartiles = scales.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    assert quartiles == pytest.approx([0.5, 1.375, 2.25, 3.125, 4.0], abs=0.11)
    assert 0.5 <= scales.min() and scales.max() <= 4.0
    torch.manual_seed(1)
    assert torch.equal(rule.drawn(device).scale, scales[0])


def test_a_drawn_scale_may_be_1_or_less():
    """A scale of 1 in a tensor is not looked at, which would wait for the device; it guides to the condition itself."""
    denoiser, x, t, cond, null = setting()
    for scale, weight in ((1.0, 1.0), (0.5, 0.5)):
        guided = ClassifierFreeGuidance(torch.tensor(scale))(denoiser, null)(x, t, cond)
        exact = denoiser(x, t, null).lerp(denoiser(x, t, cond), weight)
        torch.testing.assert_close(guided, exact, rtol=0, atol=1e-12)


def test_random_guidance_itself_is_that_of_the_middle():
    denoiser, x, t, cond, null = setting()
    middle = ClassifierFreeGuidance(2.25)(denoiser, null)(x, t, cond)
    torch.testing.assert_close(RandomGuidance(0.5, 4.0)(denoiser, null)(x, t, cond), middle, rtol=0, atol=0)


def test_a_rule_without_chance_is_drawn_as_itself():
    rule = ClassifierFreeGuidance(3.0)
    assert rule.drawn(torch.device("cpu")) is rule


@pytest.mark.parametrize(("low", "high"), [(-0.1, 2.0), (2.0, 2.0), (3.0, 2.0), (0.5, float("nan"))])
def test_bad_ranges_of_scales_are_named(low, high):
    with pytest.raises(ValueError, match=f"low={low} and high={high}"):
        RandomGuidance(low, high)


# ------------------------------------------------------------------------------------------------ dropped conditions


def test_dropped_rows_are_the_nulls_in_every_condition():
    """One draw of ``torch.rand`` a sample decides for all its conditions, whatever their shapes."""
    cond = {"labels": torch.arange(1000), "prompt_embeds": torch.randn(1000, 3, 2)}
    null = {"labels": torch.full((1000,), -1), "prompt_embeds": torch.randn(1000, 3, 2)}
    before = {key: value.clone() for key, value in cond.items()}
    torch.manual_seed(5)
    dropped = drop_conditions(cond, null, 0.3)
    torch.manual_seed(5)
    rows = torch.rand(1000) < 0.3
    assert 200 < rows.sum() < 400
    for key, value in dropped.items():
        assert torch.equal(value[rows], null[key][rows]) and torch.equal(value[~rows], cond[key][~rows])
        assert torch.equal(cond[key], before[key])


def test_nothing_is_drawn_where_nothing_is_dropped():
    cond, null = label_conditions(torch.tensor([0, 1]), 3)
    state = torch.get_rng_state()
    assert drop_conditions(cond, null, 0.0) is cond and drop_conditions({}, {}, 0.5) == {}
    assert torch.equal(torch.get_rng_state(), state)
