"""tools/make_trajectories.py: what is stored are the guided teacher's evaluations, whoever makes them, however often killed."""

from __future__ import annotations

import json
from pathlib import Path

import drawing
import pytest
import tiny_samples
import torch
from drawing import contents, write_teacher
from script import load_script

from datamodules.trajectories import TrajectoriesDataModule
from distill.codecs import AutoencoderKLCodec
from distill.conditioners import ClipConditioner
from distill.guidance import guided
from distill.pretrained import PretrainedDenoiser
from distill.solvers import Euler
from distill.space import ModelSpace
from distill.types import Batch

tool = load_script("make_trajectories")

RECIPE = """
teacher: {{class_path: PretrainedDenoiser, init_args: {{path: {teacher}}}}}
sampler: {{class_path: OdeSampler, init_args: {{solver: Euler, grid: UniformGrid}}}}
steps: 4
guidance_range: [1.5, 4]
count: 7
seed: 3
batch_size: 2
device: cpu
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def recipe(teacher, tmp_path_factory) -> Path:
    """Trajectories of the digits' classes, not to be changed."""
    file = tmp_path_factory.mktemp("recipe") / "trajectories.yaml"
    file.write_text(RECIPE.format(teacher=teacher))
    return file


def make(recipe: Path, out: Path, *arguments) -> TrajectoriesDataModule:
    tool.main(["--config", str(recipe), "--out", str(out), *map(str, arguments)])
    return TrajectoriesDataModule(str(out))


def all_of(module: TrajectoriesDataModule) -> Batch:
    return module.data[torch.arange(module.size)]


def refused(capsys, recipe: Path, out: Path, *arguments) -> str:
    return drawing.refused(tool, capsys, recipe, out, *arguments)


# ------------------------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize(("dtype", "unit", "roundings"), [("float32", 2.0**-24, 12), ("float16", 2.0**-11, 2)])
@torch.no_grad()
def test_the_guided_teacher_predicts_again_what_is_stored(dtype, unit, roundings, recipe, teacher, tmp_path):
    """To the rounding of what is stored, of x0 and of x_t, through which the prediction moves; in float32 the network's."""
    batch = all_of(make(recipe, tmp_path / "out", f"--dtype={dtype}"))
    assert batch.x0.shape == batch.noise.shape == (28, 1, 8, 8) and batch.time.shape == batch.cond["guidance"].shape == (28,)
    assert batch.time.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    denoiser = PretrainedDenoiser(str(teacher)).eval()
    x_t = denoiser.schedule.add_noise(batch.x0, batch.noise, batch.time)
    replayed, cond = guided(denoiser, batch.cond, batch.null, batch.cond["guidance"])
    error = (replayed(x_t, batch.time, cond) - batch.x0).abs().max()
    scale = float(batch.x0.abs().max() + x_t.abs().max())
    wrong, _ = guided(denoiser, batch.cond, batch.null, batch.cond["guidance"] + 0.5)
    assert float(error) < roundings * unit * scale < float((wrong(x_t, batch.time, cond) - batch.x0).abs().max())


def test_half_precision_rounds_what_is_stored_and_nothing_else(recipe, tmp_path):
    whole, half = (all_of(make(recipe, tmp_path / dtype, f"--dtype={dtype}")) for dtype in ("float32", "float16"))
    assert torch.equal(half.x0, whole.x0.half().float()) and torch.equal(half.noise, whole.noise.half().float())
    assert torch.equal(half.time, whole.time) and torch.equal(half.cond["guidance"], whole.cond["guidance"])


