"""Roles on one base: teacher, student and fake score as LoRA layers on the same weights cost one network's memory and a bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapted import base
from families import FAMILIES
from score_methods import adam, method
from torch import nn

from distill.denoiser import NetworkDenoiser
from distill.distances import SquaredDistance
from distill.ema import DecayAveraging
from distill.evaluation import Evaluation
from distill.grids import ConstantPoints, UniformGrid
from distill.lora import LoRA
from distill.methods.base import Method
from distill.methods.consistency import Consistency
from distill.optimization import Optimization
from distill.pairs import GridPairs
from distill.solvers import DDIM

RANK = 16
ATTENTION = "to_q to_k to_v to_out.0".split()
WIDE: dict[str, Any] = {"block_out_channels": (128, 256), "attention_head_dim": (2, 4), "cross_attention_dim": 12}
"""SDXL's U-Net in small, wide enough for layers of rank 16 to be few beside it."""


def teacher() -> NetworkDenoiser:
    return base("sdxl", **WIDE)


def consistency(teacher: NetworkDenoiser, lora: LoRA | None) -> Consistency:
    return Consistency(
        GridPairs(UniformGrid(), ConstantPoints(8)),
        SquaredDistance(),
        Optimization(adam, averaging=DecayAveraging(0.9)),
        Evaluation(steps=[1]),
        teacher=teacher,
        solver=DDIM(),
        lora=lora,
    )


def built(kind: str, lora: LoRA | None) -> Method:
    if kind == "consistency":
        return consistency(teacher(), lora)
    return method(kind, teacher=teacher(), lora=lora, fake={"lora": lora})


def networks(trained: Method) -> dict[str, nn.Module]:
    """The networks that a method holds, by their roles."""
    roles = {"teacher": trained.teacher, "student": trained.student, "average": trained.ema.module}
    return roles | ({"fake": trained.fake} if hasattr(trained, "fake") else {})


def parameter_bytes(modules: Any) -> int:
    """Bytes of all parameters, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for module in modules for p in module.parameters()}
    return sum(storages.values())


def apart(network: nn.Module) -> NetworkDenoiser:
    """A copy with a memory of its own."""
    return copy.deepcopy(network).eval()


@pytest.mark.parametrize("kind", ["consistency", "sid", "sim", "vsd"])
def test_three_roles_and_the_average_cost_one_network_and_a_bit(kind: str):
    """At most 1.15 times one network; without layers they cost that many networks."""
    with torch.device("meta"):
        one = sum(p.numel() * 4 for p in FAMILIES["sdxl"].model(**WIDE).parameters())
    trained = built(kind, LoRA(RANK, targets=ATTENTION))
    share = parameter_bytes(networks(trained).values()) / one
    print(f"{kind}: {len(networks(trained))} roles, {share:.3f} times one network")
    assert 1 < share <= 1.15
    own = [p for name, part in networks(trained).items() if name != "average" for p in part.parameters() if p.requires_grad]
    assert len({id(p) for p in own}) == len(own) > 0
    assert all(p.requires_grad for p in own) and sum(p.numel() for p in own) < 0.15 * one / 4


def test_copies_cost_as_many_networks():
    trained = built("sid", None)
    assert parameter_bytes(networks(trained).values()) == 4 * parameter_bytes([trained.teacher])


def test_roles_equal_separate_copies_with_the_same_weights():
    """To 1e-6, whichever was called last: nothing is switched."""
    trained, generator = built("vsd", LoRA(RANK, targets=ATTENTION)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (trained.student, trained.fake):
            for weight in (p for name, p in part.named_parameters() if "lora_B" in name):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    copies = {role: apart(network) for role, network in networks(trained).items()}
    assert parameter_bytes(copies.values()) > 3.9 * parameter_bytes([trained.teacher])
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.3, 0.8])
    cond, outputs = FAMILIES["sdxl"].cond(2)[0], {}
    for role in ("student", "fake", "teacher", "student", "average", "teacher", "fake"):
        with torch.no_grad():
            outputs[role] = networks(trained)[role].eval()(x, t, cond)
            expected = copies[role](x, t, cond)
        assert (outputs[role] - expected).abs().max() <= 1e-6, role
    # The average was not updated since the layers were given weights: it is what the teacher is.
    assert outputs["average"].allclose(outputs["teacher"], atol=1e-6)
    assert min((outputs[a] - outputs[b]).abs().max() for a, b in (("student", "fake"), ("student", "teacher"))) > 1e-3
