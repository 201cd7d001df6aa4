"""The autoencoder's losses against torch's distributions, its scaling factor, and its recipe through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from resuming import same, train_cut_and_whole
from tiny_captions import AUTOENCODER
from torch.distributions import Normal, kl_divergence

from datamodules.digits import DigitsDataModule
from distill.cli import load_run
from distill.codecs import AutoencoderKLCodec
from distill.ema import DecayAveraging
from distill.methods.autoencoder import AutoencoderTraining, gaussian_kl
from distill.optimization import Optimization
from distill.types import Batch, DataSpec

RECIPE = str(Path(__file__).resolve().parent.parent / "configs/captions/autoencoder.yaml")
CHANNELS = "--model.init_args.config.block_out_channels=[4,8]"
GROUPS = "--model.init_args.config.norm_num_groups=2"
QUICK = [CHANNELS, GROUPS, "--trainer.limit_val_batches=1"]
QUICK += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def training(**settings: object) -> AutoencoderTraining:
    """A tiny autoencoder, its average equal to it."""
    return AutoencoderTraining(AUTOENCODER, Optimization(averaging=DecayAveraging(0.5)), **settings)  # type: ignore[arg-type]


def test_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(()).double(), torch.ones(()).double()))
    torch.testing.assert_close(gaussian_kl(mean.float(), log_variance.float()), expected.flatten(1).sum(1).float())
    assert torch.equal(gaussian_kl(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)), torch.zeros(2))


def test_loss_is_the_sum_of_both_terms_over_an_image():
    method, x0 = training(kl_weight=0.25), torch.rand(3, 1, 8, 8) * 2 - 1
    mean, log_variance = method.student.encode(x0).latent_dist.parameters.chunk(2, 1)
    torch.manual_seed(1)
    losses = method.losses(Batch(x0, {}, {}))
    torch.manual_seed(1)
    decoded = method.student.decode(mean + (log_variance / 2).exp() * torch.randn(mean.shape)).sample
    absolute = (decoded - x0).abs().sum() / 3
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum() / 3
    torch.testing.assert_close(losses["reconstruction"], absolute)
    torch.testing.assert_close(losses["kl"], divergence)
    torch.testing.assert_close(losses["loss"], absolute + 0.25 * divergence)


def test_training_on_one_batch_lowers_the_reconstruction_error():
    method, x0 = training(), next(iter(DigitsDataModule(8).val_dataloader())).x0[:8]
    optimizer = torch.optim.Adam(method.student.parameters(), 1e-2)
    errors = []
    for _ in range(25):
        losses = method.losses(Batch(x0, {}, {}))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(losses["reconstruction"].item())
    assert errors[-1] < 0.5 * errors[0]


def test_exported_latents_have_unit_variance(tmp_path):
    method, data = training(), DigitsDataModule(batch_size=100, batches_per_epoch=15)
    with torch.no_grad():  # latents far from unit variance and from mean zero
        method.ema.module.quant_conv.weight[:4] *= 7
        method.ema.module.quant_conv.bias[:4] += 3
    method.export(tmp_path, data)
    codec = AutoencoderKLCodec(str(tmp_path))
    images = torch.cat([batch.x0 for batch in data.train_dataloader()])  # each training image once
    assert len(images) == 1500
    latents = codec.encode(images)
    assert float(latents.mean().abs()) > 0.5
    assert float(latents.std()) == pytest.approx(1, abs=0.01)
    stated = json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"]
    assert stated == pytest.approx(float(stated / latents.std()), rel=0.01) and abs(stated - 0.18215) > 0.01


def test_recipe_trains_resumes_and_exports_what_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut, uncut = train_cut_and_whole(RECIPE, *QUICK)
    assert same(cut["state_dict"], uncut["state_dict"])
    codec, average = AutoencoderKLCodec("whole/export"), load_run("whole")[1].ema.module
    assert all(value.equal(codec.model.state_dict()[name]) for name, value in average.state_dict().items())
    assert not Path("whole/export.partial").exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DataSpec((3, 8, 8)), r"images of 1 channels whose sides 2 divides.*\(3, 8, 8\): give such images"),
        (DataSpec((1, 7, 8)), r"\(1, 7, 8\)"),
        (DataSpec((1, 8, 8), codec="0" * 64), "latents of a codec"),
    ],
)
def test_data_that_does_not_fit_is_named(spec, words):
    training().check_data(DataSpec((1, 8, 8)))
    with pytest.raises(ValueError, match=words):
        training().check_data(spec)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="kl_weight=-1.0: give 0 or more"):
        training(kl_weight=-1.0)
    with pytest.raises(ValueError, match="AutoencoderKL does not take it.*chanels"):
        AutoencoderTraining({"chanels": 1}, Optimization())
    for key in ("compile", "gradient_checkpointing"):
        with pytest.raises(ValueError, match=f"optimization.{key}=true: only networks of"):
            AutoencoderTraining(AUTOENCODER, Optimization(**{key: True}))
