"""Rules that draw: conditions (ICG) and disturbed times (TSG). What is drawn, from where, and what it costs."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from guiding import IMAGES, MEANS, Counted, assert_near, both, setting
from helpers import small
from oracle import Mixture
from torch import nn

from distill.denoiser import Denoiser, NetworkDenoiser
from distill.grids import UniformGrid
from distill.guidance import ClassifierFreeGuidance, GuidanceRule, IndependentConditionGuidance, TimeStepGuidance
from distill.networks.dit import DiT
from distill.networks.unet2d import UNet2D
from distill.noise import SeededNoise
from distill.samplers import OdeSampler, RenoiseSampler
from distill.schedules import RectifiedFlow, VarianceExploding, VariancePreserving
from distill.solvers import DDIM
from distill.types import Cond, label_conditions


class Kept(Counted):
    """Keeps the conditions of every call."""

    def forward(self, x, t, cond, r=None):
        self.__dict__.setdefault("calls", []).append(cond)
        return super().forward(x, t, cond, r)


class Prompted(Denoiser):
    """Shrinks its input by what its prompt says."""

    schedule, shape, widths = RectifiedFlow(), (3,), {"prompt_embeds": 2}

    def forward(self, x, t, cond, r=None):
        self.cond = cond
        return x * cond["prompt_embeds"].mean((1, 2))[:, None]


def unet(num_classes: int | None = 3, null_class: bool = True) -> NetworkDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2D(1, 4, num_classes, (8, 16), 1, (False, True), 8, 4)
    network.null_class = null_class
    return NetworkDenoiser(network, RectifiedFlow(), "flow").eval().requires_grad_(False)


def images(count: int = 4, size: int = 4) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 1, size, size, generator=generator)
    return x, torch.linspace(0.2, 0.9, count), {"labels": torch.arange(count) % 3}


def draw(guided: Denoiser, numbers: list[int], cond: Cond, shape: tuple[int, ...], sampler=None) -> torch.Tensor:
    """Samples with these numbers, conditions by number."""
    fresh = SeededNoise(0, numbers, shape)
    noise, rows = fresh.draw().double(), {key: value[numbers] for key, value in cond.items()}
    return (sampler or OdeSampler(DDIM(), UniformGrid()))(guided, noise, rows, 4, fresh)


# ------------------------------------------------------------------------------------------------ independent conditions


def test_icg_is_the_formula_with_the_class_that_was_drawn():
    denoiser, x, t, cond, null = setting()
    torch.manual_seed(3)
    found = IndependentConditionGuidance(3.0)(denoiser, {})(x, t, cond)
    assert denoiser.rows == [8] and denoiser.cond["labels"][:4].tolist() == [0, 1, 2, 0]
    drawn = {"labels": denoiser.cond["labels"][4:]}
    own, other = both(denoiser, x, t, cond, drawn)
    assert_near(found, other + 3.0 * (own - other))
    assert (found - own).abs().max() > 0.1


def test_icg_draws_every_class_alike_and_never_the_null_class():
    denoiser = Counted(RectifiedFlow())
    guided = IndependentConditionGuidance(3.0)(denoiser, {})
    x, t = torch.randn(3000, 2, dtype=torch.float64), torch.full((3000,), 0.5, dtype=torch.float64)
    torch.manual_seed(1)
    guided(x, t, {"labels": torch.zeros(3000, dtype=torch.long)})
    labels = denoiser.cond["labels"][3000:]
    # four standard errors of a count of 3000 draws at 1/3
    assert labels.bincount().tolist() == pytest.approx([1000] * 3, abs=104) and labels.bincount().numel() == 3
    guided(x, t, {"labels": torch.zeros(3000, dtype=torch.long)})
    assert not torch.equal(denoiser.cond["labels"][3000:], labels), "drawn anew"


def test_icg_needs_no_null_class():
    network, (x, t, cond) = unet(null_class=False), images()
    with pytest.raises(ValueError, match="no null class.*IndependentConditionGuidance"):
        ClassifierFreeGuidance(2.0)(network, label_conditions(cond["labels"], 3)[1])
    assert IndependentConditionGuidance(2.0)(network, {})(x, t, cond).shape == x.shape
    assert IndependentConditionGuidance(1.0)(network, {}) is network


def test_icg_replaces_embeddings_by_noise_of_their_scale_and_leaves_the_rest():
    prompts = torch.randn(400, 5, 2) * torch.linspace(0.5, 4, 400)[:, None, None] + 3
    cond = {"prompt_embeds": prompts, "prompt_mask": torch.ones(400, 5), "time_ids": torch.rand(400, 6)}
    denoiser, x, t = Prompted(), torch.randn(400, 3), torch.full((400,), 0.5)
    torch.manual_seed(0)
    found = IndependentConditionGuidance(2.0)(denoiser, {})(x, t, cond)
    drawn = {key: value[400:] for key, value in denoiser.cond.items()}
    assert torch.equal(drawn["prompt_mask"], cond["prompt_mask"]) and torch.equal(drawn["time_ids"], cond["time_ids"])
    unit = drawn["prompt_embeds"] / prompts.flatten(1).std(1)[:, None, None]
    assert abs(float(unit.mean())) < 0.07 and float(unit.std()) == pytest.approx(1, abs=0.05)
    assert abs(float((unit * prompts).mean()) - 0) < 0.35, "nothing of the sample's own"
    own, other = (denoiser(x, t, {"prompt_embeds": side["prompt_embeds"]}) for side in (cond, drawn))
    assert_near(found, other + 2.0 * (own - other), 1e-5)
    IndependentConditionGuidance(2.0, ["time_ids"])(denoiser, {})(x, t, cond)
    assert torch.equal(denoiser.cond["prompt_embeds"][400:], prompts)
    assert not torch.isclose(denoiser.cond["time_ids"][400:], cond["time_ids"]).all(1).any()


@pytest.mark.parametrize(
    ("denoiser", "conditions", "words"),
    [
        (small(), None, "reads no condition that could be drawn; .*TimeStepGuidance"),
        (Mixture(RectifiedFlow(), MEANS, 0.4), ["prompt_embeds"], r"guidance.conditions=\['prompt_embeds'\]: the batch has"),
        (Prompted(), ["labels"], r"guidance.conditions=\['labels'\]: the network names no number of classes"),
    ],
)
def test_icg_without_a_condition_to_draw_is_refused(denoiser, conditions, words):
    with pytest.raises(ValueError, match=words):
        guided = IndependentConditionGuidance(2.0, conditions)(denoiser, {})
        guided(torch.randn(2, 2), torch.full((2,), 0.5), {"labels": torch.arange(2)})


# ----------------------------------------------------------------------------------------------------- numbered samples


@pytest.mark.parametrize("sampler", [OdeSampler(DDIM(), UniformGrid()), RenoiseSampler(UniformGrid())], ids=["ode", "renoise"])
def test_a_sample_under_icg_depends_on_its_number_alone(sampler):
    """Whatever the batch and the state of torch's generator; each step draws anew."""
    denoiser = Kept(RectifiedFlow(), IMAGES)
    cond, numbers = {"labels": torch.arange(12) % 3}, list(range(12))
    guided = IndependentConditionGuidance(3.0)(denoiser, {})
    torch.manual_seed(0)
    whole = draw(guided, numbers, cond, (2, 3, 3), sampler)
    drawn = torch.stack([call["labels"][12:] for call in denoiser.calls])
    assert (drawn[0] != drawn[1]).any() and (drawn[1] != drawn[2]).any()
    torch.manual_seed(1)
    parts = torch.cat([draw(guided, part, cond, (2, 3, 3), sampler) for part in (numbers[:1], numbers[1:6], numbers[6:])])
    assert_near(whole, parts)
    assert_near(draw(guided, [7, 3, 11], cond, (2, 3, 3), sampler), whole[[7, 3, 11]])


