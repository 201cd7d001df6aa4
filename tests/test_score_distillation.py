"""Score distillation around its losses: who moves, what each turn evaluates, backward simulation, checkpoints, exports."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import conditions, draw_all, plan_of, teacher_of, written
from helpers import Watch, everything, fit, of_part, same, small
from pytorch_lightning import Callback
from torch import Tensor, nn

from distill.adversarial import Adversarial, JointAdversarial
from distill.denoiser import NetworkDenoiser
from distill.distances import PseudoHuber, SquaredDistance
from distill.divergences import FDivergence
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.export.check import LIMIT
from distill.export.student import export_student
from distill.few_step import FewStepSampler
from distill.grids import UniformGrid
from distill.guidance import ClassifierFreeGuidance, RandomGuidance
from distill.lora import LoRA
from distill.methods.base import Method
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.fake_score import FakeScore
from distill.methods.score_distillation import ScoreDistillation
from distill.methods.score_identity import ScoreIdentity
from distill.methods.score_implicit import ScoreImplicit
from distill.networks.unet2d import UNet2D
from distill.optimization import Optimization, PlayerOptimization
from distill.samplers import RenoiseSampler
from distill.schedules import RectifiedFlow
from distill.times import UniformTimes
from distill.types import Batch, label_conditions
from distill.weights import ConstantWeight, VariationalScoreWeight

SHAPE = (1, 4, 4)
ROWS = 4
CFG = ClassifierFreeGuidance(2.0)
KINDS: dict[str, Callable[..., ScoreDistillation]] = {
    "sid": partial(ScoreIdentity, alpha=1.2),
    "sida": partial(ScoreIdentity, adversarial=JointAdversarial()),
    "sim": partial(ScoreImplicit, distance=PseudoHuber(0.1)),
    "vsd": partial(DistributionMatching, weight=VariationalScoreWeight(), normalize=False),
    "dmd2": partial(DistributionMatching, adversarial=Adversarial(UniformTimes())),
}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


def teacher(seed: int = 0, dropout: float = 0.2) -> NetworkDenoiser:
    """A U-Net of two levels, with attention and dropout, on 4x4 samples of two classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2D(1, 4, 2, (8, 8), layers_per_block=1, heads_width=8, groups=4, dropout=dropout)
    return NetworkDenoiser(network, RectifiedFlow(), "flow")


def method(
    kind: str = "sid", times: tuple[float, ...] = (1.0,), fake: dict[str, Any] | None = None, **settings: Any
) -> ScoreDistillation:
    """One of `KINDS`; ``fake`` are settings of its fake score."""
    fake = {"times": UniformTimes(0.02, 0.98), "weight": ConstantWeight()} | (fake or {})
    defaults: dict[str, Any] = {
        "teacher": settings.pop("teacher", None) or teacher(),
        "sampler": FewStepSampler(times=times),
        "times": UniformTimes(0.02, 0.98),
        "fake_score": FakeScore(**{"optimization": PlayerOptimization(adam), **fake}),
        "optimization": Optimization(adam, averaging=DecayAveraging(0.9)),
        "evaluation": Evaluation(steps=[1]),
    }
    return KINDS[kind](**{**defaults, **settings})


