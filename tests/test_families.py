"""Every family of teacher, read from its folder, is distilled: two steps of consistency distillation, whole and by LoRA, of
reflow and of piecewise flow, and of score distillation, one of each player.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Tiny
from helpers import fit

from distill.adversarial import Adversarial
from distill.discriminators import ConvolutionalDiscriminator
from distill.distances import PseudoHuber, SquaredDistance
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.few_step import FewStepSampler
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.lora import LoRA
from distill.methods.consistency import Consistency
from distill.methods.distribution_matching import DistributionMatching
from distill.methods.fake_score import FakeScore
from distill.methods.piecewise_flow import PiecewiseFlow
from distill.methods.rectified_flow import Reflow
from distill.methods.score_distillation import ScoreDistillation
from distill.methods.score_identity import ScoreIdentity
from distill.methods.score_implicit import ScoreImplicit
from distill.optimization import Optimization, PlayerOptimization
from distill.pairs import GridPairs
from distill.pretrained import PretrainedDenoiser
from distill.solvers import DDIM
from distill.times import UniformTimes
from distill.types import Batch, DataSpec
from distill.weights import PredictionWeight, VariationalScoreWeight


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for name, tiny in FAMILIES.items():
        tiny.save(root / name)
    return root


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


def shape_of(tiny: Tiny) -> tuple[int, ...]:
    """Small samples, also for a model made for large ones."""
    return tiny.channels, tiny.size, tiny.size


def batch(tiny: Tiny, number: int, paired: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x0, noise = torch.randn(2, 2, *shape_of(tiny), generator=generator)
    return Batch(x0, *tiny.cond(2), noise if paired else None)


ONE_PLAYER: dict[str, Any] = {
    "cd": partial(Consistency, GridPairs(UniformGrid(), ConstantPoints(4)), PseudoHuber(), solver=DDIM()),
    "reflow": partial(Reflow, times=UniformTimes(0.02, 0.98), velocity_distance=SquaredDistance()),
    "perflow": partial(PiecewiseFlow, solver=DDIM(), windows=1, solver_steps=2, null_probability=0.0),
}


@pytest.mark.parametrize(
    ("name", "kind", "lora"),
    [(name, kind, None) for name in FAMILIES for kind in ONE_PLAYER]
    + [(name, "cd", LoRA(2)) for name in FAMILIES]
    + [("sd15", kind, LoRA(2)) for kind in ("reflow", "perflow")],
    ids=lambda value: "lora" if isinstance(value, LoRA) else "whole" if value is None else value,
)
def test_two_steps_of_methods_with_one_player(name: str, kind: str, lora: LoRA | None, folders: Path):
    tiny, paired = FAMILIES[name], kind == "reflow"
    teacher = PretrainedDenoiser(str(folders / name))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    cond, _ = tiny.cond(2)
    method = ONE_PLAYER[kind](
        optimization=Optimization(adam, averaging=DecayAveraging(0.5), gradient_checkpointing=True),
        evaluation=Evaluation(steps=[1]),
        teacher=teacher,
        guidance=ClassifierFreeGuidance(2.0) if cond and "guidance" not in cond else None,
        lora=lora,
    )
    widths = {key: value.shape[-1] for key, value in cond.items()}
    classes = {"labels": 10}.get(next(iter(cond), ""))
    method.check_data(DataSpec(shape_of(tiny), classes, widths=widths, paired=paired))
    start = {key: value.clone() for key, value in method.student.named_parameters() if value.requires_grad}
    fit(method, [batch(tiny, number, paired) for number in range(2)], 2)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    trained: dict[str, Any] = dict(method.student.named_parameters())
    moved = [key for key, value in start.items() if not torch.equal(value, trained[key])]
    # What a network does not use at these inputs (SD3's last text stream, class embeddings that are not drawn) has no gradient.
    assert len(moved) > 0.8 * len(start), sorted(set(start) - set(moved))
    assert torch.isfinite(method.draw(1, range(2), *tiny.cond(2))).all()
    assert method.skipped.total == 0


SCORE_METHODS: dict[str, Any] = {
    "sid": partial(ScoreIdentity, alpha=1.2),
    "sim": partial(ScoreImplicit, distance=PseudoHuber(0.1)),
    # The maps of small samples are smaller than the network's own: 4x4, or 8x8 where a place is not a patch.
    "dmd2": partial(
        DistributionMatching, adversarial=Adversarial(UniformTimes(), discriminator=ConvolutionalDiscriminator(size=(4, 4)))
    ),
    "vsd": partial(DistributionMatching, weight=VariationalScoreWeight(), normalize=False),
}
CHECKPOINTED = [("sd15", "dmd2"), ("sd15", "sid"), ("sd3", "dmd2")]
"""Families and methods whose players, and SiD's teacher, compute activations again in the backward pass too."""


