"""tools/make_pairs.py: pairs are what a sampler makes of numbered noise, whoever makes them and however often it is killed."""

from __future__ import annotations

import json
from pathlib import Path

import drawing
import numpy
import pytest
import tiny_samples
import torch
from drawing import contents, write_teacher
from script import load_script

from datamodules.digits import DigitsDataModule
from datamodules.members import to_npy
from datamodules.pairs import PairsDataModule
from datamodules.shard_writing import save_shard
from distill.anchored import AnchoredGuidance
from distill.checkpoints import atomic_writer
from distill.codecs import AutoencoderKLCodec
from distill.conditioners import ClipConditioner
from distill.frozen import Frozen
from distill.grids import UniformGrid
from distill.guidance import ClassifierFreeGuidance
from distill.inversion import invert
from distill.metrics.features import to_uint8
from distill.noise import SeededNoise
from distill.pretrained import PretrainedDenoiser
from distill.samplers import OdeSampler, RenoiseSampler
from distill.solvers import Euler, Heun
from distill.space import ModelSpace
from distill.types import Batch, label_conditions

tool = load_script("make_pairs")

RECIPE = """
teacher: {{class_path: PretrainedDenoiser, init_args: {{path: {teacher}}}}}
sampler: {{class_path: OdeSampler, init_args: {{solver: Euler, grid: UniformGrid}}}}
steps: 2
count: 11
seed: 3
batch_size: 2
device: cpu
"""
SAMPLER = OdeSampler(Euler(), UniformGrid())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def recipe(teacher, tmp_path_factory) -> Path:
    """Pairs of the digits' classes, not to be changed."""
    file = tmp_path_factory.mktemp("recipe") / "pairs.yaml"
    file.write_text(RECIPE.format(teacher=teacher))
    return file


def make(recipe: Path, out: Path, *arguments) -> PairsDataModule:
    tool.main(["--config", str(recipe), "--out", str(out), *map(str, arguments)])
    return PairsDataModule(str(out))


def all_of(module: PairsDataModule) -> Batch:
    return module.data[torch.arange(module.size)]


def refused(capsys, recipe: Path, out: Path, *arguments) -> str:
    return drawing.refused(tool, capsys, recipe, out, *arguments)


@torch.no_grad()
def expected(teacher: Path, numbers: list[int], labels: list[int], sampler=SAMPLER, guidance=None, shape=(1, 8, 8)):
    """What the pairs with these numbers should be, drawn in one batch."""
    denoiser, (cond, null) = Frozen(PretrainedDenoiser(str(teacher))).module, label_conditions(torch.tensor(labels), 10)
    fresh = SeededNoise(3, numbers, shape)
    noise = fresh.draw()
    return sampler(denoiser if guidance is None else guidance(denoiser, null), noise, cond, 2, fresh), noise


def assert_near(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- what is made


def test_pairs_are_what_the_sampler_makes_of_the_noise_of_their_number(recipe, teacher, tmp_path):
    batch = all_of(make(recipe, tmp_path / "out"))
    assert batch.cond["labels"].tolist() == [*range(10), 0] and batch.null["labels"].tolist() == [10] * 11
    for numbers in ([0, 1], [4, 5], [10]):  # the batches in which they were drawn: to the bit
        x0, noise = expected(teacher, numbers, [number % 10 for number in numbers])
        assert torch.equal(batch.x0[numbers], x0) and torch.equal(batch.noise[numbers], noise)
    assert float((batch.x0 - batch.noise).abs().mean()) > 0.1


def test_conditions_are_those_of_the_datas_training_items_in_turn(recipe, tmp_path):
    module = make(recipe, tmp_path / "out", "--data=DigitsDataModule", "--data.holdout=1790", "--batch-size=20", "--count=20")
    digits = DigitsDataModule(holdout=1790)
    labels = digits.rows()[digits.training_items()].cond["labels"].tolist()
    assert len(labels) == 7 and all_of(module).cond["labels"].tolist() == (labels * 3)[:20]
    header = module.shards[0].header
    assert header["dataset"] == {"class": "DigitsDataModule", "holdout": 1790, "labels": True, "captions": False}


def test_header_and_manifest_say_what_made_them(recipe, teacher, tmp_path):
    module = make(recipe, tmp_path / "out", "--of=2", "--guidance=ClassifierFreeGuidance", "--guidance.scale=2")
    manifest = json.loads((tmp_path / "out/00001-of-00002.json").read_text())
    header, identity = manifest["header"], PretrainedDenoiser(str(teacher)).identity
    assert header["kind"] == "pairs" and header["teacher"] == identity and module.spec.teacher == identity["sha256"]
    assert header["sampler"]["init_args"]["solver"]["class_path"] == "distill.solvers.Euler"
    assert header["guidance"]["class_path"].endswith("ClassifierFreeGuidance")
    assert header["guidance"]["init_args"]["scale"] == 2
    assert [header[key] for key in ("steps", "seed", "total", "of", "shard", "batch_size")] == [2, 3, 11, 2, 1, 2]
    assert (header["shape"], header["num_classes"], header["store"]) == ([1, 8, 8], 10, "array")
    assert (manifest["count"], manifest["first"], header["computed_by"]["device"]) == (5, 6, "cpu")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"0000{shard}-of-00002.{ending}" for shard in (0, 1) for ending in ("json", "tar")
    ]