def batch(number: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x0, noise = torch.randn(2, ROWS, *SHAPE, generator=generator)
    return Batch(x0, *label_conditions((torch.arange(ROWS) + number) % 2, 2), noise)


BATCHES = [batch(number) for number in range(6)]


# ------------------------------------------------------------------------------------------------------------ who moves

SHARING: dict[str, dict[str, Any]] = {
    "copies": {},
    "fake score by LoRA": {"fake": {"lora": LoRA(2)}},
    "both by LoRA": {"fake": {"lora": LoRA(2)}, "lora": LoRA(2)},
}


class Phases(Callback):
    """For each turn: modes and ``requires_grad`` of every network when the losses are asked for, gradients before the step."""

    def __init__(self, watched: ScoreDistillation):
        self.parts: dict[str, nn.Module] = {
            "student": watched.student,
            "critic": watched.critic,
            "ema": watched.ema.module,
            "teacher": watched.teacher,
        }
        self.modes: list[dict[str, set[bool]]] = []
        self.trained: list[set[int]] = []
        self.gradients: list[set[int]] = []
        for name in ("losses", "critic_losses"):
            setattr(watched, name, partial(self.spy, getattr(watched, name)))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for part in self.parts.values() for parameter in part.parameters()]

    def spy(self, losses: Any, batch: Batch) -> Any:
        self.modes.append({name: {module.training for module in part.modules()} for name, part in self.parts.items()})
        self.trained.append({id(parameter) for parameter in self.parameters() if parameter.requires_grad})
        return losses(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({id(parameter) for parameter in self.parameters() if parameter.grad is not None})


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [*((kind, "copies") for kind in ("sid", "sim", "dmd2")), ("dmd2", "fake score by LoRA"), ("sid", "both by LoRA")],
)
def test_each_turn_moves_its_own_player_and_nothing_else(kind: str, sharing: str):
    """Fake score twice, generator once, twice over, with a validation after each turn."""
    settings = copy.deepcopy(SHARING[sharing])
    settings["fake"] = settings.get("fake", {}) | {"steps": 2}
    trained, watch = method(kind, **settings), Watch()
    before = {name: value.clone() for name, value in trained.teacher.state_dict().items()}
    own = {
        name: {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
        for name, part in (("student", trained.student), ("critic", trained.critic))
    }
    assert own["student"] and own["critic"] and not own["student"] & own["critic"]
    phases = Phases(trained)
    ready = fit(trained, BATCHES, 6, phases, watch, limit_val_batches=1, val_check_interval=1)
    turns = ["critic", "critic", "student"] * 2
    assert phases.modes == [
        {"student": {turn == "student"}, "critic": {turn == "critic"}, "ema": {False}, "teacher": {False}} for turn in turns
    ]
    assert phases.trained == [own[turn] for turn in turns]
    # Inputs of layers that nothing is asked of have no gradient; nothing else may have one.
    assert all(found and found <= own[turn] for found, turn in zip(phases.gradients, turns, strict=True))
    for part in ("student", "ema", "optimizer.0"):
        assert [watch.moved(number, part) for number in range(6)] == [turn == "student" for turn in turns], part
    for part in ("critic.score", *(["critic.head"] if kind == "dmd2" else []), "optimizer.1"):
        assert [watch.moved(number, part) for number in range(6)] == [turn == "critic" for turn in turns], part
    assert same(before, dict(trained.teacher.state_dict()))
    assert all(parameter.grad is None for parameter in phases.parameters())
    held = [{id(p) for group in each.param_groups for p in group["params"]} for each in ready.optimizers]
    assert held == [own["student"], own["critic"]]


def test_layers_of_both_players_stand_on_the_teachers_own_weights():
    """One network's memory, and checkpoints without it, that load strictly."""
    settings: dict[str, Any] = {"fake": {"lora": LoRA(2)}, "lora": LoRA(2)}
    trained = method("dmd2", **settings)
    places = {value.data_ptr() for value in trained.teacher.parameters()}
    for denoiser in (trained.student, trained.fake, trained.ema.module):
        plain = [value for name, value in denoiser.named_parameters() if "lora_" not in name]
        assert {value.data_ptr() for value in plain} == places
    fit(trained, BATCHES, 4)
    state = trained.state_dict()
    assert all("lora_" in name or name.startswith(("critic.head.", "skipped.")) for name in state), list(state)
    assert {name.split(".network.")[0] for name in state if "lora_" in name} == {"student", "ema.module", "critic.score"}
    again = method("dmd2", **settings)
    again.load_state_dict(copy.deepcopy(state))
    assert same(dict(again.state_dict()), dict(state))
    lost = next(name for name in state if name.startswith("critic.score"))
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({name: value for name, value in state.items() if name != lost})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict({**state, "critic.score.else": torch.zeros(1)})


def test_copies_share_no_memory_with_the_teacher_or_each_other():
    parts = (lambda m: m.teacher, lambda m: m.student, lambda m: m.fake, lambda m: m.ema.module)
    trained = method("dmd2")
    places = [{value.data_ptr() for value in part(trained).parameters()} for part in parts]
    assert len(set.union(*places)) == sum(map(len, places))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fake_scores_loss_has_no_gradient_in_the_generator(kind: str):
    """Whoever's turn it is: the generator's samples are data to the fake score."""
    trained = method(kind)
    trained.critic_losses(BATCHES[0])["loss"].backward()
    assert all(parameter.grad is None for parameter in trained.student.parameters())
    assert all(parameter.grad is None for parameter in trained.teacher.parameters())
    assert any(parameter.grad is not None for parameter in trained.fake.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_generators_loss_has_no_gradient_in_the_two_scores(kind: str):
    trained = method(kind, guidance=CFG)
    trained.losses(BATCHES[0])["loss"].backward()
    assert all(parameter.grad is None for parameter in (*trained.fake.parameters(), *trained.teacher.parameters()))
    assert any(parameter.grad is not None for parameter in trained.student.parameters())


# ------------------------------------------------------------------------------------------- what each turn evaluates


class Call:
    """One evaluation of a network, from its beginning to what its backward pass reached."""

    def __init__(self, name: str, rows: int, time: float):
        self.name, self.rows, self.time = name, rows, time
        self.finished = self.graph = self.trained = False
        self.inputs = self.outputs = 0

    def __str__(self) -> str:
        got = [word for word, found in (("input", self.inputs), ("parameters", self.outputs and self.trained)) if found]
        assert self.inputs <= 1 and self.outputs <= 1, "one backward pass"
        assert self.graph == bool(got), "a graph is built where gradients pass and nowhere else"
        return f"{self.name} {self.rows} {'+'.join(got) or 'none'}{'' if self.finished else ' to the bottleneck'}"


class Calls(Callback):
    """The evaluations of student, teacher and fake score in each turn, in order."""

    def __init__(self) -> None:
        self.turns: list[list[Call]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name, denoiser in (("student", pl_module.student), ("teacher", pl_module.teacher), ("fake", pl_module.fake)):
            network = denoiser.network
            network.register_forward_pre_hook(partial(self.begin, name))
            network.model.down_blocks[-1].register_forward_hook(self.encoded)
            network.register_forward_hook(self.end)

    def on_train_batch_start(self, *others: Any) -> None:
        self.turns.append([])

    def begin(self, name: str, network: nn.Module, inputs: Any) -> None:
        x, time = inputs[:2]
        call = Call(name, len(x), float(time[0]))
        call.trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())
        self.turns[-1].append(call)
        if x.requires_grad:
            x.register_hook(lambda gradient: setattr(call, "inputs", call.inputs + 1))

    def encoded(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        call = self.turns[-1][-1]
        if output[0].requires_grad:
            call.graph = True
            output[0].register_hook(lambda gradient: setattr(call, "outputs", call.outputs + 1))

    def end(self, *others: Any) -> None:
        self.turns[-1][-1].finished = True


IDENTITY = ["student 4 parameters", "teacher 4 input", "fake 4 input"]
MATCHING = ["student 4 parameters", "teacher 4 none", "fake 4 none"]
FAKE = ["student 4 none", "fake 4 parameters"]
EVALUATIONS: dict[str, tuple[ScoreDistillation | Any, list[str], list[str]]] = {
    "SiD": (partial(method, "sid"), IDENTITY, FAKE),
    "SiD-LSG": (
        partial(method, "sid", guidance=CFG, fake_guidance="teacher", fake={"guidance": CFG, "null_probability": 0.1}),
        ["student 4 parameters", "teacher 8 input", "fake 8 input"],
        ["student 4 none", "fake 8 parameters"],
    ),
    "SiDA": (partial(method, "sida"), IDENTITY, [*FAKE, "fake 4 parameters to the bottleneck"]),
    "SIM": (partial(method, "sim"), IDENTITY, FAKE),
    "SIM, guided teacher": (
        partial(method, "sim", guidance=CFG),
        ["student 4 parameters", "teacher 8 input", "fake 4 input"],
        FAKE,
    ),
    "Diff-Instruct": (partial(method, "vsd", weight=None, shared_dropout=True), MATCHING, FAKE),
    "SwiftBrush": (
        partial(method, "vsd", guidance=CFG, fake_guidance="teacher", fake={"lora": LoRA(2)}),
        ["student 4 parameters", "teacher 8 none", "fake 8 none"],
        FAKE,
    ),
    "PG-SB": (
        partial(method, "vsd", guidance=RandomGuidance(0.5, 4.0), fake_guidance="teacher"),
        ["student 4 parameters", "teacher 8 none", "fake 8 none"],
        FAKE,
    ),
    "DMD": (
        partial(method, "vsd", normalize=True, regression=SquaredDistance()),
        ["student 8 parameters", "teacher 4 none", "fake 4 none"],
        FAKE,
    ),
    "DMD2": (
        partial(method, "dmd2", guidance=CFG),
        ["student 4 parameters", "teacher 8 none", "fake 4 none", "fake 4 input to the bottleneck"],
        [*FAKE, "fake 8 parameters to the bottleneck"],
    ),
    "f-distill": (
        partial(method, "dmd2", divergence=FDivergence("forward_kl")),
        [*MATCHING, "fake 4 input to the bottleneck"],
        [*FAKE, "fake 8 parameters to the bottleneck"],
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_turn_evaluates_what_the_mathematics_needs_and_no_more(name: str):
    """Forwards by network, rows and gradient mode; a mode is what the backward pass reached."""
    build, generator, fake = EVALUATIONS[name]
    calls = Calls()
    fit(build(), BATCHES, 4, calls)
    assert [[str(call) for call in turn] for turn in calls.turns] == [fake, generator, fake, generator]


def test_earlier_steps_of_the_generator_cost_a_forward_each_without_graph():
    """At the trained times, in order; after them a turn is that of a one-step generator."""
    times, calls, counts = (1.0, 0.7, 0.3), Calls(), []
    fit(method("sid", times), BATCHES, 16, calls)
    for number, turn in enumerate(calls.turns):
        steps = [call for call in turn if call.name == "student"]
        expected = (FAKE, IDENTITY)[number % 2]
        assert [str(call) for call in turn] == ["student 4 none"] * (len(steps) - 1) + expected
        assert [call.time for call in steps] == pytest.approx([1000 * time for time in times[: len(steps)]])
        counts.append(len(steps))
    assert set(counts[::2]) == set(counts[1::2]) == {1, 2, 3}, "both players train on every number of steps"


# -------------------------------------------------------------------------------------------------- backward simulation


def exits(trained: ScoreDistillation, count: int) -> list[int]:
    found = []
    for trained.batches_seen in range(count):
        found.append(trained.exit_index())
    return found


def test_exits_are_uniform_and_the_same_on_every_rank(monkeypatch):
    """They depend on (seed, batch) alone: not on the rank, nor on what was drawn before."""
    trained = method(times=(1.0, 0.75, 0.5, 0.25))
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    first = exits(trained, 4000)
    counts = torch.bincount(torch.tensor(first))
    assert counts.shape == (4,) and float((counts - 1000).abs().max()) < 4 * (4000 * 3 / 16) ** 0.5
    # Nor does one batch's say anything of the next one's: all 16 pairs are as frequent.
    pairs = torch.bincount(4 * torch.tensor(first[:-1]) + torch.tensor(first[1:]))
    assert pairs.shape == (16,) and float((pairs - 250).abs().max()) < 4 * 250**0.5
    torch.manual_seed(77)
    monkeypatch.setattr(Method, "global_rank", 1)
    assert exits(trained, 200) == first[:200]
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert exits(trained, 200) != first[:200]


def test_ranks_draw_samples_of_their_own_at_the_same_exit(monkeypatch):
    trained = method(times=(1.0, 0.5)).eval()
    samples = {}
    for rank in (0, 1):
        monkeypatch.setattr(Method, "global_rank", rank)
        trained.seed_draws()
        samples[rank] = trained.generate(BATCHES[0], "none")
    assert not torch.allclose(samples[0], samples[1], atol=1e-2)


@pytest.mark.parametrize("start", ["marginal", "prior"])
def test_training_sees_what_sampling_gives(start: Any):
    """The generator's sample in a batch is the sampler's of the same noises, after as many steps, at every exit."""
    trained = method(times=(0.9, 0.6, 0.3), sampler=FewStepSampler(times=[0.9, 0.6, 0.3], start=start)).eval()
    seen = set()
    for trained.batches_seen in range(12):
        trained.seed_draws()
        x_g = trained.generate(BATCHES[0], "parameters")
        trained.seed_draws()
        noise, steps = torch.randn(ROWS, *SHAPE), trained.exit_index() + 1
        with torch.no_grad():
            assert torch.equal(x_g.detach(), trained.sampler(trained.student, noise, BATCHES[0].cond, steps))
        seen.add(steps)
    assert seen == {1, 2, 3}


def test_only_the_last_step_of_the_generator_is_differentiated():
    trained = method(times=(0.9, 0.6)).eval()
    trained.batches_seen = exits(trained, 20).index(1)
    trained.seed_draws()
    found = torch.autograd.grad(trained.generate(BATCHES[0], "parameters").sum(), list(trained.student.parameters()))
    trained.seed_draws()
    with torch.no_grad():
        noise = torch.randn(ROWS, *SHAPE)
        x, t = trained.sampler.simulate(trained.student, noise, BATCHES[0].cond, 1)
    expected = torch.autograd.grad(trained.student(x, t, BATCHES[0].cond).sum(), list(trained.student.parameters()))
    assert float(t[0]) == pytest.approx(0.6) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_replayed_alone(kind: str):
    """Seed and number of a batch give its losses, dropout included, whoever's; another number gives others."""
    trained = method(kind, (1.0, 0.5))

    def losses(number: int) -> list[float]:
        trained.batches_seen, found = number, []
        for each in (trained.losses, trained.critic_losses):
            trained.seed_draws()
            found.append(float(each(BATCHES[0])["loss"].detach()))
        return found

    first = losses(3)
    torch.randn(5)
    assert losses(4) != first and losses(3) == first


# ------------------------------------------------------------------------------------------------- checkpoints, samples


class SaveAfter(Callback):
    """Saves a checkpoint after so many batches."""

    def __init__(self, batches: int, path: Path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        if pl_module.batches_seen == self.batches:
            trainer.save_checkpoint(self.path)


RESUMED: dict[str, tuple[Any, list[int]]] = {
    "sid": (partial(method, "sid", fake={"warmup_steps": 1}), [3, 4]),
    "dmd2": (partial(method, "dmd2", (1.0, 0.6), guidance=CFG, fake={"steps": 2, "null_probability": 0.2}), [3, 4]),
    "f-distill by LoRA": (
        partial(
            method, "dmd2", (1.0, 0.6), divergence=FDivergence("forward_kl", decay=0.5), lora=LoRA(2, dropout=0.1),
            fake={"lora": LoRA(2)},
        ),
        [4],
    ),
}  # fmt: skip
"""What is resumed, and after which batches it is cut."""


@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name, (_, cuts) in RESUMED.items() for cut in cuts])
def test_resumed_run_ends_in_the_same_bits(name: str, cut: int, tmp_path: Path):
    """Cut after the generator's turn, or in the middle of the fake score's; on weights that are not the checkpoint's."""
    build, path = RESUMED[name][0], tmp_path / "cut.ckpt"
    whole = build()
    assert whole.turn(cut - 1) == {3: 0, 4: 1}[cut] or name == "f-distill by LoRA"
    ended = everything(fit(whole, BATCHES, 7, SaveAfter(cut, path)), whole)
    resumed = build()
    own = {id(parameter) for parameter in resumed.teacher.parameters()}
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(float(id(parameter) not in own))
    again = fit(resumed, BATCHES, 7, ckpt_path=path)
    assert same(ended, everything(again, resumed)) and resumed.batches_seen == 7
    for part in ("student", "ema", "critic"):
        assert not same(of_part(ended, part), of_part(dict(build().state_dict()), part)), part


@pytest.mark.parametrize(
    "other",
    [
        FewStepSampler(times=[1.0]),
        FewStepSampler(times=[1.0, 0.5], start="prior"),
        FewStepSampler(sigmas=[9.0, 1.0]),
    ],
)
def test_a_run_is_not_resumed_at_other_times(other: FewStepSampler, tmp_path: Path):
    path, times = tmp_path / "cut.ckpt", (1.0, 0.5)
    fit(method(times=times), BATCHES, 2, SaveAfter(2, path))
    kept = torch.load(path, weights_only=True)["distill"]["sampler"]
    assert kept == {"times": [1.0, 0.5], "sigmas": None, "start": "marginal"}
    with pytest.raises(ValueError, match="start a new run") as refused:
        fit(method(sampler=other), BATCHES, 4, ckpt_path=path)
    assert str(kept) in str(refused.value) and f"model.sampler is {other.settings()}" in str(refused.value)
    assert fit(method(times=times), BATCHES, 4, ckpt_path=path).global_step == 4


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


# ------------------------------------------------------------------------------------------------------ what is refused


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
        ({"fake": {"null_probability": 1.0}}, r"null_probability=1.0: give a share in \[0, 1\)"),
        ({"fake": {"null_probability": -0.1}}, r"null_probability=-0.1: give a share in \[0, 1\)"),
        ({"student": teacher(1), "lora": LoRA(2)}, r"model.student and model.lora=LoRA\(rank=2.*set one only"),
        ({"teacher": small(num_classes=2), "lora": LoRA(2)}, "only networks of diffusers take LoRA layers"),
        (
            {"teacher": small(num_classes=2), "optimization": Optimization(gradient_checkpointing=True)},
            "optimization.gradient_checkpointing=true: only networks of diffusers can; set it to false",
        ),
        (
            {"teacher": small(num_classes=2), "fake": {"optimization": PlayerOptimization(gradient_checkpointing=True)}},
            "optimization.gradient_checkpointing=true: only networks of diffusers can; set it to false",
        ),
        (
            {"kind": "dmd2", "adversarial": None, "divergence": FDivergence("forward_kl")},
            "divergence is set: a discriminator estimates its density ratio; set adversarial too",
        ),
        (
            {"kind": "dmd2", "divergence": FDivergence("forward_kl"), "fake_guidance": CFG},
            r"fake_guidance=ClassifierFreeGuidance\(.* and divergence are set: a guided pair has no features",
        ),
        ({"kind": "dmd2", "teacher": small(num_classes=2)}, "SmallNetwork does not say where its inner features are read"),
    ],
)
def test_bad_settings_are_named(settings: Any, words: str):
    with pytest.raises(ValueError, match=words):
        method(**settings)


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
    with pytest.raises(ValueError, match="model.teacher.dtype=float16 with LoRA layers on its weights"):
        fit(method("vsd", teacher=half, fake={"lora": LoRA(2)}), BATCHES, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "dmd2"}, "model.adversarial is set, but data delivers no samples to compare with: set it to null"),
        (
            {"kind": "vsd", "regression": SquaredDistance()},
            "model.regression is set, but data delivers no pairs of noise and samples: set it to null",
        ),
    ],
)
def test_data_that_a_loss_misses_is_named(settings: Any, words: str):
    trained = method(**settings)
    with pytest.raises(ValueError, match=words):
        fit(trained, [Batch(None, BATCHES[0].cond, BATCHES[0].null)], 2)


@pytest.mark.parametrize("kind", ["sid", "sim", "vsd"])
def test_no_data_is_read(kind: str):
    """Conditions alone are a batch; with samples in it the run is the same."""
    ends = []
    for x0 in (None, BATCHES[0].x0):
        trained = method(kind, (1.0, 0.5))
        fit(trained, [Batch(x0, BATCHES[0].cond, BATCHES[0].null)], 4)
        ends.append(dict(trained.state_dict()))
    assert same(*ends)
