"""Every recipe trains, and a run that is killed and continued ends in the same bits as one that was not."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from resuming import same, train_cut_and_whole
from script import load_script
from standins import write_standins

from distill.checkpoints import read_checkpoint
from distill.classifier import ConvClassifier
from distill.cli import load_run, main
from distill.denoiser import NetworkDenoiser
from distill.metrics.features import to_uint8
from distill.networks.unet2d import UNet2D
from distill.pretrained import PretrainedDenoiser, save_denoiser
from distill.schedules import RectifiedFlow

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FRAGMENTS = ("data", "teachers", "spaces")
FILES = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in FRAGMENTS)
OVERRIDES = {path.with_suffix("").with_suffix(".yaml"): path for path in FILES if path.suffixes == [".tiny", ".yaml"]}
DRAWS = [path for path in FILES if path.name in ("pairs.yaml", "trajectories.yaml")]
"""What tools/make_pairs.py and tools/make_trajectories.py read."""
RECIPES = [path for path in FILES if path not in [*OVERRIDES.values(), *DRAWS]]
make_pairs, make_trajectories = load_script("make_pairs"), load_script("make_trajectories")
make_shards = load_script("make_shards")
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUICK = ["--data.init_args.batch_size=8", *QUIET]


def write_digits_teachers() -> None:
    """Untrained networks of the right kind where the digits recipes find their teachers, and the classifier."""
    torch.manual_seed(0)
    network = UNet2D(num_classes=10, channels=(32, 64), layers_per_block=1)
    for name in ("teacher", "teacher_wide", "reflow"):
        save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), f"runs/digits/{name}/export")
    ConvClassifier().save("runs/digits/classifier/export")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder in which the digits recipes find teachers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_digits_teachers()
    return tmp_path


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random teachers, written once."""
    root = tmp_path_factory.mktemp("standins")
    write_standins(root)
    return root


