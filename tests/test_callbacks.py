"""What runs beside training: random states, sample grids, loggers, the record of a run; and a resumed run is the same run."""

from __future__ import annotations

import csv
import json
import random
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from tiny import TinyNetwork
from tiny_run import write_recipe

from distill import cli
from distill.callbacks import random_state, run_record
from distill.callbacks.loggers import ContinuedCSVLogger
from distill.callbacks.random_state import RandomState
from distill.callbacks.sample_grid import SampleGrid, draw_grid, save_grid
from distill.callbacks.step_progress import StepProgressBar
from distill.checkpoints import read_checkpoint
from distill.denoiser import NetworkDenoiser
from distill.few_step import FewStepSampler
from distill.grids import UniformGrid
from distill.piecewise import PiecewiseSampler
from distill.samplers import RenoiseSampler, Sampler
from distill.schedules import RectifiedFlow
from distill.types import Batch

CPU = torch.device("cpu")
MODULE = LightningModule()


class FakeTrainer(SimpleNamespace):
    """As much of a Trainer as a callback looks at, and a Trainer to whoever asks."""

    __class__ = Trainer  # type: ignore[assignment]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------------- random state


def draws() -> tuple[float, float, float, float]:
    return random.gauss(0, 1), random.random(), float(numpy.random.randn()), float(torch.randn(()))


def test_a_state_survives_a_weights_only_file(tmp_path):
    draws()  # leaves half a pair of normal numbers behind in python and numpy
    state = random_state.collect(CPU)
    expected = [draws() for _ in range(3)]
    torch.save({"state_dict": {}, random_state.KEY: [state]}, tmp_path / "last.ckpt")
    random_state.restore(read_checkpoint(tmp_path / "last.ckpt")[random_state.KEY][0], CPU)
    assert [draws() for _ in range(3)] == expected


def trainer_of(rank: int, world_size: int) -> FakeTrainer:
    return FakeTrainer(global_rank=rank, world_size=world_size, strategy=SimpleNamespace(root_device=CPU))


def test_each_rank_gets_its_own_state_when_training_starts(monkeypatch):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(random_state.collect(CPU))
    expected = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected.append(draws()[3])

    def gather(into, mine):
        into[:] = states

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    checkpoint: dict = {}
    RandomState().on_save_checkpoint(trainer_of(0, 2), MODULE, checkpoint)
    for rank in (0, 1):
        callback = RandomState()
        callback.on_load_checkpoint(trainer_of(rank, 2), MODULE, checkpoint)
        torch.manual_seed(99)
        callback.on_train_start(trainer_of(rank, 2), MODULE)
        assert draws()[3] == expected[rank]


def test_another_number_of_ranks_is_said_and_nothing_restored(caplog):
    callback, checkpoint = RandomState(), {}
    callback.on_save_checkpoint(trainer_of(0, 1), MODULE, checkpoint)
    callback.on_load_checkpoint(trainer_of(1, 4), MODULE, checkpoint)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with caplog.at_level("INFO"):
        callback.on_train_start(trainer_of(1, 4), MODULE)
    assert torch.equal(torch.get_rng_state(), before)
    assert [r.message for r in caplog.records if "holds 1 ranks, this run has 4" in r.message]


# ---------------------------------------------------------------------------------------------------------- whole runs


def states(run) -> dict:
    content = read_checkpoint(run / "checkpoints/last.ckpt")
    return {
        "weights": content["state_dict"],
        "optimizers": content["optimizer_states"],
        "random": content[random_state.KEY],
        "step": content["global_step"],
    }


def assert_same(first, second, where="") -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def draws_too_before(hook):
    """The hook of a careless callback, which draws from the global generators in validation."""

    def careless(*arguments):
        draws()
        hook(*arguments)

    return careless


def rows_but_speed(run) -> list[dict[str, str]]:
    """The rows of the log, in order, without what depends on the machine."""
    rows = csv.DictReader((run / "csv/metrics.csv").open())
    return [{key: value for key, value in row.items() if not key.startswith("throughput/")} for row in rows]


