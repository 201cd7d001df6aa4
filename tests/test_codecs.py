"""Codecs: the maps of diffusers' pipelines, drawn latents, precision, and what cannot be encoded."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_codecs
import torch

from distill.codecs import AutoencoderKLCodec, DeepCompressionCodec, IdentityCodec, TinyCodec
from distill.space import ModelSpace
from distill.types import DataSpec

FACTORS = {"sd": {}, "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a vae of Flux's factors, not to be changed."""
    path = tmp_path_factory.mktemp("codec")
    tiny_codecs.kl(path, **FACTORS["flux"])
    return path


def pixels(count: int = 3, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, size, size) * 2 - 1


def edit(folder, **config):
    file = folder / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


# ------------------------------------------------------------------------------------------------------------- the maps


def test_identity_changes_nothing():
    codec, x = IdentityCodec(), pixels()
    assert torch.equal(codec.decode(codec.encode(x)), x) and codec.latent_shape((3, 5, 7)) == (3, 5, 7)
    assert codec.identity is None


@pytest.mark.parametrize("factors", FACTORS)
@torch.no_grad()
def test_latents_are_scaled_and_shifted_draws(factors, tmp_path):
    tiny_codecs.kl(tmp_path, **FACTORS[factors])
    codec, x = AutoencoderKLCodec(str(tmp_path)), pixels()
    vae = codec.model
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    law = vae.encode(x).latent_dist
    torch.manual_seed(3)
    expected = (law.sample() - shift) * scale
    torch.manual_seed(3)
    z = codec.encode(x)
    assert torch.equal(z, expected)
    mode = AutoencoderKLCodec(str(tmp_path), sample=False).encode(x)
    assert torch.equal(mode, (law.mode() - shift) * scale)
    assert torch.equal(codec.decode(z), vae.decode(z / scale + shift).sample)
    assert codec.latent_shape((3, 16, 16)) == tuple(z.shape[1:]) == (4, 4, 4)


def test_weights_are_those_of_the_folder(tmp_path):
    vae = tiny_codecs.kl(tmp_path, seed=5)
    state, own = vae.state_dict(), AutoencoderKLCodec(str(tmp_path)).model.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in state)