def test_a_sample_under_tsg_depends_on_its_number_alone():
    denoiser, cond, numbers = unet().double(), {"labels": torch.arange(12) % 3}, list(range(12))
    guided = TimeStepGuidance(3.0, 2.0, sigma_high=2.0)(denoiser, {})
    torch.manual_seed(0)
    whole = draw(guided, numbers, cond, (1, 4, 4))
    torch.manual_seed(1)
    parts = torch.cat([draw(guided, part, cond, (1, 4, 4)) for part in (numbers[:1], numbers[1:6], numbers[6:])])
    assert_near(whole, parts, 1e-9)
    assert (whole - draw(denoiser, numbers, cond, (1, 4, 4))).abs().flatten(1).amax(1).min() > 1e-4


@pytest.mark.parametrize("rule", [IndependentConditionGuidance(3.0), TimeStepGuidance(3.0, 2.0)], ids=["icg", "tsg"])
def test_outside_of_a_trajectory_torchs_generator_is_drawn_from(rule: GuidanceRule):
    denoiser, (x, t, cond) = unet(), images()
    guided = rule(denoiser, {})
    torch.manual_seed(5)
    first, second = guided(x, t, cond), guided(x, t, cond)
    torch.manual_seed(5)
    assert torch.equal(guided(x, t, cond), first) and not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------ disturbed times


class Shifted(nn.Module):
    """An embedding of times plus a given tensor."""

    def __init__(self, embedding: nn.Module, shift: torch.Tensor):
        super().__init__()
        self.embedding, self.shift = embedding, shift

    def forward(self, *inputs):
        return self.embedding(*inputs) + self.shift