@pytest.mark.parametrize("cut", [3, 5, 8])
def test_a_run_that_was_cut_resumes_as_if_never_cut(in_folder, cut, monkeypatch):
    """Cut at a plain step, at one with a validation, and at the end of an epoch: the same bits, rows and pictures."""
    recipe = str(write_recipe(in_folder))
    words = ["fit", "--config", recipe, "--checkpoint.every_n_steps=1"]

    class Cut(Exception):
        pass

    def stops(self, trainer, *_):
        if trainer.global_step == cut:
            raise Cut

    monkeypatch.setattr(SampleGrid, "on_validation_end", draws_too_before(SampleGrid.on_validation_end))
    cli.main([*words, "--trainer.default_root_dir=whole"])
    with monkeypatch.context() as patch:
        patch.setattr(RandomState, "on_train_batch_start", stops)
        with pytest.raises(Cut):
            cli.main([*words, "--trainer.default_root_dir=cut"])
    assert read_checkpoint(in_folder / "cut/checkpoints/last.ckpt")["global_step"] == cut
    torch.randn(7), random.random()
    cli.main([*words, "--trainer.default_root_dir=cut", "--ckpt_path=last"])
    assert_same(states(in_folder / "whole"), states(in_folder / "cut"))
    assert rows_but_speed(in_folder / "whole") == rows_but_speed(in_folder / "cut")
    for picture in ("step_00000005.png", "step_00000010.png"):
        first, second = ((in_folder / run / "samples" / picture).read_bytes() for run in ("whole", "cut"))
        assert first == second


def test_a_longer_budget_continues_a_finished_run_in_the_middle_of_its_epoch(in_folder):
    words = ["fit", "--config", str(write_recipe(in_folder)), "--ckpt_path=last"]
    cli.main([*words, "--trainer.default_root_dir=whole"])
    cli.main([*words, "--trainer.default_root_dir=longer", "--trainer.max_steps=6"])
    cli.main([*words, "--trainer.default_root_dir=longer"])
    assert_same(states(in_folder / "whole"), states(in_folder / "longer"))


# -------------------------------------------------------------------------------------------------------- sample grids


