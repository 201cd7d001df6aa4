"""The command line: what is wrong with a config is said in one line before any work; runs keep to their folder and resume."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import process, write_recipe

from distill import cli


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["distill"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path):
    return str(write_recipe(tmp_path))


def refused(capsys, *words: str) -> str:
    """The one line that the command line ends with."""
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 2
    assert time.monotonic() - start < 5
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


WRONG = [
    # arguments, key, value or name, remedy
    (["--model.lrr=3"], "model.lrr", "no such key", "known: .*null_probability"),
    (["--model.init_args.null_probabilty=3"], "model.null_probabilty", "no such key", "did you mean null_probability"),
    (["--trainer.max_stepz=3"], "trainer.max_stepz", "no such key", "did you mean max_steps"),
    (["--trainer.max_step=3"], "trainer.max_step:", "no such key", "did you mean max_steps"),
    (["--checkpoint.every=3"], "checkpoint.every:", "no such key", "did you mean every_n_steps"),
    (["--modell=3"], "modell", "no such key", "did you mean model"),
    (["--model.optimization.gradient_clip=2"], "model.optimization.gradient_clip:", "no such", "mean gradient_clip_norm"),
    (["--model.student.schedule.shiftt=7"], "model.student.schedule.shiftt", "no such key", "did you mean shift"),
    (["--model.student.network.num_blockz=7"], "model.student.network.num_blockz", "no such key", "known: channels"),
    (["--model=ConsistencyDistilation"], "model=", "ConsistencyDistilation", "known: .*DenoisingTraining"),
    (["--model=distill.Nothing"], "model=", "distill.Nothing", "known: .*DenoisingTraining"),
    (["--model=torch.nn.Linear"], "model=", "torch.nn.Linear", "known: .*DenoisingTraining"),
    (["--data=tiny.TinyDate"], "data=", "tiny.TinyDate", "did you mean TinyData"),
    (["--model.student.schedule=RectifiedFlo"], "model.student.schedule=", "RectifiedFlo", "did you mean RectifiedFlow"),
    (["--model.evaluation.sampler=RenoiseSample"], "model.evaluation.sampler=", "RenoiseSample", "mean RenoiseSampler"),
    (["--model.student.prediction=velocity"], "model.student.prediction=", "velocity", "one of 'x0', 'eps', 'v'"),
    (["--model.null_probability=abc"], "model.null_probability=", "abc", "give float"),
    (["--model.null_probability=1.5"], "model.null_probability=", "1.5", r"give a share in \[0, 1\)"),
    (["--model.optimization.averaging.value=2"], "model.optimization.averaging.value=", "2", "give a decay"),
    (["--model.optimization.gradient_clip_norm=-2"], "model.optimization.gradient_clip_norm=", "-2", "positive norm"),
    (["--model.student=PretrainedDenoiser", "--model.student.path=/none"], "model.student.path=", "/none", "give a diff"),
    (["--data.rows=0"], "data.rows=", "0", "give a positive number"),
    (["--data.num_classes=7"], "model.student", "7", "as many classes as the data"),
    (["--model.student.network.channels=3"], "model.student", r"\(3, 8, 8\)", "give a student of the data's shape"),
    (["--trainer.max_steps=ten"], "trainer.max_steps=", "ten", "give int"),
    (["--trainer.max_steps=-5"], "trainer.max_steps=", "-5", "positive number"),
    (["--trainer.max_steps=0"], "trainer.max_steps=", "0", "positive number"),
    (["--trainer.max_steps=-1"], "trainer.max_steps=", "-1", "state it in the recipe"),
    (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val=", "1", "set model.optimization.gradient_clip_norm"),
    (["--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=", "2", "optimization.accumulate_batches"),
    (["--trainer.precision=16-mixed"], "trainer.precision=", "16-mixed", "use bf16-mixed"),
    (["--trainer.precision=bf16-true"], "trainer.precision=", "bf16-true", "use bf16-mixed"),
    (["--trainer.strategy=fsdp"], "trainer.strategy=", "fsdp", "use fsdp2"),
    (["--trainer.precision=17"], "trainer.precision=", "17", "'bf16-mixed'"),
    (["--trainer.accelerator=abacus"], "trainer: .*accelerator", "abacus", "Available names are"),
    (["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps=", "0", "must be positive"),
    (["--checkpoint.every_n_steps=0"], "checkpoint.every_n_steps=", "0", "give a positive number"),
    (["--checkpoint.mode=least"], "checkpoint.mode=", "least", "give 'min'"),
    (["--sample_grid.lines=0"], "sample_grid.lines=", "0", "give a positive number"),
    (["--sample_grid.comparison_steps=[1,0]"], "sample_grid.comparison_steps=", "0", "give a positive number"),
    (["--throughput.peak_tflops=0"], "throughput.peak_tflops=", "0", "give a positive number"),
    (["--seed_everything=x"], "seed_everything=", "x", "give bool or int"),
    (["--ckpt_path=/none.ckpt"], "ckpt_path=", "/none.ckpt", "there are: none"),
    (["--ckpt_path=best"], "ckpt_path=", "best", "there are: none"),
    (["--config=/none.yaml"], "config", "/none.yaml", "--print_config"),
]


@pytest.mark.parametrize("words, key, value, remedy", WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_config_is_refused_in_one_line(capsys, recipe, tmp_path, words, key, value, remedy):
    line = refused(capsys, "fit", "--config", recipe, *words)
    for wanted in (key, value, remedy):
        assert re.search(wanted, line), f"{wanted!r} is not in {line!r}"
    assert not (tmp_path / "runs").exists()


WRONG_FILES = [
    ("trainer:\n  max_stepz: 3\n", "trainer.max_stepz", "did you mean max_steps"),
    ("modell:\n  class_path: DenoisingTraining\n", "modell", "did you mean model"),
    ("model:\n  init_args:\n    null_probability: ten\n", "model.null_probability=ten", "give float"),
    ("model:\n  init_args:\n    student:\n      init_args:\n        schedule: Rect\n", "schedule=Rect", "RectifiedFlow"),
    ("model:\n  init_args:\n    null_probability: ${data.init_args.share}\n", "null_probability", "data.init_args.share"),
    ("model:\n  class_path: [oops\n", "line 2", "--print_config"),
]


@pytest.mark.parametrize("text, key, remedy", WRONG_FILES)
def test_wrong_file_is_refused_in_one_line(capsys, recipe, tmp_path, text, key, remedy):
    (tmp_path / "wrong.yaml").write_text(text)
    line = refused(capsys, "fit", "--config", recipe, "--config", str(tmp_path / "wrong.yaml"))
    assert key in line and remedy in line


def test_missing_parts_are_named(capsys, tmp_path):
    assert "fit.data, fit.model: required" in refused(capsys, "fit")
    (tmp_path / "short.yaml").write_text("model: DenoisingTraining\ndata: tiny.TinyData\n")
    assert "model.student, model.times: required" in refused(capsys, "fit", "--config", str(tmp_path / "short.yaml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the tiny recipe was run, in its own process and under its own name."""
    folder = tmp_path_factory.mktemp("finished")
    child = process("fit", "--config", str(write_recipe(folder)), "--checkpoint.monitor=train/student/loss", folder=folder)
    errors = child.communicate(timeout=120)[1]
    assert child.returncode == 0, errors
    return folder