@pytest.fixture(scope="session")
def made(standins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and trajectories of all teachers, made by the tools once, in the folders where the recipes look for them."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_digits_teachers()
        Path("runs/tiny").symlink_to(standins)
        Path("data").mkdir()
        make_shards.main(["--digits", "--of", "4", "--out", "data/shards/digits"])
        Path("data/prompts.txt").write_text("a photo of the digit seven\na photo of the digit two\n")
        for kind, folders in (("pairs", PAIR_FOLDERS), ("trajectories", TRAJECTORY_FOLDERS)):
            for name, more in folders.items():
                config = CONFIGS / name.split("_")[0] / f"{kind}.yaml"
                tiny = ["--config", str(OVERRIDES[config])] if config in OVERRIDES else []
                tool = make_pairs if kind == "pairs" else make_trajectories
                tool.main(["--config", str(config), *tiny, *more, "--out", f"data/{kind}/{name}"])
    return root / "data"


FEW = ["--steps=1", "--count=16"]
PAIR_FOLDERS = {
    "digits": FEW,
    "digits_real": ["--steps=2", "--count=null", "--invert=true"],
    "digits_reflow": [*FEW, "--teacher.init_args.path=runs/digits/reflow/export"],
    "cifar10": [],
    "imagenet64": [],
    "sd15": [],
    "sd15_reflow": ["--guidance.init_args.scale=1.5"],
}
TRAJECTORY_FOLDERS: dict[str, list[str]] = {"digits": ["--steps=2", "--count=16"], "dit": [], "sd21": [], "sdxl": []}
STORED = ("digits_shards.yaml", "data/pairs/", "pairs_digits.yaml", "data/trajectories/", "trajectories_digits.yaml")
"""What a recipe that is trained on pairs or trajectories names."""


def turns_before_the_student(recipe: Path) -> int:
    """Batches until each player of a recipe has had a turn, but for the student's: 1 where there is no fake score."""
    settings = yaml.safe_load(recipe.read_text())["model"]["init_args"]
    return settings.get("fake_score", {}).get("steps", 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_trains_two_steps(
    recipe: Path, folder: Path, standins: Path, request: pytest.FixtureRequest
) -> None:
    """Those for full-size teachers through the tiny override beside them: it changes sizes, places and the data."""
    Path("runs/tiny").symlink_to(standins)
    if any(name in recipe.read_text() for name in STORED):
        Path("data").symlink_to(request.getfixturevalue("made"))
    Path("runs/captions").symlink_to(standins / "captions")
    tiny = OVERRIDES.get(recipe)
    more = QUICK if tiny is None else ["--config", str(tiny), *QUIET]
    steps = 2 if tiny is not None else 1 + turns_before_the_student(recipe)
    main(["fit", "--config", str(recipe), *more, f"--trainer.max_steps={steps}", "--trainer.default_root_dir=run"])
    state = read_checkpoint("run/checkpoints/last.ckpt")
    assert state["global_step"] == state["distill"]["batches_seen"] == steps
    assert not any("teacher" in key for key in state["state_dict"])
    # A recipe's learning rate may be too small to be seen in two steps, gradients are there all the same; in random networks
    # not everywhere: layers that start at zero let none through.
    momenta = [moments["exp_avg"].any() for moments in state["optimizer_states"][0]["state"].values()]
    assert sum(momenta) > 0.25 * len(momenta) > 0
    load_run("run")


@pytest.mark.parametrize("name", ["reflow", "reflow_pp", "perflow", "agd", "agd_trajectories", "gft"])
def test_recipes_resume_to_the_bit(name: str, folder: Path, made: Path) -> None:
    """Pairs of one folder and of two, windows solved in the loop, adapters, stored points, a guided teacher in training."""
    Path("data").symlink_to(made)
    cut, whole = train_cut_and_whole(str(CONFIGS / f"digits/{name}.yaml"), *QUICK, "--trainer.limit_val_batches=0")
    for key in ("state_dict", "optimizer_states", "distill"):
        assert same(cut[key], whole[key]), key


def test_pairs_are_trained_on_and_real_digits_validated_on(folder: Path, made: Path) -> None:
    """One batch: distances of the student's samples to the real digits, and the measures of both flows."""
    Path("data").symlink_to(made)
    one = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1", *QUICK]
    main(["fit", "--config", str(CONFIGS / "digits/reflow.yaml"), *one])
    rows = list(csv.DictReader(Path("runs/digits/reflow/csv/metrics.csv").open()))
    logged = {key: float(value) for row in rows for key, value in row.items() if value and key.startswith("val/")}
    assert {"val/frechet_pixels/1", "val/accuracy/4", "val/transport_cost"} < logged.keys()
    # The student has hardly moved from its teacher.
    assert 0 < logged["val/straightness"] == pytest.approx(logged["val/teacher_straightness"], rel=0.2)


def test_the_trained_teacher_is_exported_also_by_a_run_that_was_cut_just_before(folder: Path) -> None:
    again = ["fit", "--config", str(CONFIGS / "digits/teacher.yaml"), "--trainer.max_steps=1", "--ckpt_path=last", *QUICK]
    main(again)
    shutil.rmtree("runs/digits/teacher/export")
    main(again)
    _, method, _ = load_run("runs/digits/teacher")
    exported = PretrainedDenoiser("runs/digits/teacher/export").state_dict()
    assert all(value.equal(exported[key]) for key, value in method.ema.module.state_dict().items())


def test_prediction_and_validation_are_of_the_trained_student(folder: Path) -> None:
    recipe = ["--config", str(CONFIGS / "digits/cd.yaml"), "--trainer.default_root_dir=run", *QUICK]
    one_step = "--model.init_args.evaluation.steps=[1]"
    with pytest.raises(SystemExit):
        main(["predict", *recipe, one_step])
    main(["fit", *recipe, "--trainer.max_steps=3", one_step])
    main(["predict", *recipe, one_step])
    samples = torch.from_numpy(numpy.load("run/predictions/steps_1_rank_0.npz")["arr_0"])
    _, method, data = load_run("run")
    batch = next(iter(data.predict_dataloader()))
    expected = to_uint8(method.draw(1, range(2), {k: v[:2] for k, v in batch.cond.items()}, batch.null))
    assert samples.shape == (1797, 8, 8, 1)
    assert int((samples[:2, ..., 0].int() - expected[:, 0].int()).abs().max()) <= 1


TEACHER = "--model.init_args.teacher.init_args"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (f"{TEACHER}.path=nowhere", ["model.teacher.path='nowhere'", "give a diffusers folder"]),
        (f"{TEACHER}.path=colour", ["model.teacher works on samples of shape (3, 8, 8)", "(1, 8, 8)", "give a teacher"]),
        (f"{TEACHER}.path=letters", ["model.teacher has 26 classes, but data has 10", "give a teacher"]),
        (f"{TEACHER}.schedule=VariancePreserving", ["model.teacher.schedule=Var", "says RectifiedFlow(shift=1.0)", "leave"]),
        (f"{TEACHER}.prediction=eps", ["model.teacher.prediction='eps'", "says 'flow'", "leave prediction out"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(
    option: str, words: list[str], folder: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, channels, classes in (("colour", 3, 10), ("letters", 1, 26)):
        network = UNet2D(in_channels=channels, num_classes=classes, channels=(8, 16), layers_per_block=1)
        save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), name)
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(CONFIGS / "digits/cd.yaml"), "--trainer.default_root_dir=run", option])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "Traceback" not in said and all(word in said for word in words), said
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "--model.init_args.space.conditioner.init_args.path=runs/captions/clip/export",
            ["model.teacher reads 'prompt_embeds' of width 12", "model.space.conditioner makes width 64", "text encoder"],
        ),
        ("--model.init_args.space.codec=IdentityCodec", ["model.teacher works on samples of shape (4, None, None)", "(3, 16"]),
        (
            "--model.init_args.teacher.init_args.network=FluxTransformer2DModel",
            ["network='FluxTransformer2DModel' contradicts", "'UNet2DConditionModel'", "of that family"],
        ),
    ],
)
def test_parts_of_other_families_are_named(
    option: str, words: list[str], folder: Path, standins: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("runs/tiny").symlink_to(standins)
    Path("runs/captions").symlink_to(standins / "captions")
    recipe = CONFIGS / "sd15/lcm_lora.yaml"
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(recipe), "--config", str(OVERRIDES[recipe]), "--trainer.default_root_dir=run", option])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2 and "Traceback" not in said and all(word in said for word in words), said
    assert not Path("run").exists()