def test_a_grid_shows_each_sample_in_its_place(tmp_path):
    """Four samples of one level each, two a line: the middles of the tiles have these levels, the labels are above."""
    levels = torch.tensor([-1.0, 1.0, 0.0, -0.5])
    samples = levels.view(4, 1, 1, 1).expand(4, 1, 8, 8)
    save_grid({"steps: 1": samples, "teacher": -samples}, tmp_path / "samples" / "grid.png", columns=2)
    picture = numpy.array(Image.open(tmp_path / "samples" / "grid.png"))
    height = picture.shape[0] // 2
    for block, sign in enumerate((1, -1)):
        corner = block * height + 14 + 2 + 16
        middles = [picture[corner + 34 * (i // 2), 18 + 34 * (i % 2)] for i in range(4)]
        assert [int(m[0]) for m in middles] == [round(float(sign * v + 1) / 2 * 255) for v in levels]
        assert (picture[block * height : block * height + 14] < 128).any()


def test_large_samples_keep_their_size_and_latents_show_their_first_channel():
    assert draw_grid({"a": torch.zeros(2, 3, 40, 40)}, 2).size == (2 * 42 + 2, 42 + 2 + 14)
    latents = torch.full((1, 4, 32, 32), -1.0)
    latents[:, 0] = 1
    assert draw_grid({"a": latents}, 1).getpixel((17, 31)) == (255, 255, 255)


class FakeMethod:
    """Draws the level (steps + index) / 100 for the student, and counts what is drawn."""

    def __init__(self, has_teacher: bool):
        self.has_teacher, self.device, self.drawn = has_teacher, CPU, []
        self.evaluation = SimpleNamespace(steps=[1, 4], teacher_steps=32, seed=7)
        self.student_sampler: Sampler = FewStepSampler(sigmas=[2.0, 1.0])

    def prepare(self, batch):
        return batch

    def draw_pixels(self, steps, indices, ready, source):
        self.drawn.append((source, steps, list(indices), ready.cond["labels"].tolist()))
        return torch.zeros(len(indices), 1, 8, 8)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_same_seeds_for_student_and_teacher_and_the_teacher_once(has_teacher):
    method, callback = FakeMethod(has_teacher), SampleGrid(lines=2)
    examples = {"examples": lambda count: Batch(None, {"labels": torch.arange(count) % 3}, {})}
    trainer = FakeTrainer(datamodule=SimpleNamespace(**examples))
    blocks = [callback.blocks(trainer, method, 3) for _ in range(2)]
    teacher = ["teacher, steps: 32"] if has_teacher else []
    students = [("ema", 1), ("ema", 2), ("ema", 4)]
    assert [list(block) for block in blocks] == [[f"student, steps: {steps}" for _, steps in students] + teacher] * 2
    drawn = [*students, *([("teacher", 32)] if has_teacher else []), *students]
    assert [(source, steps) for source, steps, *_ in method.drawn] == drawn
    assert all(rest == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]] for _, _, *rest in method.drawn)


@pytest.mark.parametrize(
    "sampler, taken",
    [
        (FewStepSampler(sigmas=[2.0, 1.0]), [1, 2]),
        (PiecewiseSampler(4), [4, 8]),
        (RenoiseSampler(UniformGrid(), {2: [0.9, 0.4]}), [1, 2, 4, 8]),
    ],
    ids=["at most", "at least", "any"],
)
def test_steps_are_compared_that_the_sampler_does_not_refuse(sampler, taken):
    denoiser, drawn = NetworkDenoiser(TinyNetwork(), RectifiedFlow()).eval(), []
    for steps in (1, 2, 4, 8):
        with suppress(ValueError):
            drawn.append((steps, sampler(denoiser, torch.zeros(1, 1, 8, 8), {"labels": torch.zeros(1).long()}, steps))[0])
    method = FakeMethod(False)
    method.student_sampler, method.evaluation.steps = sampler, [3]
    trainer = FakeTrainer(datamodule=SimpleNamespace(examples=lambda count: Batch(None, {"labels": torch.zeros(count)}, {})))
    assert list(SampleGrid(lines=1).blocks(trainer, method, 1)) == [f"student, steps: {n}" for n in sorted([*drawn, 3])]
    assert drawn == taken


# -------------------------------------------------------------------------------------------- loggers, progress, record


def logged(folder, *rows: tuple[int, dict]) -> list[dict]:
    logger = ContinuedCSVLogger(folder)
    for step, figures in rows:
        logger.log_metrics(figures, step)  # and no `save` or `finalize`: a kill leaves no time for them
    return list(csv.DictReader((folder / "csv" / "metrics.csv").open()))


def test_rows_are_there_at_once_and_a_second_start_adds_to_them(tmp_path):
    assert logged(tmp_path, (0, {"b": 1.0}), (1, {"b": 2.0})) == [{"b": "1.0", "step": "0"}, {"b": "2.0", "step": "1"}]
    rows = logged(tmp_path, (2, {"b": 3.0}), (3, {"a": 4.0}))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["b"] == "1.0" and rows[3] == {"a": "4.0", "b": "", "step": "3"}


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    logged(tmp_path, (0, {"b": 1.0}), (1, {"b": 2.0}))
    path = tmp_path / "csv" / "metrics.csv"
    path.write_text(path.read_text() + "3.")
    assert [row["step"] for row in logged(tmp_path, (2, {"b": 3.0}))] == ["0", "1", "2"]


def test_the_bar_counts_steps_of_the_whole_run():
    bar = StepProgressBar(refresh_rate=5)
    bar.get_metrics = lambda *_: {}  # type: ignore[method-assign]
    trainer = FakeTrainer(max_steps=12, global_step=2)
    bar._trainer = trainer
    bar.disable = lambda: None  # type: ignore[method-assign]
    bar.on_train_start(trainer, MODULE)
    seen = []
    for trainer.global_step in range(3, 13):
        bar.on_train_batch_end(trainer, MODULE, None, None, 0)
        seen.append(bar.train_progress_bar.n)
    assert bar.train_progress_bar.total == 12
    assert seen == [2, 2, 2, 2, 7, 7, 7, 7, 7, 12]


def test_what_was_there_is_kept_under_a_number(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("one", "one", "two", "three"):
        run_record.write_unless_same(path, text)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "config.yaml": "three",
        "config_1.yaml": "one",
        "config_2.yaml": "two",
    }


def test_the_record_names_versions_command_and_revision(tmp_path):
    entry = json.loads(json.dumps(run_record.environment()))
    assert entry["versions"]["pytorch-lightning"] and entry["command"].startswith(sys.executable)
    assert run_record.git_revision(tmp_path) == {"revision": None, "dirty": None}


def test_a_config_that_would_not_give_the_run_back_is_refused(in_folder):
    record = run_record.RunRecord(
        SimpleNamespace(dump=lambda *_, **__: "sampler: Unable to serialize instance <distill.X object at 0x1>"),
        cli.Namespace(sampler=1),
    )
    with pytest.raises(ValueError, match="sampler: its default is a distill.X"):
        record.resolved_config()