def test_run_folder_holds_everything_under_the_name_of_the_recipe(finished):
    run = finished / "runs" / "tiny" / "cd"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "csv/metrics.csv"} <= names
    assert {"checkpoints/last.ckpt", "checkpoints/best.ckpt", "checkpoints/step_00000012.ckpt"} <= names
    assert {"samples/step_00000005.png", "samples/step_00000010.png"} <= names
    assert any(name.startswith("tensorboard/events.out") for name in names)
    assert not any("version_" in name or "partial" in name for name in names)
    steps = [int(row["step"]) for row in csv.DictReader((run / "csv/metrics.csv").open())]
    assert steps == list(range(12))


def test_a_run_is_not_overwritten(capsys, finished, monkeypatch):
    monkeypatch.chdir(finished)
    line = refused(capsys, "fit", "--config", str(finished / "configs/tiny/cd.yaml"))
    assert "trainer.default_root_dir=runs/tiny/cd" in line
    assert "--ckpt_path last" in line and "--trainer.default_root_dir=" in line


def test_a_finished_run_ends_at_once_and_a_longer_one_continues(finished, monkeypatch, tmp_path):
    monkeypatch.chdir(finished)
    recipe, run = str(finished / "configs/tiny/cd.yaml"), finished / "runs" / "tiny" / "cd"
    words = ["fit", "--config", recipe, "--ckpt_path", "last", "--checkpoint.monitor=train/student/loss"]
    before = (run / "checkpoints/last.ckpt").read_bytes()
    cli.main(words)
    assert (run / "checkpoints/last.ckpt").read_bytes() == before
    assert not list(run.glob("config_*.yaml"))
    cli.main([*words, "--trainer.max_steps=14"])
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 14
    steps = [int(row["step"]) for row in csv.DictReader((run / "csv/metrics.csv").open())]
    assert steps == list(range(14))
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 14
    assert yaml.safe_load((run / "config_1.yaml").read_text())["trainer"]["max_steps"] == 12
    starts = json.loads((run / "environment.json").read_text())
    assert len(starts) == 3 and starts[0]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_resolved_config_gives_the_same_run_and_load_run_the_trained_method(recipe, tmp_path, capsys):
    cli.main(["fit", "--config", recipe, "--ckpt_path", "last"])
    cli.main(["fit", "--config", "runs/tiny/cd/config.yaml", "--trainer.default_root_dir", "again"])
    first, second = (cli.load_run(folder)[1].state_dict() for folder in ("runs/tiny/cd", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    config, method, data = cli.load_run("again")
    assert config["trainer"]["max_steps"] == 12 and data.spec.shape == (1, 8, 8) and not method.training
    saved = torch.load("again/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in method.state_dict().items())
    for command in ("validate", "test"):
        cli.main([command, "--config", "again/config.yaml", "--ckpt_path", "last"])


def test_load_run_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.yaml"):
        cli.load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(FileNotFoundError, match="best"):
        cli.load_run(tmp_path, "best")


def test_load_run_refuses_a_checkpoint_that_lacks_a_key(recipe):
    cli.main(["fit", "--config", recipe])
    path = Path("runs/tiny/cd/checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["ema.module.network.convolution.weight"]
    torch.save(content, path)
    with pytest.raises(RuntimeError, match="ema.module.network.convolution.weight"):
        cli.load_run("runs/tiny/cd")


def test_seed_is_set_before_the_model_is_built(recipe):
    def first_weights(*words: str) -> torch.Tensor:
        built = cli.DistillCLI(["--config", recipe, *words], run=False)
        return built.model.student.network.convolution.weight.detach().clone()

    torch.manual_seed(5)
    one = first_weights()
    torch.manual_seed(6)
    assert torch.equal(one, first_weights())
    assert not torch.equal(one, first_weights("--seed_everything=1"))


def test_interpolation_reaches_across_files_and_the_command_line_has_the_last_word(recipe, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("checkpoint:\n  every_n_steps: ${trainer.max_steps}\n")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", recipe, "--config", "more.yaml", "--trainer.max_steps=77", "--print_config"])
    printed = capsys.readouterr().out
    assert "max_steps: 77" in printed and "use_distributed_sampler: false" in printed


@pytest.mark.parametrize(
    "file, folder",
    [("configs/digits/cd.yaml", "runs/digits/cd"), ("configs/a/b/cd.yaml", "runs/a/b/cd"), ("some/mine/x.yaml", "runs/mine/x")],
)
def test_run_folder_is_named_by_the_first_config(file, folder):
    assert cli.run_folder(cli.Namespace(config=[file, "configs/other/site.yaml"])) == folder


HEAVY = "diffusers transformers sklearn scipy matplotlib lpips tensorboard torchvision torch._dynamo".split()
PROBE = """
import sys, torch, pytorch_lightning
before = set(sys.modules)
import distill.cli
for words in (["--help"], ["fit", "--help"], ["fit", "--config", sys.argv[1], "--print_config"]):
    sys.argv = ["distill", *words]
    try:
        distill.cli.main()
    except SystemExit as end:
        assert end.code == 0, end.code
print("LOADED", *sorted(set(sys.modules) - before))
"""


def test_help_and_print_config_import_nothing_heavy(recipe, tmp_path):
    """Lightning itself (through torchmetrics) imports some of these: what counts is what this package adds."""
    child = process(PROBE, recipe, folder=tmp_path, program=("-c",))
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert "max_steps: 12" in output
    loaded = output.split("LOADED")[-1].split()
    assert "distill.methods.base" in loaded
    assert not [module for module in loaded for heavy in HEAVY if module == heavy or module.startswith(heavy + ".")]


def test_real_processes_exit_with_2_and_no_traceback(recipe, tmp_path):
    """Once while parsing, once when a part is built."""
    children = [
        process("fit", "--config", recipe, word, folder=tmp_path)
        for word in ("--trainer.max_stepz=3", "--data.rows=0")
    ]
    for child in children:
        output, errors = child.communicate(timeout=120)
        assert child.returncode == 2 and "Traceback" not in output + errors
        assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:]


def test_works_from_any_folder():
    child = process("fit", "--print_config", folder=Path("/"))
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 0 and "check_val_every_n_epoch: null" in output and "every_n_steps: 500" in output
