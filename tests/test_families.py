"""Every family of teacher, read from its folder, is distilled: two steps of consistency distillation, whole and by LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Tiny
from helpers import evaluation, fit

from distill.distances import PseudoHuber
from distill.ema import DecayAveraging
from distill.grids import ConstantPoints, UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.lora import LoRA
from distill.methods.consistency import Consistency
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.pretrained import PretrainedDenoiser
from distill.solvers import DDIM
from distill.types import Batch, DataSpec


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for name, tiny in FAMILIES.items():
        tiny.save(root / name)
    return root


def shape_of(tiny: Tiny) -> tuple[int, ...]:
    """Small samples, also for a model made for large ones."""
    return tiny.channels, tiny.size, tiny.size


def batch(tiny: Tiny, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return Batch(torch.randn(2, *shape_of(tiny), generator=generator), *tiny.cond(2))


@pytest.mark.parametrize("lora", [None, LoRA(2)], ids=["whole", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_of_consistency_distillation(name: str, lora: LoRA | None, folders: Path):
    tiny = FAMILIES[name]
    teacher = PretrainedDenoiser(str(folders / name))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    cond, _ = tiny.cond(2)
    method = Consistency(
        GridPairs(UniformGrid(), ConstantPoints(4)),
        PseudoHuber(),
        Optimization(
            optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
            averaging=DecayAveraging(0.5),
            gradient_checkpointing=True,
        ),
        evaluation(steps=[1]),
        teacher=teacher,
        solver=DDIM(),
        guidance=ClassifierFreeGuidance(2.0) if cond and "guidance" not in cond else None,
        lora=lora,
    )
    widths = {key: value.shape[-1] for key, value in cond.items()}
    classes = {"labels": 10}.get(next(iter(cond), ""))
    method.check_data(DataSpec(shape_of(tiny), classes, widths=widths))
    start = {key: value.clone() for key, value in method.student.named_parameters() if value.requires_grad}
    fit(method, [batch(tiny, number) for number in range(2)], 2)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    trained: dict[str, Any] = dict(method.student.named_parameters())
    moved = [key for key, value in start.items() if not torch.equal(value, trained[key])]
    # What a network does not use at these inputs (SD3's last text stream, class embeddings that are not drawn) has no gradient.
    assert len(moved) > 0.8 * len(start), sorted(set(start) - set(moved))
    assert torch.isfinite(method.draw(1, range(2), *tiny.cond(2))).all()
    assert method.skipped.total == 0