def test_guidance_is_the_teachers(recipe, teacher, tmp_path):
    module = make(recipe, tmp_path / "out", "--guidance=ClassifierFreeGuidance", "--guidance.scale=3", "--count=4")
    batch = all_of(module)
    x0, _ = expected(teacher, [0, 1, 2, 3], [0, 1, 2, 3], guidance=ClassifierFreeGuidance(3.0))
    assert_near(batch.x0, x0)
    assert "guidance" not in batch.cond
    assert float((x0 - expected(teacher, [0, 1, 2, 3], [0, 1, 2, 3])[0]).abs().max()) > 0.01


def test_a_scale_is_drawn_for_each_pair_and_delivered(recipe, teacher, tmp_path):
    arguments = ("--guidance_range=[1.5, 4]", "--count=200", "--batch-size=100")
    batch = all_of(make(recipe, tmp_path / "out", *arguments))
    scales = batch.cond["guidance"]
    assert torch.equal(batch.null["guidance"], scales) and len(scales.unique()) == 200
    assert 1.5 <= float(scales.min()) < 1.6 and 3.9 < float(scales.max()) < 4
    assert abs(float(scales.mean()) - 2.75) < 4 * 2.5 / 12**0.5 / 200**0.5
    noise = batch.noise.flatten(1)[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([scales, noise]))[0, 1])) < 0.25
    numbers = list(range(100))
    x0, _ = expected(teacher, numbers, [n % 10 for n in numbers], guidance=ClassifierFreeGuidance(scales[:100]))
    assert_near(batch.x0[:100], x0)
    other = all_of(make(recipe, tmp_path / "other", *arguments[:1], "--count=9", "--batch-size=3"))
    assert torch.equal(other.cond["guidance"], scales[:9])


def test_samplers_that_draw_more_noise_draw_that_of_the_pair(recipe, teacher, tmp_path):
    arguments = ("--sampler=RenoiseSampler", "--sampler.grid=UniformGrid")
    batch = all_of(make(recipe, tmp_path / "out", *arguments))
    x0, _ = expected(teacher, [5, 7], [5, 7], sampler=RenoiseSampler(UniformGrid()))
    assert_near(batch.x0[[5, 7]], x0)


def test_pictures_and_half_precision_are_rounded_and_nothing_else(recipe, tmp_path):
    whole = all_of(make(recipe, tmp_path / "whole"))
    half = all_of(make(recipe, tmp_path / "half", "--dtype=float16"))
    assert torch.equal(half.x0, whole.x0.half().float()) and torch.equal(half.noise, whole.noise)
    png = all_of(make(recipe, tmp_path / "png", "--store=png"))
    assert torch.equal(to_uint8(png.x0), to_uint8(whole.x0)) and torch.equal(png.noise, whole.noise)
    assert float((png.x0 - whole.x0.clamp(-1, 1)).abs().max()) <= 0.5001 / 127.5
    assert png.cond["labels"].tolist() == whole.cond["labels"].tolist()


@torch.no_grad()
def test_inverted_pairs_are_of_the_datas_own_samples(recipe, teacher, tmp_path):
    arguments = ("--invert=true", "--count=null", "--data=DigitsDataModule", "--data.holdout=1790", "--steps=3")
    solver = ("--sampler.solver=Heun", "--of=2", "--batch-size=4")
    module = make(recipe, tmp_path / "out", *arguments, *solver)
    digits = DigitsDataModule(holdout=1790)
    real, batch = digits.rows()[digits.training_items()], all_of(module)
    assert module.size == 7 and torch.equal(batch.x0, real.x0) and torch.equal(batch.cond["labels"], real.cond["labels"])
    denoiser = PretrainedDenoiser(str(teacher)).eval()
    assert_near(batch.noise, invert(denoiser, real.x0, real.cond, Heun(), UniformGrid(), 3))
    assert module.shards[0].header["noise_check"] is None and module.spec.paired


