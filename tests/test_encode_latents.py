"""tools/encode_latents.py: what it stores is what training would have encoded; restarts, arrays of tasks, and refusals."""

from __future__ import annotations

import json

import numpy
import pytest
import tiny_samples
import torch
from helpers import evaluation, trainer
from script import load_script

from datamodules.encoded import EncodedDataModule
from datamodules.pictures import Pictures
from distill.codecs import AutoencoderKLCodec
from distill.conditioners import ClipConditioner, StableDiffusionXLConditioner
from distill.conditioners.towers import TextTower
from distill.denoiser import NetworkDenoiser
from distill.methods.denoising import DenoisingTraining
from distill.networks.unet2d_condition import UNet2DCondition
from distill.optimization import Optimization
from distill.schedules import RectifiedFlow
from distill.space import ModelSpace
from distill.times import UniformTimes
from distill.types import Batch, DataSpec

tool = load_script("encode_latents")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A folder with an autoencoder and a text tower, not to be changed."""
    return tiny_samples.towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture
def recipe(towers, tmp_path):
    return tiny_samples.recipe(tmp_path / "recipe.yaml", towers)


def encode(recipe, out, *arguments):
    tool.main(["--config", str(recipe), "--out", str(out), "--device", "cpu", *map(str, arguments)])
    return EncodedDataModule(str(out))


def refused(capsys, recipe, out, *arguments):
    """The line that the tool ends with."""
    with pytest.raises(SystemExit) as end:
        tool.main(["--config", str(recipe), "--out", str(out), *map(str, arguments)])
    return f"{end.value} {capsys.readouterr().err}"


# ------------------------------------------------------------------------------------------------------- what is stored


def test_means_and_embeddings_are_those_of_the_space(recipe, towers, tmp_path):
    module = encode(recipe, tmp_path / "out", "--posterior", "mode", "--of", 3, "--batch-size", 2, "--data.skip=1")
    space = ModelSpace(AutoencoderKLCodec(str(towers), sample=False), ClipConditioner(str(towers)))
    pictures = torch.stack([tiny_samples.picture(number) for number in range(1, 7)])
    expected = space.encode(Batch(pictures, {}, {}, prompts=[tiny_samples.caption(number) for number in range(1, 7)]))
    batch = module.data[torch.arange(6)]
    assert len(module.data) == 6 and batch.encoded
    torch.testing.assert_close(batch.x0, expected.x0, rtol=1e-5, atol=1e-6)
    for side, other in ((batch.cond, expected.cond), (batch.null, expected.null)):
        assert side.keys() == other.keys() == {"prompt_embeds"}
        torch.testing.assert_close(side["prompt_embeds"], other["prompt_embeds"], rtol=1e-5, atol=1e-6)
    identity = space.identity
    assert module.spec == DataSpec(
        (2, 2, 2), None, False, {"prompt_embeds": 8}, identity["codec"]["sha256"], identity["conditioner"]["sha256"]
    )
    assert space.spec(module.spec).shape == (2, 2, 2)


def test_training_on_stored_embeddings_loads_no_text_encoder(recipe, towers, tmp_path, monkeypatch):
    """With ``model.space.conditioner=null``: what the network reads is in the data."""
    from diffusers import UNet2DConditionModel

    encode(recipe, tmp_path / "out")
    module = EncodedDataModule(str(tmp_path / "out"), batch_size=2)
    monkeypatch.setattr(TextTower, "__init__", lambda *arguments: pytest.fail("a text encoder is loaded"))
    sides = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1}
    sizes = {"in_channels": 2, "out_channels": 2, "sample_size": 2, "cross_attention_dim": 8, "attention_head_dim": 4}
    model = UNet2DConditionModel(**sides, **sizes, block_out_channels=(8,), norm_num_groups=4)
    student, space = NetworkDenoiser(UNet2DCondition.of(model), RectifiedFlow()), ModelSpace(AutoencoderKLCodec(str(towers)))
    method = DenoisingTraining(student, UniformTimes(), Optimization(), evaluation(), space=space)
    method.check_data(module.spec)
    trainer(2).fit(method, datamodule=module)
    assert method.batches_seen == 2


def test_another_codec_is_refused_by_the_space(recipe, towers, tmp_path):
    module = encode(recipe, tmp_path / "out")
    tiny_samples.towers(tmp_path / "other", seed=3)
    with pytest.raises(ValueError, match="encoded by a codec with sha256"):
        ModelSpace(AutoencoderKLCodec(str(tmp_path / "other"))).spec(module.spec)
    with pytest.raises(ValueError, match="encoded by a conditioner with sha256"):
        ModelSpace(AutoencoderKLCodec(str(towers)), ClipConditioner(str(towers), clip_skip=1)).spec(module.spec)


def test_header_and_manifest_say_what_made_them(recipe, towers, tmp_path):
    encode(recipe, tmp_path / "out", "--of", 2, "--seed", 4, "--embeddings", "float16", "--data.skip=2", "--data.batch_size=3")
    manifest = json.loads((tmp_path / "out/00001-of-00002.json").read_text())
    header = manifest["header"]
    assert header["codec"] == AutoencoderKLCodec(str(towers)).identity
    assert header["conditioner"] == ClipConditioner(str(towers)).identity
    assert (header["shape"], header["widths"], header["posterior"]) == ([2, 2, 2], {"prompt_embeds": 8}, "sample")
    assert (header["total"], header["of"], header["shard"], header["seed"], manifest["count"]) == (5, 2, 1, 4, 3)
    assert header["dataset"] == {"class": "NumberedPictures", "size": 7, "skip": 2, "captions": True, "classes": None}


def test_draws_are_of_the_codecs_law_and_depend_on_the_seed(recipe, towers, tmp_path):
    latents = {}
    for seed in (0, 1):
        module = encode(recipe, tmp_path / str(seed), "--seed", seed, "--of", 2, "--data.size=200")
        latents[seed] = module.data[torch.arange(200)].x0
    assert not torch.equal(latents[0], latents[1])
    codec = AutoencoderKLCodec(str(towers))
    with torch.no_grad():
        law = codec.model.encode(torch.stack([tiny_samples.picture(number) for number in range(200)])).latent_dist
    for values in latents.values():
        unit = (values / codec.factor - law.mean) / law.std
        assert abs(unit.mean()) < 0.1 and abs(unit.std() - 1) < 0.1
        halves = unit[:100].flatten(), unit[100:].flatten()
        assert abs(torch.corrcoef(torch.stack(halves))[0, 1]) < 0.2  # each shard has draws of its own


def test_embeddings_in_half_precision_and_nothing_else(recipe, towers, tmp_path):
    whole = encode(recipe, tmp_path / "whole").data[torch.arange(7)]
    half = encode(recipe, tmp_path / "half", "--embeddings", "float16").data
    raw = half.read(torch.tensor([0]))
    assert raw["prompt_embeds.npy"].dtype == numpy.float16 and raw["x0.npy"].dtype == numpy.float32
    batch = half[torch.arange(7)]
    assert batch.cond["prompt_embeds"].dtype == torch.float32
    assert torch.equal(batch.cond["prompt_embeds"], whole.cond["prompt_embeds"].half().float())
    assert torch.equal(batch.null["prompt_embeds"], whole.null["prompt_embeds"].half().float())
    assert torch.equal(batch.x0, whole.x0)


def test_labels_without_a_conditioner(towers, tmp_path):
    recipe = tiny_samples.recipe(tmp_path / "recipe.yaml", towers, captions=False)
    module = encode(recipe, tmp_path / "out", "--data.classes=3")
    batch = module.data[torch.tensor([4, 2])]
    assert batch.cond["labels"].tolist() == [1, 2] and batch.null["labels"].tolist() == [3, 3]
    assert module.spec.num_classes == 3 and module.spec.conditioner is None


def test_sizes_are_each_samples_own_null(towers, tmp_path):
    import tiny_text

    folder = tmp_path / "xl"
    tiny_samples.towers(folder)
    tokenizer = tiny_text.clip_tokenizer(folder, "tokenizer_2")
    tiny_text.clip_text_model(folder, "text_encoder_2", projection=6, vocabulary=tokenizer)
    space = (
        f"{{codec: {{class_path: AutoencoderKLCodec, init_args: {{path: {folder}}}}}, "
        f"conditioner: {{class_path: StableDiffusionXLConditioner, init_args: {{path: {folder}, target_size: [8, 8]}}}}}}"
    )
    module = encode(tiny_samples.recipe(tmp_path / "recipe.yaml", folder, space=space), tmp_path / "out")
    batch = module.data[torch.tensor([0, 5])]
    assert batch.null["time_ids"].tolist() == batch.cond["time_ids"].tolist() == [[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]] * 2
    assert batch.null["pooled_prompt_embeds"].abs().max() == 0 < batch.cond["pooled_prompt_embeds"].abs().max()
    assert module.spec.widths == StableDiffusionXLConditioner(str(folder)).widths


def picture_folder(folder, count=3, captions=True):
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        pixels = numpy.full((12, 20, 3), 40 * number, numpy.uint8)
        pixels[:, :4] = pixels[:, -4:] = 255  # outside the middle
        Image.fromarray(pixels).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f" the digit {number}\n")
    return folder


def test_pictures_of_a_folder(towers, recipe, tmp_path):
    folder = picture_folder(tmp_path / "pictures")
    batch = Pictures(str(folder), 8)[torch.tensor([2, 0])]
    assert batch.x0.shape == (2, 3, 8, 8) and batch.prompts == ["the digit 2", "the digit 0"]
    torch.testing.assert_close(batch.x0[0, :, 2:6, 2:6], torch.full((3, 4, 4), 80 / 127.5 - 1), rtol=0, atol=1e-6)
    assert batch.x0[1].min() == -1.0
    module = encode(recipe, tmp_path / "out", "--images", folder, "--size", 8, "--posterior", "mode")
    expected = ModelSpace(AutoencoderKLCodec(str(towers), sample=False), ClipConditioner(str(towers))).encode(batch)
    found = module.data[torch.tensor([2, 0])]
    torch.testing.assert_close(found.x0, expected.x0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cond["prompt_embeds"], expected.cond["prompt_embeds"], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- restarts


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_tasks_of_an_array_make_what_one_command_makes_and_finished_shards_stay(recipe, tmp_path, capsys):
    encode(recipe, tmp_path / "one", "--of", 3)
    for shard in (2, 0):
        tool.main(["--config", str(recipe), "--out", str(tmp_path / "many"), "--of", "3", "--shard", str(shard)])
    before = {name: (tmp_path / "many" / name).stat().st_mtime_ns for name in contents(tmp_path / "many")}
    assert len(before) == 4
    encode(recipe, tmp_path / "many", "--of", 3)
    assert "1 shards made, 2 were there" in capsys.readouterr().out
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert all((tmp_path / "many" / name).stat().st_mtime_ns == time for name, time in before.items())


@pytest.mark.parametrize("harm", ["truncate", "no manifest", "broken manifest", "no tar"])
def test_half_and_damaged_shards_are_made_again(harm, recipe, tmp_path, capsys):
    out = tmp_path / "out"
    encode(recipe, out, "--of", 2)
    whole = contents(out)
    tar, manifest = out / "00001-of-00002.tar", out / "00001-of-00002.json"
    if harm == "truncate":
        tar.write_bytes(tar.read_bytes()[:2000])
    elif harm == "no tar":
        tar.unlink()
    else:
        manifest.write_text("{") if harm == "broken manifest" else manifest.unlink()
    encode(recipe, out, "--of", 2)
    assert "1 shards made, 1 were there" in capsys.readouterr().out and contents(out) == whole


def test_a_task_that_fails_leaves_nothing_that_looks_finished(recipe, tmp_path, monkeypatch):
    rows, calls = tiny_samples.Rows.__getitem__, []

    def fail(self, items):
        calls.append(items)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rows(self, items)

    monkeypatch.setattr(tiny_samples.Rows, "__getitem__", fail)
    with pytest.raises(KeyboardInterrupt):
        encode(recipe, tmp_path / "out", "--batch-size", 2)
    assert len(calls) == 3 and not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------ what is refused


def test_one_folder_holds_one_kind(recipe, towers, tmp_path, capsys):
    out = tmp_path / "out"
    encode(recipe, out)
    before = contents(out)
    for arguments, key in {("--posterior", "mode"): "posterior", ("--seed", 1): "seed", ("--data.skip=1",): "dataset"}.items():
        assert f"has {key}=" in refused(capsys, recipe, out, *arguments)
    tiny_samples.towers(tmp_path / "other", seed=5)
    other = tiny_samples.recipe(tmp_path / "other.yaml", tmp_path / "other")
    assert "has codec={'path'" in refused(capsys, other, out)
    assert contents(out) == before


def test_wrong_requests_are_named(recipe, towers, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--shard=2: give 0 to 1" in refused(capsys, recipe, out, "--of", 2, "--shard", 2)
    assert "--of=9: there are 7 samples" in refused(capsys, recipe, out, "--of", 9)
    assert "--of=0: give at least 1" in refused(capsys, recipe, out, "--of", 0)
    assert "--images=a and --size=None: give both" in refused(capsys, recipe, out, "--images", "a")
    assert "images='nowhere': there are no pictures" in refused(capsys, recipe, out, "--images", "nowhere", "--size", 8)
    assert "data.skips" in refused(capsys, recipe, out, "--data.skips=1")
    bare = tiny_samples.recipe(tmp_path / "bare.yaml", towers, space="null")
    assert "model.space=null" in refused(capsys, bare, out)
    folder = picture_folder(tmp_path / "pictures")
    (folder / "1.txt").unlink()
    assert "1.txt: missing" in refused(capsys, recipe, out, "--images", folder, "--size", 8)
    assert "images are 9x9" in refused(capsys, recipe, out, "--images", picture_folder(tmp_path / "b"), "--size", 9)
    assert not out.exists()


def test_data_that_cannot_be_encoded_is_named(recipe, towers, tmp_path, capsys):
    out = tmp_path / "out"
    encode(recipe, out)
    text = recipe.read_text()
    again = tmp_path / "again.yaml"
    again.write_text(text[: text.index("data:")] + f"data: {{class_path: EncodedDataModule, init_args: {{folder: {out}}}}}\n")
    assert "data=EncodedDataModule: is encoded already" in refused(capsys, again, tmp_path / "b")
    again.write_text(text[: text.index("data:")] + "data: {class_path: tiny.TinyData}\n")
    assert "data=TinyData: cannot be read by number" in refused(capsys, again, tmp_path / "b")
    alone = tiny_samples.recipe(tmp_path / "alone.yaml", towers, captions=False)
    assert "model.space.conditioner is null" in refused(capsys, alone, tmp_path / "b", "--data.captions=true")
    identity = tiny_samples.recipe(tmp_path / "identity.yaml", towers, space="{codec: null}")
    identity.write_text(identity.read_text().replace("captions: true", "captions: false"))
    assert "--posterior=mode: IdentityCodec has no law" in refused(capsys, identity, tmp_path / "b", "--posterior", "mode")


def test_values_that_are_not_finite_are_named(recipe, tmp_path, capsys, monkeypatch):
    picture = tiny_samples.picture
    monkeypatch.setattr(tiny_samples, "picture", lambda number: picture(number) * (float("nan") if number == 5 else 1))
    assert "x0 of samples [5] is not finite" in refused(capsys, recipe, tmp_path / "out", "--batch-size", 3)
    assert not list((tmp_path / "out").glob("*.json"))
