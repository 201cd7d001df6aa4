"""A student as the teacher of a next stage: what ExportDenoiser writes is read back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import fit, small
from torch import nn

from distill.callbacks.export import ExportDenoiser
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.distances import SquaredDistance
from distill.edm_checkpoints import PretrainedEDM, is_edm
from distill.evaluation import Evaluation
from distill.methods.rectified_flow import Reflow
from distill.networks.edm import EDM
from distill.networks.edm2 import EDM2
from distill.optimization import Optimization
from distill.pretrained import PretrainedDenoiser
from distill.schedules import VarianceExploding
from distill.times import UniformTimes
from distill.types import Batch

EDM_SIZES: dict[str, Any] = dict(sample_size=8, multipliers=(1, 2), blocks=1, attention=(4,), head_width=16, dropout=0.2)


def edm(network: nn.Module) -> NetworkDenoiser:
    return NetworkDenoiser(network, VarianceExploding(1e-5, 1e5), "edm", 0.4)


def reflow(teacher: Denoiser) -> Reflow:
    return Reflow(teacher, UniformTimes(), Optimization(), Evaluation(), velocity_distance=SquaredDistance())


def pairs(shape: tuple[int, ...], cond: dict[str, torch.Tensor]) -> list[Batch]:
    x0, noise = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    return [Batch(x0, cond, {}, noise)]


def exported(method: Reflow, batches: list[Batch], folder: Path) -> Path:
    """The folder that a run of two steps leaves."""
    fit(method, batches, 2, ExportDenoiser(), default_root_dir=str(folder))
    return folder / "export"


@pytest.mark.parametrize("build", [lambda: EDM(width=16, **EDM_SIZES), lambda: EDM2(size=16, **EDM_SIZES)], ids=["edm", "edm2"])
def test_an_edm_student_is_read_as_a_teacher(build, tmp_path):
    torch.manual_seed(0)
    method = reflow(edm(build()))
    folder = exported(method, pairs((3, 8, 8), {}), tmp_path)
    read = PretrainedEDM(str(folder), sigma_min=1e-5, sigma_max=1e5)
    own, found = method.ema.module.state_dict(), read.state_dict()
    assert own.keys() == found.keys() and all(torch.equal(own[key], found[key]) for key in own)
    assert read.sigma_data == 0.4 and read.schedule.same_as(method.student.schedule)
    assert read.network.config["dropout"] == 0.0  # that of a training is not the network's


@pytest.mark.parametrize("name", ["ddpm", "sd15"])
def test_a_diffusion_student_seen_as_a_flow_is_read_as_the_diffusion_it_is(name, tmp_path):
    tiny = FAMILIES[name]
    tiny.save(tmp_path / "teacher")
    method = reflow(PretrainedDenoiser(str(tmp_path / "teacher")))
    folder = exported(method, pairs((tiny.channels, tiny.size, tiny.size), tiny.cond(2)[0]), tmp_path / "run")
    read, own = PretrainedDenoiser(str(folder)), method.ema.module
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in read.state_dict().items())
    assert read.prediction == own.prediction and read.schedule.same_as(own.schedule)
    assert read.identity["sha256"] != method.teacher.identity["sha256"]


def test_networks_that_no_folder_holds_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="Only a NetworkDenoiser of a diffusers network"):
        exported(reflow(small()), pairs((2, 1, 1), {}), tmp_path)
    other = NetworkDenoiser(EDM(width=16, **EDM_SIZES), VarianceExploding(), "x0")
    assert is_edm(edm(other.network)) and not is_edm(other)
