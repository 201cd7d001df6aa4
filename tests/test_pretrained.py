"""Teachers in a diffusers folder: what is written is read, by this package and by diffusers alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from oracle import MLP

from distill.denoiser import NetworkDenoiser
from distill.networks.unet2d import UNet2D
from distill.pretrained import PretrainedDenoiser, identity_of, read_scheduler, save_denoiser
from distill.schedules import RectifiedFlow, TrigFlow, VarianceExploding, VariancePreserving
from distill.types import label_conditions

KINDS = {
    "flow": (RectifiedFlow(), "flow"),
    "shifted-flow": (RectifiedFlow(3.0), "flow"),
    "edm": (VarianceExploding(0.01, 50.0), "edm"),
    "eps": (VariancePreserving(), "eps"),
    "v": (VariancePreserving("scaled_linear", 0.00085, 0.012), "v"),
    "x0": (VariancePreserving("cosine", num_steps=100), "x0"),
}
COND = label_conditions(torch.tensor([0, 2]), 3)[0]


def network(num_classes: int | None = 3) -> UNet2D:
    return UNet2D(1, 8, num_classes, (8, 16), layers_per_block=1, attention=(False, True), heads_width=8, groups=4).eval()


def batch(schedule) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]) * schedule.t_max


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved teacher, not to be changed."""
    path = tmp_path_factory.mktemp("teacher")
    save_denoiser(NetworkDenoiser(network(), *KINDS["flow"]), path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_round_trip_is_bit_identical(kind, tmp_path):
    schedule, prediction = KINDS[kind]
    denoiser = NetworkDenoiser(network(), schedule, prediction)
    save_denoiser(denoiser, tmp_path)
    again = PretrainedDenoiser(str(tmp_path))
    assert again.schedule.same_as(schedule) and again.prediction == prediction
    assert (again.shape, again.num_classes, again.network.unet.training) == ((1, 8, 8), 3, False)
    x, t = batch(schedule)
    assert torch.equal(again(x, t, COND), denoiser(x, t, COND))


@torch.no_grad()
def test_round_trip_keeps_scalar_inputs(tmp_path):
    denoiser = NetworkDenoiser(network(), *KINDS["v"])
    denoiser.network.add_scalar_input("guidance")
    torch.nn.init.normal_(denoiser.network.scalars["guidance"].projection.weight)
    save_denoiser(denoiser, tmp_path)
    again, (x, t) = PretrainedDenoiser(str(tmp_path)), batch(denoiser.schedule)
    cond = {**COND, "guidance": torch.tensor([2.0, 7.0])}
    assert torch.equal(again(x, t, cond), denoiser(x, t, cond))
    assert not torch.equal(again(x, t, cond), again(x, t, {**COND, "guidance": torch.tensor([1.0, 1.0])}))


@torch.no_grad()
def test_diffusers_alone_reads_the_network(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    ours, theirs = PretrainedDenoiser(str(folder)), UNet2DModel.from_pretrained(folder / "unet")
    x, t = batch(ours.schedule)
    assert torch.equal(ours.raw(x, t, COND), theirs(x, 1000 * t, class_labels=COND["labels"]).sample)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift == 1.0
    assert not list(folder.rglob("*.bin")) and list(folder.rglob("*.safetensors"))


@torch.no_grad()
def test_diffusers_alone_reads_the_pipeline(tmp_path):
    """And draws with it: a model without classes, the DDPM pipeline as it comes."""
    from diffusers import DiffusionPipeline

    denoiser = NetworkDenoiser(network(None), *KINDS["eps"])
    save_denoiser(denoiser, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    x, t = batch(denoiser.schedule)
    assert torch.equal(pipeline.unet(x, t).sample, denoiser.raw(x, t, {}))
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod[500].sqrt(), denoiser.schedule.alpha(torch.tensor(500.0)))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_agreement_is_checked_not_obeyed(folder):
    PretrainedDenoiser(str(folder), RectifiedFlow(), "flow")
    with pytest.raises(ValueError, match=r"schedule=RectifiedFlow\(shift=3.0\) contradicts"):
        PretrainedDenoiser(str(folder), RectifiedFlow(3.0))
    with pytest.raises(ValueError, match="schedule=VariancePreserving.* contradicts"):
        PretrainedDenoiser(str(folder), VariancePreserving())
    with pytest.raises(ValueError, match="prediction='eps' contradicts"):
        PretrainedDenoiser(str(folder), prediction="eps")


def test_missing_parts_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="path=.*nowhere.*scheduler/scheduler_config.json is missing"):
        PretrainedDenoiser(str(tmp_path / "nowhere"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "unet/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="unet/config.json is missing"):
        PretrainedDenoiser(str(copy))


def test_missing_weights_are_an_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    next((copy / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="path=.*safetensors"):
        PretrainedDenoiser(str(copy))


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "SomeScheduler"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid", "prediction_type": "epsilon"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "flow"},
        {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 80.0},
    ],
)
def test_unknown_schedulers_are_named(config):
    with pytest.raises(ValueError, match=config["_class_name"]):
        read_scheduler(config)


BETAS = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
}


@pytest.mark.parametrize(("key", "value"), [("rescale_betas_zero_snr", True), ("trained_betas", [0.1, 0.2, 0.3])])
def test_betas_that_would_be_misread_are_refused(key, value):
    read_scheduler({**BETAS, key: None})
    with pytest.raises(ValueError, match=key):
        read_scheduler({**BETAS, key: value})


def test_what_diffusers_cannot_say_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="TrigFlow"):
        save_denoiser(NetworkDenoiser(network(), TrigFlow(), "flow"), tmp_path)
    with pytest.raises(ValueError, match="UNet2D"):
        save_denoiser(NetworkDenoiser(MLP((1, 8, 8)), RectifiedFlow(), "flow"), tmp_path)


# ------------------------------------------------------------------------------------------------------------- identity


def test_identity_follows_content_not_place(folder, tmp_path):
    first = PretrainedDenoiser(str(folder)).identity
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "notes.txt").write_text("not part of it")
    second = PretrainedDenoiser(str(copy)).identity
    assert second["sha256"] == first["sha256"] and second["path"] == str(copy)


def test_identity_changes_with_a_weight_and_with_a_config(folder, tmp_path):
    denoiser = PretrainedDenoiser(str(folder))
    with torch.no_grad():
        next(denoiser.parameters()).view(-1)[0] += 1e-3
    save_denoiser(denoiser, tmp_path / "weight")
    copy = shutil.copytree(folder, tmp_path / "config")
    config = copy / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 2.0}))
    hashes = {PretrainedDenoiser(str(path)).identity["sha256"] for path in (folder, tmp_path / "weight", copy)}
    assert len(hashes) == 3


def test_only_what_was_read_has_an_identity(folder):
    assert identity_of(PretrainedDenoiser(str(folder)))["path"] == str(folder)
    assert identity_of(None) is None and identity_of(NetworkDenoiser(network(), *KINDS["flow"])) is None