def test_points_are_numbered_trajectory_by_trajectory_with_its_conditions(recipe, tmp_path):
    """The whole run, of which three points of each trajectory are among the four."""
    whole = all_of(make(recipe, tmp_path / "whole"))
    module = make(recipe, tmp_path / "some", "--points=3", "--of=2")
    some = all_of(module)
    assert whole.cond["labels"].tolist() == [number for number in range(7) for _ in range(4)]
    assert some.cond["labels"].tolist() == [number for number in range(7) for _ in range(3)]
    assert whole.time.reshape(7, 4).tolist() == [[1.0, 0.75, 0.5, 0.25]] * 7
    assert [shard.first for shard in module.shards] == [0, 12] and [shard.count for shard in module.shards] == [12, 9]
    assert module.shards[0].header["evaluations"] == 4 and module.shards[0].header["points"] == 3
    for number in range(7):
        mine, its = slice(3 * number, 3 * number + 3), slice(4 * number, 4 * number + 4)
        place = [whole.time[its].tolist().index(time) for time in some.time[mine].tolist()]
        assert place == sorted(set(place))
        for name in ("x0", "noise"):
            assert torch.equal(getattr(some, name)[mine], getattr(whole, name)[its][place])
        assert some.cond["guidance"][mine].tolist() == whole.cond["guidance"][its][place].tolist()
    assert len(whole.cond["guidance"].unique()) == 7 and torch.equal(whole.null["guidance"], whole.cond["guidance"])
    assert whole.null["labels"].tolist() == [10] * 28


def test_header_and_manifest_say_what_made_them(recipe, teacher, tmp_path, capsys):
    make(recipe, tmp_path / "out", "--of=2", "--points=2")
    assert "7 trajectories made; 2 shards made, 0 were there, of 2 in all" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/00001-of-00002.json").read_text())
    header = manifest["header"]
    assert header["kind"] == "trajectories" and header["teacher"] == PretrainedDenoiser(str(teacher)).identity
    assert [header[key] for key in ("steps", "seed", "total", "of", "shard", "batch_size")] == [4, 3, 7, 2, 1, 2]
    assert header["guidance_range"] == [1.5, 4] and header["dtype"] == "float32"
    assert (manifest["count"], manifest["first"], manifest["members"]) == (6, 8, ["json", "noise.npy", "x0.npy"])


def test_a_rule_guides_at_the_scales_that_are_drawn(recipe, tmp_path):
    """At scale 1 outside of its interval: there the predictions are those of no guidance."""
    free = all_of(make(recipe, tmp_path / "free", "--guidance_range=null"))
    rule = ("--guidance=ClassifierFreeGuidance", "--guidance.scale=9")
    limited = all_of(make(recipe, tmp_path / "limited", *rule, "--guidance.sigma_low=2"))
    plain = all_of(make(recipe, tmp_path / "plain"))
    start, first = limited.time == 1.0, limited.time == 0.75
    assert torch.equal(limited.x0[start], plain.x0[start]) and torch.equal(limited.cond["guidance"], plain.cond["guidance"])
    assert "guidance" not in free.cond and not torch.equal(free.x0[start], plain.x0[start])
    assert torch.equal(limited.x0[first], plain.x0[first])  # nsr 3
    assert not torch.equal(limited.x0[limited.time == 0.5], plain.x0[limited.time == 0.5])


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    folder = tiny_samples.towers(tmp_path_factory.mktemp("towers"))
    write_teacher(folder / "flow", 2, 2, None)
    parts = [f"{{class_path: {name}, init_args: {{path: {folder}}}}}" for name in ("AutoencoderKLCodec", "ClipConditioner")]
    file = folder / "latents.yaml"
    text = RECIPE.format(teacher=folder / "flow") + f"space: {{codec: {parts[0]}, conditioner: {parts[1]}}}\n"
    file.write_text(text + "data: {class_path: tiny_samples.NumberedPictures, init_args: {captions: true}}\n")
    return file


def test_prompts_are_stored_with_each_point_as_text_or_with_their_embeddings(latents, tmp_path):
    text = make(latents, tmp_path / "text", "--points=2")
    batch = all_of(text)
    assert batch.prompts == [tiny_samples.caption(number) for number in range(7) for _ in range(2)]
    assert batch.x0.shape == (14, 2, 2, 2) and batch.encoded and set(batch.cond) == {"guidance"} and text.spec.prompts
    full = make(latents, tmp_path / "full", "--points=2", "--embeddings=float16")
    found = all_of(full)
    ready = ModelSpace(AutoencoderKLCodec(str(latents.parent)), ClipConditioner(str(latents.parent))).encode(batch)
    for side, expected in ((found.cond, ready.cond), (found.null, ready.null)):
        torch.testing.assert_close(side["prompt_embeds"], expected["prompt_embeds"], rtol=2**-10, atol=1e-5)
    assert torch.equal(found.x0, batch.x0) and found.prompts is None and full.spec.widths == {"prompt_embeds": 8}
    assert len(found.cond["guidance"].unique()) == 7