# --------------------------------------------------------------------------------------------------- prompts and latents


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """A folder with an autoencoder and a text tower, and a teacher of their latents that reads no prompt."""
    folder = tiny_samples.towers(tmp_path_factory.mktemp("towers"))
    write_teacher(folder / "flow", 2, 2, None)
    return folder


@pytest.fixture
def latents(space, tmp_path) -> Path:
    file = tmp_path / "latents.yaml"
    codec = f"{{class_path: AutoencoderKLCodec, init_args: {{path: {space}}}}}"
    conditioner = f"{{class_path: ClipConditioner, init_args: {{path: {space}}}}}"
    text = RECIPE.format(teacher=space / "flow") + f"space: {{codec: {codec}, conditioner: {conditioner}}}\n"
    file.write_text(text + "data: {class_path: tiny_samples.NumberedPictures, init_args: {captions: true}}\n")
    return file


def test_prompts_are_stored_as_text_or_with_their_embeddings(latents, space, tmp_path):
    text = make(latents, tmp_path / "text")
    prompts = [tiny_samples.caption(number % 7) for number in range(11)]
    batch = all_of(text)
    assert batch.prompts == prompts and batch.cond == batch.null == {} and batch.encoded and batch.x0.shape == (11, 2, 2, 2)
    codec, conditioner = AutoencoderKLCodec(str(space)), ClipConditioner(str(space))
    assert (text.spec.prompts, text.spec.codec) == (True, codec.identity["sha256"])
    assert text.spec.conditioner == conditioner.identity["sha256"] and text.spec.widths == {}
    full = make(latents, tmp_path / "full", "--embeddings=float32")
    ready = ModelSpace(codec, conditioner).encode(batch)
    found = all_of(full)
    assert_near(found.cond["prompt_embeds"], ready.cond["prompt_embeds"])
    assert_near(found.null["prompt_embeds"], ready.null["prompt_embeds"])
    assert torch.equal(found.x0, batch.x0) and found.prompts is None
    assert not full.spec.prompts and full.spec.widths == {"prompt_embeds": 8}
    half = all_of(make(latents, tmp_path / "half", "--embeddings=float16"))
    assert torch.equal(half.cond["prompt_embeds"], found.cond["prompt_embeds"].half().float())
    assert torch.equal(half.x0, found.x0)