def start(run: str, *more: str) -> subprocess.Popen:
    """A fit of the latent-consistency recipe (student, average, target average) in a process of its own."""
    command = [sys.executable, "-m", "distill", "fit", "--config", str(CONFIGS / "digits/lcm.yaml"), "--ckpt_path=last"]
    options = [f"--trainer.default_root_dir={run}", "--trainer.max_steps=30", "--checkpoint.every_n_steps=3", *QUICK, *more]
    return subprocess.Popen([*command, *options], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(folder: Path) -> None:
    whole = start("whole")
    cut = start("cut")
    rows = Path("cut/csv/metrics.csv")
    newest = Path("cut/checkpoints/last.ckpt")
    wanted = random.SystemRandom().randrange(3, 27)
    while cut.poll() is None and not (newest.is_file() and read_checkpoint(newest)["global_step"] >= wanted):
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    assert cut.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert read_checkpoint(newest)["global_step"] < 30
    assert start("cut").wait() == 0 and whole.wait() == 0
    expected, found = read_checkpoint("whole/checkpoints/last.ckpt"), read_checkpoint(newest)
    assert found["global_step"] == expected["global_step"] == 30
    for key in ("state_dict", "optimizer_states", "distill", "DigitsDataModule"):
        assert same(expected[key], found[key]), f"{key} differs after a kill at step {wanted} or later"
    assert rows.is_file() and len(json.loads(Path("cut/environment.json").read_text())) == 2