# -------------------------------------------------------------------------------------------------------- restarts


def test_tasks_of_an_array_make_the_trajectories_of_one_command_to_the_bit(recipe, tmp_path):
    """Seven trajectories in four batches of two, the last half full, in one, three and four shards."""
    arguments = ["--config", str(recipe), "--points=3"]
    one = all_of(make(recipe, tmp_path / "1", "--points=3"))
    for of in (3, 4):
        for shard in reversed(range(of)):
            tool.main([*arguments, "--out", str(tmp_path / str(of)), f"--of={of}", f"--shard={shard}"])
        many = all_of(TrajectoriesDataModule(str(tmp_path / str(of))))
        for name in ("x0", "noise", "time"):
            assert torch.equal(getattr(one, name), getattr(many, name))
        assert all(torch.equal(one.cond[key], many.cond[key]) for key in one.cond)
    make(recipe, tmp_path / "again", "--of=4", "--points=3")
    assert contents(tmp_path / "again") == contents(tmp_path / "4")


def test_killed_six_times_and_restarted_the_folder_is_the_same_to_the_byte(recipe, tmp_path):
    arguments = ["--config", str(recipe), "--count=40", "--of=10", "--batch-size=2", "--out"]
    drawing.check_killed_and_restarted(tool, arguments, tmp_path, 6)
    assert len(contents(tmp_path / "whole")) == 20


# ------------------------------------------------------------------------------------------------ what is refused


def test_one_folder_holds_one_teacher_and_one_protocol(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    make(recipe, out, "--of=2", "--points=3")
    before = contents(out)
    write_teacher(tmp_path / "other", seed=1)
    changes = {
        f"--teacher.path={tmp_path / 'other'}": "teacher",
        "--steps=3": "steps",
        "--seed=4": "seed",
        "--points=2": "points",
        "--points=null": "points",
        "--sampler.solver=Heun": "sampler",
        "--guidance_range=[1, 2]": "guidance_range",
        "--dtype=float16": "dtype",
        "--count=6": "total",
    }
    for change, key in changes.items():
        assert f"has {key}=" in refused(capsys, recipe, out, "--of=2", "--points=3", change), change
    assert contents(out) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--points=5"], "points=5: 4 steps have 4 evaluations; give 1 to 4, or null"),
        (["--points=8", "--sampler.solver=Heun"], "points=8: 4 steps have 7 evaluations"),
        (["--points=0"], "points=0: 4 steps have 4 evaluations; give 1 to 4"),
        (["--count=null"], "count=null: give the number of trajectories, or data"),
        (["--guidance_range=[3, 2]"], "guidance_range=(3.0, 2.0): give 0 <= low < high"),
        (["--steps=0"], "steps=0: give at least 1"),
        (["--sampler=RenoiseSampler", "--sampler.grid=UniformGrid"], "sampler"),
        (["--store=png"], "store"),
        (["--invert=true"], "invert"),
    ],
)
def test_wrong_requests_are_named_and_nothing_is_written(arguments, words, recipe, tmp_path, capsys):
    assert words in refused(capsys, recipe, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_values_that_storage_cannot_hold_are_named(recipe, tmp_path, capsys, monkeypatch):
    """Sample 21 is the second point of trajectory 5: the first that an Euler step has led to."""
    euler = Euler.step

    def far(self, denoiser, x, t, s, cond):
        labels = cond.get("labels", torch.zeros(len(x)))
        return euler(self, denoiser, x, t, s, cond) * torch.where(labels == 5, 1e6, 1.0).reshape(-1, *[1] * (x.dim() - 1))

    monkeypatch.setattr(Euler, "step", far)
    make(recipe, tmp_path / "whole", "--points=2")
    assert "of samples [21" in refused(capsys, recipe, tmp_path / "half", "--dtype=float16")
    assert not list((tmp_path / "half").iterdir())