def score_method(kind: str, teacher: PretrainedDenoiser, guided: bool, checkpointing: bool = False) -> ScoreDistillation:
    """Two trained times; VSD's fake score is LoRA layers on the teacher's weights; SiD and VSD guide it as the teacher is."""
    fake = PlayerOptimization(adam, gradient_checkpointing=checkpointing)
    times, lora = UniformTimes(0.02, 0.98), LoRA(2) if kind == "vsd" else None
    return SCORE_METHODS[kind](
        teacher=teacher,
        sampler=FewStepSampler(sigmas=[2.5, 0.7]),
        times=times,
        fake_score=FakeScore(times, PredictionWeight("eps"), fake, lora=lora),
        optimization=Optimization(adam, averaging=DecayAveraging(0.5), gradient_checkpointing=checkpointing),
        evaluation=Evaluation(steps=[1, 2]),
        guidance=ClassifierFreeGuidance(2.0) if guided else None,
        fake_guidance="teacher" if guided and kind in ("sid", "vsd") else None,
    )


def moved_share(start: dict[str, Any], now: dict[str, Any]) -> float:
    """Share of the tensors in ``start`` that are not the same any more."""
    return sum(not torch.equal(value, now[key]) for key, value in start.items()) / len(start)


@pytest.mark.parametrize(
    ("name", "kind", "checkpointing"),
    [*((name, kind, False) for name in FAMILIES for kind in SCORE_METHODS), *((*case, True) for case in CHECKPOINTED)],
)
def test_a_turn_of_each_player_in_score_distillation(name: str, kind: str, checkpointing: bool, folders: Path):
    tiny = FAMILIES[name]
    teacher = PretrainedDenoiser(str(folders / name))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    cond, _ = tiny.cond(2)
    method = score_method(kind, teacher, bool(cond) and "guidance" not in cond, checkpointing)
    widths = {key: value.shape[-1] for key, value in cond.items()}
    method.check_data(DataSpec(shape_of(tiny), {"labels": 10}.get(next(iter(cond), "")), widths=widths))
    parts: dict[str, Any] = {"student": method.student, "fake": method.fake} | ({"head": method.head} if kind == "dmd2" else {})
    start = {
        part: {key: value.clone() for key, value in module.named_parameters() if value.requires_grad}
        for part, module in parts.items()
    }
    fit(method, [batch(tiny, number) for number in range(2)], 2)
    assert method.skipped.total == 0
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    # One of LoRA's two matrices has no gradient while the other is zero; for the rest see above.
    for part, module in parts.items():
        moved = {key: value for key, value in start[part].items() if "lora_A" not in key}
        assert moved_share(moved, dict(module.named_parameters())) > 0.8, part
    computed_again = [part.network.model.is_gradient_checkpointing for part in (method.student, method.fake, method.teacher)]
    assert computed_again == [checkpointing, checkpointing, checkpointing and kind == "sid"]
    for steps in (1, 2):
        assert torch.isfinite(method.draw(steps, range(2), *tiny.cond(2))).all()
    assert all(parameter.grad is None for parameter in (*method.parameters(), *teacher.parameters()))