def test_prompts_of_a_file_need_no_data(latents, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of the digit one\n\n the digit two \n")
    module = make(latents, tmp_path / "out", f"--prompts={tmp_path / 'prompts.txt'}", "--data=null", "--count=3")
    assert all_of(module).prompts == ["a photo of the digit one", "the digit two", "a photo of the digit one"]
    assert module.spec.num_classes is None and module.spec.shape == (2, 2, 2)


def test_encoded_conditions_are_stored_as_they_were(latents, space, tmp_path):
    identity = ModelSpace(AutoencoderKLCodec(str(space)), ClipConditioner(str(space))).identity
    header = {"format": 1, **identity, "shape": [2, 2, 2], "num_classes": None, "widths": {"prompt_embeds": 3}, "own_null": []}
    x0 = to_npy(numpy.zeros((2, 2, 2), numpy.float32))
    members = [{"x0.npy": x0, "prompt_embeds.npy": to_npy(numpy.full((4, 3), n, numpy.float32))} for n in (6, 8)]
    null = {"prompt_embeds": torch.full((1, 4, 3), -1.0)}
    save_shard(tmp_path / "encoded", atomic_writer, header | {"shard": 0, "of": 1, "total": 2}, null, 0, members)
    data = ("--space=null", "--data=EncodedDataModule", f"--data.folder={tmp_path / 'encoded'}", "--count=3")
    module = make(latents, tmp_path / "out", *data)
    batch = all_of(module)
    assert batch.cond["prompt_embeds"][:, 0, 0].tolist() == [6, 8, 6] and batch.cond["prompt_embeds"].shape == (3, 4, 3)
    assert batch.null["prompt_embeds"].unique().tolist() == [-1] and batch.encoded and float(batch.x0.abs().min()) > 0
    assert (module.spec.codec, module.spec.conditioner) == tuple(identity[part]["sha256"] for part in ("codec", "conditioner"))
    assert module.spec.widths == {"prompt_embeds": 3}


def test_latents_of_real_pictures_are_inverted_the_same_in_any_shard(latents, space, tmp_path):
    arguments = ("--invert=true", "--count=null", "--embeddings=float16")
    one, many = (all_of(make(latents, tmp_path / str(of), *arguments, f"--of={of}")) for of in (1, 4))
    assert torch.equal(one.x0, many.x0) and torch.equal(one.noise, many.noise) and len(one) == 7
    pictures = torch.stack([tiny_samples.picture(number) for number in range(7)])
    codec = AutoencoderKLCodec(str(space))
    with torch.no_grad():
        law = codec.model.encode(pictures).latent_dist
    unit = (one.x0 / codec.factor - law.mean) / law.std
    assert abs(float(unit.mean())) < 0.6 and 0.6 < float(unit.std()) < 1.4  # drawn of the codec's law


@torch.no_grad()
def test_anchored_guidance_draws_the_samples(latents, space, tmp_path):
    batch = all_of(make(latents, tmp_path / "out", "--anchored.scale=3", "--anchored.iterations=1", "--embeddings=float32"))
    denoiser = PretrainedDenoiser(str(space / "flow")).eval()
    anchored = AnchoredGuidance(3.0, iterations=1).sample(denoiser, batch.null, SAMPLER, batch.noise, batch.cond, 2)
    assert_near(batch.x0, anchored)


# -------------------------------------------------------------------------------------------------------- restarts


def test_tasks_of_an_array_make_the_pairs_of_one_command_to_the_bit(recipe, tmp_path, capsys):
    """Eleven pairs in six batches of two, the last half full, in one, two, four and six shards."""
    one = all_of(make(recipe, tmp_path / "1", "--guidance_range=[1, 2]"))
    for of in (2, 4, 6):
        for shard in reversed(range(of)):
            tool.main(
                ["--config", str(recipe), "--out", str(tmp_path / str(of)), f"--of={of}", f"--shard={shard}"]
                + ["--guidance_range=[1, 2]"]
            )
        many = all_of(PairsDataModule(str(tmp_path / str(of))))
        for name in ("x0", "noise"):
            assert torch.equal(getattr(one, name), getattr(many, name))
        assert all(torch.equal(one.cond[key], many.cond[key]) for key in one.cond)
    make(recipe, tmp_path / "again", "--of=4", "--guidance_range=[1, 2]")
    assert contents(tmp_path / "again") == contents(tmp_path / "4")
    assert "11 pairs made; 4 shards made, 0 were there, of 4 in all" in capsys.readouterr().out


def test_killed_twenty_times_and_restarted_the_folder_is_the_same_to_the_byte(recipe, tmp_path):
    arguments = ["--config", str(recipe), "--count=80", "--of=20", "--batch-size=2", "--out"]
    drawing.check_killed_and_restarted(tool, arguments, tmp_path, 20)
    assert len(contents(tmp_path / "whole")) == 40


def test_only_what_killed_tasks_left_of_the_own_shards_is_removed(recipe, tmp_path):
    out = tmp_path / "out"
    make(recipe, out, "--of=3")
    whole = contents(out)
    live = out / "00001-of-00003.tar.77.partial"  # of another task, which may be at work
    for path in (live, out / "00000-of-00003.tar.5.partial", out / "00002-of-00003.json.6.partial"):
        path.write_bytes(b"half")
    (out / "00002-of-00003.json").unlink()  # killed between the tar and its manifest
    for shard in (0, 2):
        tool.main(["--config", str(recipe), "--out", str(out), "--of=3", f"--shard={shard}"])
    assert contents(out) == whole | {live.name: b"half"}
    make(recipe, out, "--of=3")
    assert contents(out) == whole


@pytest.mark.parametrize("harm", ["truncate", "broken manifest", "no tar"])
def test_half_and_damaged_shards_are_made_again(harm, recipe, tmp_path, capsys):
    out = tmp_path / "out"
    make(recipe, out, "--of=2")
    whole = contents(out)
    tar = out / "00001-of-00002.tar"
    if harm == "truncate":
        tar.write_bytes(tar.read_bytes()[:2000])
    elif harm == "no tar":
        tar.unlink()
    else:
        tar.with_suffix(".json").write_text("{")
    make(recipe, out, "--of=2")
    assert "5 pairs made; 1 shards made, 1 were there" in capsys.readouterr().out and contents(out) == whole


# ------------------------------------------------------------------------------------------------ what is refused


def test_one_folder_holds_one_teacher_and_one_protocol(recipe, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    make(recipe, out, "--of=2")
    before = contents(out)
    write_teacher(tmp_path / "other", seed=1)
    changes = {
        f"--teacher.path={tmp_path / 'other'}": "teacher",
        "--steps=3": "steps",
        "--seed=4": "seed",
        "--sampler.solver=Heun": "sampler",
        "--guidance_range=[1, 2]": "guidance_range",
        "--batch-size=1": "batch_size",
        "--dtype=float16": "dtype",
        "--count=10": "total",
        "--data=DigitsDataModule": "dataset",
        "--of=3": "of",
    }
    for change, key in changes.items():
        assert f"has {key}=" in refused(capsys, recipe, out, "--of=2", change), change
    monkeypatch.setattr(tool, "noise_hash", lambda *_: "other numpy")
    assert "has noise_check=" in refused(capsys, recipe, out, "--of=2")
    assert contents(out) == before


def test_another_torch_or_device_goes_on_with_the_folder(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    tool.main(["--config", str(recipe), "--out", str(out), "--of=2", "--shard=0"])
    monkeypatch.setattr("distill.shard_jobs.header.device_name", lambda device: "another machine")
    module = make(recipe, out, "--of=2")
    assert [shard.header["computed_by"]["device"] for shard in module.shards] == ["cpu", "another machine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--of=2", "--shard=2"], "--shard=2: give 0 to 1"),
        (["--of=7"], "--of=7: shards are of whole batches, and there are 6"),
        (["--batch-size=0"], "batch_size=0: give at least 1"),
        (["--count=0"], "count=0: give at least 1"),
        (["--count=null"], "count=null: give the number of pairs, or data"),
        (["--steps=0"], "steps=0: give at least 1"),
        (["--seed=-1"], "seed=-1: give at least 0"),
        (["--guidance_range=[3, 2]"], "guidance_range=(3.0, 2.0): give 0 <= low < high"),
        (["--guidance_range=[1, 2]", "--anchored.scale=2"], "guidance_range=(1.0, 2.0): anchored is given too"),
        (["--embeddings=float16"], "embeddings=float16: neither data nor prompts make any"),
        (["--invert=true"], "invert=true: pairs are of the data's samples"),
        (["--invert=true", "--data=DigitsDataModule", "--count=5"], "invert=true: pairs are of the data's samples"),
        (["--invert=true", "--sampler=RenoiseSampler", "--sampler.grid=UniformGrid"], "sampler=RenoiseSampler: invert"),
        (["--invert=true", "--anchored.scale=2"], "invert=true: anchored guidance is of samples from noise"),
        (["--anchored.scale=2"], "anchored guidance optimises a floating null condition"),
        (["--data=SyntheticDataModule", "--data.shape=[1,9,9]"], "teacher works on samples of shape (1, 8, 8)"),
        (["--data=DigitsDataModule", "--data.labels=false"], "teacher has 10 classes, but data has None"),
        (["--data=DigitsDataModule", "--data.captions=true"], "model.space.conditioner is null"),
        (["--prompts=nowhere.txt"], "nowhere.txt"),
        (["--teacher.path=nowhere"], "path='nowhere'"),
        (["--stepz=3"], "stepz: there is no such key"),
        (["--sampler.solver=Hein"], "Hein"),
    ],
)
def test_wrong_requests_are_named_and_nothing_is_written(arguments, words, recipe, tmp_path, capsys):
    assert words in refused(capsys, recipe, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_teacher_without_a_file_and_pictures_of_latents_are_refused(recipe, space, latents, tmp_path, capsys):
    bare = tmp_path / "bare.yaml"
    network = "{class_path: UNet2D, init_args: {in_channels: 1, sample_size: 8, num_classes: 10}}"
    teacher = f"teacher: {{class_path: NetworkDenoiser, init_args: {{network: {network}, schedule: RectifiedFlow}}}}\n"
    bare.write_text(teacher + recipe.read_text().split("\n", 2)[2])
    assert "teacher=NetworkDenoiser: was not read from a file" in refused(capsys, bare, tmp_path / "out")
    assert "store=png: holds pixels of 1 or 3 channels" in refused(capsys, latents, tmp_path / "out", "--store=png")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_named(recipe, tmp_path, capsys, monkeypatch):
    euler = Euler.step

    def overflow(self, denoiser, x, t, s, cond):
        return euler(self, denoiser, x, t, s, cond) * torch.where(cond["labels"] == 5, torch.inf, 1.0)[:, None, None, None]

    monkeypatch.setattr(Euler, "step", overflow)
    assert "x0 of samples [5] is not finite" in refused(capsys, recipe, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