def by_hand(denoiser: NetworkDenoiser, owners: list[tuple[nn.Module, str]], shift: torch.Tensor) -> None:
    for owner, name in owners:
        setattr(owner, name, Shifted(getattr(owner, name), shift))


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("of", ["unet", "dit"])
def test_tsg_disturbs_what_the_time_embedding_gives_by_strength_and_share_of_time(of, view):
    """Against networks whose embeddings were replaced; DiT has one in each block, all disturbed alike."""
    x, t, cond = images(size=8 if of == "dit" else 4)
    if of == "dit":
        denoiser = NetworkDenoiser(DiT.of(FAMILIES["dit"].model()), RectifiedFlow(), "flow").requires_grad_(False)
        x, width = x.repeat(1, 4, 1, 1), denoiser.network.time_embedding()[0].linear_2.out_features
    else:
        denoiser, width = unet(), 32
    changed = copy.deepcopy(denoiser)
    torch.manual_seed(4)
    noise = torch.cat([torch.randn_like(x).flatten(1) for _ in range(-(-width // x[0].numel()))], 1)[:, :width]
    blocks = getattr(changed.network.model, "transformer_blocks", [])
    owners = [(block.norm1.emb, "timestep_embedder") for block in blocks] or [(changed.network.model, "time_embedding")]
    assert of == "unet" or len(owners) > 1
    by_hand(changed, owners, 1.5 * (t**2)[:, None] * noise)
    seen, time, base = x, t, denoiser
    if view:
        other = VariancePreserving()
        time = other.time_of_nsr(RectifiedFlow().nsr(t))
        seen = x * (other.scale(time) / RectifiedFlow().scale(t))[:, None, None, None]
        base = denoiser.under(other)
    guided = TimeStepGuidance(3.0, 1.5, 2.0, schedule=RectifiedFlow())(base, {})
    own, wrong = denoiser(x, t, cond), changed(x, t, cond)
    torch.manual_seed(4)
    assert_near(guided(seen, time, cond), wrong + 3.0 * (own - wrong), 2e-4 if view else 1e-5)
    assert (own - wrong).abs().flatten(1).amax(1).min() > 1e-4
    assert_near(denoiser(x, t, cond), own, 1e-6)


def test_tsg_is_one_forward_and_leaves_no_hook_behind():
    """Nor after a call that fails; rows outside of the interval cost one."""
    denoiser, (x, t, cond) = unet(), images()
    seen = []
    denoiser.network.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    embedding = denoiser.network.time_embedding()[0]
    TimeStepGuidance(3.0, 1.0)(denoiser, {})(x, t, cond)
    TimeStepGuidance(3.0, 1.0, sigma_low=1.0)(denoiser, {})(x, t, cond)
    assert seen == [8, 6] and not embedding._forward_hooks
    with pytest.raises(KeyError):
        TimeStepGuidance(3.0, 1.0)(denoiser, {})(x, t, {})
    assert not embedding._forward_hooks
    own = denoiser(x, t, cond)
    assert_near(TimeStepGuidance(3.0, 0.0)(denoiser, {})(x, t, cond), own, 1e-5)
    assert TimeStepGuidance(1.0, 1.0)(denoiser, {}) is denoiser


def test_tsg_guides_networks_without_conditions():
    denoiser, (x, t, _) = unet(None), images()
    assert (TimeStepGuidance(3.0, 1.0)(denoiser, {})(x, t, {}) - denoiser(x, t, {})).abs().max() > 1e-3


def test_tsg_where_there_is_no_time_embedding_to_disturb_is_refused():
    denoiser, null = unet(), {"labels": torch.full((1,), 3)}
    with pytest.raises(ValueError, match="a Mixture has no time embedding"):
        TimeStepGuidance(2.0, 1.0)(Mixture(RectifiedFlow(), MEANS, 0.4), {})
    with pytest.raises(ValueError, match="a GuidedDenoiser has no time embedding .*by this rule alone"):
        TimeStepGuidance(2.0, 1.0)(ClassifierFreeGuidance(2.0)(denoiser, null), {})
    with pytest.raises(ValueError, match="SmallNetwork does not say what embeds its times"):
        TimeStepGuidance(2.0, 1.0)(small(num_classes=2), {})
    with pytest.raises(ValueError, match="is a noise level"):
        TimeStepGuidance(2.0, 1.0)(denoiser.under(VarianceExploding()), {})
    with pytest.raises(ValueError, match="strength=-1.0"):
        TimeStepGuidance(2.0, -1.0)


def test_tsg_refuses_networks_that_would_not_run_its_hook():
    denoiser, (x, t, cond) = unet(), images()
    guided = TimeStepGuidance(2.0, 1.0)(denoiser, {})
    denoiser.network.model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient_checkpointing=true"):
        guided(x, t, cond)
    with torch.no_grad():
        guided(x, t, cond)
    denoiser.network.model.compile()
    with pytest.raises(ValueError, match="optimization.compile=true"), torch.no_grad():
        guided(x, t, cond)