@torch.no_grad()
def test_means_and_deviations_of_channels_as_sdxl_pipeline_has_them(tmp_path):
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 0.5, 1.5, 1.0]
    tiny_codecs.kl(tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    codec, x = AutoencoderKLCodec(str(tmp_path), sample=False), pixels()
    vae = codec.model
    z, (m, s) = codec.encode(x), (torch.tensor(value).view(1, 4, 1, 1) for value in (mean, std))
    assert torch.equal(z, (vae.encode(x).latent_dist.mode() - m) * 0.5 / s)
    assert torch.equal(codec.decode(z), vae.decode(z * s / 0.5 + m).sample)


@torch.no_grad()
def test_sana_and_tiny_autoencoders(tmp_path):
    tiny_codecs.deep_compression(tmp_path / "deep")
    codec, x = DeepCompressionCodec(str(tmp_path / "deep")), pixels()
    deep, z = codec.model, codec.encode(x)
    assert torch.equal(z, deep.encode(x).latent * 0.41407)
    assert torch.equal(codec.decode(z), deep.decode(z / 0.41407).sample)
    assert codec.latent_shape((3, 16, 32)) == (2, 4, 8) and tuple(z.shape) == (3, 2, 4, 4)
    tiny_codecs.tiny(tmp_path / "tiny", scaling_factor=1.5, shift_factor=0.25)
    codec = TinyCodec(str(tmp_path / "tiny"))
    small, z = codec.model, codec.encode(x)
    assert torch.equal(z, (small.encode(x).latents - 0.25) * 1.5)
    assert torch.equal(codec.decode(z), small.decode(z / 1.5 + 0.25).sample)
    assert codec.latent_shape((3, 16, 32)) == (4, 4, 8) and tuple(z.shape) == (3, 4, 4, 4)


@torch.no_grad()
def test_micro_batches_and_slices_change_nothing(folder):
    x, latents = pixels(5), []
    for settings in ({}, {"micro_batch": 2}, {"slicing": True}):
        torch.manual_seed(1)
        codec = AutoencoderKLCodec(str(folder), **settings)
        sizes: list[int] = []
        codec.model.encoder.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        latents.append(codec.encode(x))
        assert sizes == {(): [5], ("micro_batch",): [2, 2, 1], ("slicing",): [1] * 5}[tuple(settings)]
        torch.testing.assert_close(codec.decode(latents[0]), AutoencoderKLCodec(str(folder)).decode(latents[0]))
    for other in latents[1:]:
        torch.testing.assert_close(other, latents[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tiling_is_turned_on(folder):
    x = pixels(1, size=32)
    whole, tiled = (AutoencoderKLCodec(str(folder), sample=False, tiling=tiling).encode(x) for tiling in (False, True))
    assert whole.shape == tiled.shape and not torch.allclose(whole, tiled, atol=1e-4)


def test_gradients_reach_the_latents_and_not_the_weights(folder):
    codec = AutoencoderKLCodec(str(folder))
    z = torch.randn(1, 4, 4, 4, requires_grad=True)
    codec.decode(z).square().sum().backward()
    assert z.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in codec.parameters())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert not codec.train().model.training


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "computes"),
    [
        (None, True, torch.float32),
        ("float16", True, torch.float32),
        ("float16", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
    ],
)
@torch.no_grad()
def test_it_computes_in_dtype_unless_that_overflows(dtype, force_upcast, computes, folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    edit(tmp_path, force_upcast=force_upcast)
    codec, x = AutoencoderKLCodec(str(tmp_path), dtype=dtype, sample=False), pixels()
    seen = []
    codec.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    codec.model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        z = codec.encode(x)
        out = codec.decode(z)
    assert seen == [computes, computes] and next(codec.model.parameters()).dtype == computes
    assert z.dtype == out.dtype == torch.float32
    exact = AutoencoderKLCodec(str(folder), sample=False).encode(x)
    torch.testing.assert_close(z, exact, rtol=0.05, atol=0.02)
    assert torch.equal(z, exact) == (computes == torch.float32)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_images_that_do_not_fit_are_refused_by_name(folder):
    codec = AutoencoderKLCodec(str(folder))
    with pytest.raises(ValueError, match="images have 1 channels.*takes 3"):
        codec.latent_shape((1, 16, 16))
    with pytest.raises(ValueError, match="images are 16x18.*4x4 pixels"):
        codec.latent_shape((3, 16, 18))
    with pytest.raises(ValueError, match="images have 1 channels"):
        codec.encode(pixels(channels=1))
    with pytest.raises(ValueError, match="images are 10x10"):
        ModelSpace(codec).spec(DataSpec((3, 10, 10)))
    assert ModelSpace(codec).spec(DataSpec((3, 16, 16))).shape == (4, 4, 4)


def test_gray_images_with_a_gray_autoencoder(tmp_path):
    tiny_codecs.kl(tmp_path, channels=1)
    assert AutoencoderKLCodec(str(tmp_path)).encode(pixels(channels=1)).shape == (3, 4, 4, 4)


def test_wrong_folders_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="vae/ holds a AutoencoderKL, DeepCompressionCodec reads AutoencoderDC"):
        DeepCompressionCodec(str(folder))
    with pytest.raises(FileNotFoundError, match="decoder/ is missing"):
        AutoencoderKLCodec(str(folder), subfolder="decoder")
    with pytest.raises(ValueError, match="micro_batch=0"):
        AutoencoderKLCodec(str(folder), micro_batch=0)
    shutil.copytree(folder / "vae", tmp_path / "vae")
    edit(tmp_path, latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="latents_mean with latents_std"):
        AutoencoderKLCodec(str(tmp_path))


def test_incomplete_weights_are_an_error(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "vae", tmp_path / "vae")
    file = next((tmp_path / "vae").glob("*.safetensors"))
    state = load_file(file)
    state.pop("decoder.conv_out.bias")
    save_file(state, file)
    with pytest.raises(ValueError, match="the weights lack decoder.conv_out.bias"):
        AutoencoderKLCodec(str(tmp_path))


def test_identity_follows_weights_and_config_not_the_place(folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    first, copy = AutoencoderKLCodec(str(folder)).identity, AutoencoderKLCodec(str(tmp_path)).identity
    assert first["sha256"] == copy["sha256"] and (first["path"], copy["path"]) == (str(folder), str(tmp_path))
    edit(tmp_path, scaling_factor=0.5)
    assert AutoencoderKLCodec(str(tmp_path)).identity["sha256"] != first["sha256"]
    assert AutoencoderKLCodec(str(folder / "vae"), subfolder=None).latent_shape((3, 8, 8)) == (4, 2, 2)
