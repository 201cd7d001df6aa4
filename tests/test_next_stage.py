"""A student as the teacher of a next stage: what ExportDenoiser writes is read back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import fit, small
from standins import write_dit, write_sd15
from torch import Tensor, nn

from distill.callbacks.export import ExportDenoiser
from distill.codecs import AutoencoderKLCodec
from distill.denoiser import Denoiser, NetworkDenoiser
from distill.distances import SquaredDistance
from distill.edm_checkpoints import PretrainedEDM, is_edm
from distill.evaluation import Evaluation
from distill.methods.base import Method
from distill.methods.guidance_free import GuidanceFreeTraining
from distill.methods.rectified_flow import Reflow
from distill.networks.edm import EDM
from distill.networks.edm2 import EDM2
from distill.optimization import Optimization
from distill.pretrained import PretrainedDenoiser
from distill.schedules import VarianceExploding
from distill.space import ModelSpace
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


def exported(method: Method, batches: list[Batch], folder: Path) -> Path:
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


# ------------------------------------------------------------------------------------ students that read a guidance scale


def self_guided(name: str, folder: Path) -> tuple[GuidanceFreeTraining, Path]:
    """Two steps of guidance-free training of a tiny latent model, whose scale matters from the start, and its folder."""
    {"dit": write_dit, "sd15": write_sd15}[name](folder / "teacher")
    student = PretrainedDenoiser(str(folder / "teacher"))
    student.network.add_scalar_input("guidance")
    nn.init.normal_(student.network.scalars["guidance"].projection.weight, std=0.3)
    student.requires_grad_(True).train()
    space = ModelSpace(AutoencoderKLCodec(str(folder / "teacher")))
    method = GuidanceFreeTraining(student, UniformTimes(), Optimization(), Evaluation(), space=space)
    tiny = FAMILIES[name]
    cond, null = tiny.cond(2)
    x0 = torch.randn(2, tiny.channels, tiny.size, tiny.size)
    return method, exported(method, [Batch(x0, cond, null, encoded=True)], folder / "run")


def at_scales(denoiser: Denoiser, name: str, *scales: float) -> Tensor:
    """x0 of one sample at each scale."""
    tiny, count = FAMILIES[name], len(scales)
    x = torch.randn(1, tiny.channels, tiny.size, tiny.size, generator=torch.Generator().manual_seed(3)).repeat(count, 1, 1, 1)
    cond = {key: value.repeat(count, *[1] * (value.dim() - 1)) for key, value in tiny.cond(1)[0].items()}
    with torch.no_grad():
        return denoiser(x, torch.full((count,), 400.0), {**cond, "guidance": torch.tensor(scales)})


def test_a_dit_that_reads_the_scale_is_read_to_the_bit_beside_a_plain_pipeline(tmp_path):
    from diffusers import DiTPipeline

    method, folder = self_guided("dit", tmp_path)
    own, read = method.ema.module, PretrainedDenoiser(str(folder)).requires_grad_(False)
    state = read.state_dict()
    assert own.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in own.state_dict().items())
    assert read.scalar_inputs == ("guidance",)
    found = at_scales(read, "dit", 1.0, 3.0, 8.0)
    assert torch.equal(found, at_scales(own, "dit", 1.0, 3.0, 8.0)) and (found[0] - found[1]).abs().max() > 1e-3
    assert len(own.network.scalars) == 1, "the run's own student keeps its input"
    pipeline = DiTPipeline.from_pretrained(folder)
    plain = {f"network.model.{key}": value for key, value in pipeline.transformer.state_dict().items()}
    assert plain.keys() == {key for key in state if ".scalars." not in key}
    assert all(torch.equal(value, state[key]) for key, value in plain.items())
    assert pipeline.vae is not None and not list(folder.parent.glob("*.partial"))


def test_a_stable_diffusion_that_reads_the_scale_becomes_one_that_does_so_by_itself(tmp_path):
    method, folder = self_guided("sd15", tmp_path)
    own, read = method.ema.module, PretrainedDenoiser(str(folder))
    assert read.network.model.config.time_cond_proj_dim == own.network.scalars["guidance"].dimension
    assert read.network.own_scalars == read.scalar_inputs == ("guidance",) and not read.network.scalars
    assert not (folder / "scalar_inputs.safetensors").exists()
    found, expected = (at_scales(each, "sd15", 1.0, 3.0, 7.5) for each in (read, own))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert (found[0] - found[1]).abs().max() > 1e-3 * float(expected.abs().max())
