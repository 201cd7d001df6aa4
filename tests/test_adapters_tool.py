"""tools/adapters.py: the file is the run's student, the figures are those of `squared_errors`, nothing is half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from guided_run import train, write_teacher
from script import load_script

from distill import adapter_files
from distill.adapter_files import additions, load_adapters
from distill.cli import load_run
from distill.guidance_error import squared_errors
from distill.pretrained import PretrainedDenoiser
from distill.types import label_conditions

SCALES = [1.5, 4.0]
tool = load_script("adapters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its sibling of other weights, one of another size, and runs on the first: of an adapter, of a whole copy."""
    root = tmp_path_factory.mktemp("work")
    for name, seed, channels in (("teacher", 0, (8, 16)), ("sibling", 1, (8, 16)), ("wide", 0, (8, 24))):
        write_teacher(root / name, seed, channels)
    adapter = {"class_path": "AttentionGuidance", "init_args": {"width": 8}}
    train(root / "agd", root / "teacher", guidance_range=[1.0, 5.0], adapter=adapter)
    train(root / "meng", root / "teacher", guidance_range=[1.0, 5.0])
    return root


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    """The method and the data of the run of an adapter."""
    return load_run(folder / "agd")[1:]


def call(denoiser: Any) -> torch.Tensor:
    """x0 of four samples at four scales."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {**label_conditions(torch.arange(4), 10)[0], "guidance": torch.tensor([1.0, 2.0, 3.0, 5.0])}
    with torch.no_grad():
        return denoiser(x, torch.tensor([0.2, 0.4, 0.6, 0.8]), cond)


def write(folder: Path, out: Path, *more: object) -> None:
    tool.main(["--run", str(folder / "agd"), "--out", str(out), *map(str, more)])


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_the_file_gives_the_runs_student_to_the_bit(weights: str, folder: Path, run: Any, tmp_path: Path, capsys) -> None:
    write(folder, tmp_path / "new/agd.safetensors", "--weights", weights)
    method, _ = run
    trained = method.ema.module if weights == "ema" else method.student
    read = PretrainedDenoiser(str(folder / "teacher")).requires_grad_(False)
    unguided = call(read)
    load_adapters(read, tmp_path / "new/agd.safetensors")
    before, after = additions(trained.network), additions(read.network)
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(call(read.eval()), call(trained)) and (call(read) - unguided).abs().max() > 1e-4
    assert not torch.equal(call(method.ema.module), call(method.student))
    numbers = sum(value.numel() for value in before.values())
    base = sum(value.numel() for value in method.teacher.network.state_dict().values())
    said = f"{tmp_path / 'new/agd.safetensors'}: {numbers} numbers, {numbers / base:.2%} of the base\n"
    assert capsys.readouterr().out.endswith(said)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["agd.safetensors"]
    (tmp_path / "any").touch()
    assert (tmp_path / "new/agd.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_figures_on_the_runs_own_teacher_and_on_a_sibling(folder: Path, run: Any, tmp_path: Path, capsys) -> None:
    teachers = [str(folder / name) for name in ("teacher", "sibling")]
    write(folder, tmp_path / "agd.safetensors", "--scales", *SCALES, "--teachers", *teachers)
    found = json.loads(capsys.readouterr().out.partition("of the base\n")[2])
    assert list(found) == teachers and all(list(found[name]) == ["1.5", "4"] for name in teachers)
    method, data = run
    for name in teachers:
        teacher, student = (PretrainedDenoiser(name).eval() for _ in range(2))
        load_adapters(student, tmp_path / "agd.safetensors")
        for kind, denoiser in (("without", teacher), ("with", student.eval())):
            sums = squared_errors(denoiser, teacher, data.val_dataloader(), SCALES, None, method.evaluation.seed)
            errors = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
            assert [found[name][scale][kind] for scale in ("1.5", "4")] == pytest.approx(errors, rel=1e-6)
        # Unguided, a teacher is (scale - 1) times the same difference away.
        assert found[name]["4"]["without"] > 3 * found[name]["1.5"]["without"] > 0
        assert found[name]["4"]["with"] != pytest.approx(found[name]["4"]["without"], rel=1e-4)
    assert found[teachers[0]] != found[teachers[1]]


def test_another_architecture_is_named_and_the_file_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "agd.safetensors"
    with pytest.raises(SystemExit) as stopped:
        write(folder, out, "--teachers", folder / "wide")
    said = str(stopped.value)
    assert said.startswith("error: ") and "\n" not in said
    assert "config.block_out_channels=[8, 16]" in said and "config.block_out_channels=[8, 24]" in said
    assert list(tmp_path.iterdir()) == [out]
    load_adapters(PretrainedDenoiser(str(folder / "teacher")), out)


def test_a_run_of_a_whole_network_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its scalar input alone, without the weights that were trained with it, would be another student."""
    with pytest.raises(SystemExit, match="meng: its GuidanceDistillation trains a network of its own"):
        tool.main(["--run", str(folder / "meng"), "--out", str(tmp_path / "meng.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_the_one_before(folder: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "agd.safetensors"
    write(folder, out)
    before = out.read_bytes()

    def breaks(denoiser: Any, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "save_adapters", breaks)
    with pytest.raises(SystemExit, match="No space left on device.*the file that was there before is intact"):
        write(folder, out)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    with pytest.raises(SystemExit, match="error: nowhere holds no config.yaml"):
        tool.main(["--run", "nowhere", "--out", str(out)])
