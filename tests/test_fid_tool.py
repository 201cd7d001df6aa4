"""tools/fid.py: its figures are those of training, its record is enough to compare by, and its refusals are one line each."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from script import load_script

from distill.metrics import DigitsAccuracy, FrechetDistance, PixelFeatures, to_uint8
from distill.metrics.digits import real_digits

fid = load_script("fid")

IMAGES, LABELS = real_digits()


def save(path: Path, images: numpy.ndarray | None = None, labels: numpy.ndarray | None = None) -> Path:
    arrays = {"arr_0": images, "arr_1": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def measure(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    fid.main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out)


def test_equals_the_metrics_of_training(tmp_path, capsys):
    samples = torch.tanh(torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2)
    real = torch.from_numpy(IMAGES / 127.5 - 1).float().permute(0, 3, 1, 2)
    cond = {"labels": torch.arange(200) % 10}
    metrics = {"distance": FrechetDistance(), "accuracy": DigitsAccuracy()}
    for metric in metrics.values():
        metric.update(samples, real, cond)
    path = save(tmp_path / "a.npz", to_uint8(samples).permute(0, 2, 3, 1).numpy(), cond["labels"].numpy())
    result = measure(capsys, "--samples", path, "--reference", "digits")
    assert result["distance"] == pytest.approx(float(metrics["distance"].compute()), rel=1e-9)
    assert result["accuracy"] == pytest.approx(float(metrics["accuracy"].compute()), rel=1e-6) and 0 < result["accuracy"] < 0.5


def test_record_says_all_that_is_needed_to_compare(tmp_path, capsys):
    settings = {"seed": 3, "steps": 2, "guidance": 1.5, "sampler": "RenoiseSampler", "run": "runs/digits/cd"}
    save(tmp_path / "run" / "samples.npz", IMAGES[:100], LABELS[:100])
    (tmp_path / "run" / "samples.json").write_text(json.dumps(settings))
    out = tmp_path / "new" / "fid.json"
    result = measure(capsys, "--samples", tmp_path / "run", "--reference", "digits", "--features", "pixels", "--out", out)
    assert json.loads(out.read_text()) == result
    assert result["samples"]["settings"] == settings and result["samples"]["count"] == 100
    assert result["samples"]["sha256"] == hashlib.sha256(IMAGES[:100].tobytes()).hexdigest()
    assert result["reference"]["count"] == 1797
    assert result["reference"]["sha256"] == hashlib.sha256(IMAGES.tobytes()).hexdigest()
    assert result["features"]["name"] == "pixels" and result["features"]["hash"] == PixelFeatures().hash
    assert result["versions"].keys() == {"distill", "torch", "numpy", "scikit-learn"}
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] and result["distance"] > 0


def test_equal_sets_are_at_zero_and_others_are_not(tmp_path, capsys):
    halves = save(tmp_path / "a.npz", IMAGES[::2]), save(tmp_path / "b.npz", IMAGES[1::2])
    assert measure(capsys, "--samples", halves[0], "--reference", halves[0])["distance"] < 1e-9
    assert measure(capsys, "--samples", halves[0], "--reference", halves[1])["distance"] > 0.01


def test_accuracy_only_of_labelled_digits(tmp_path, capsys):
    plain, colour = save(tmp_path / "a.npz", IMAGES[:50]), save(tmp_path / "b.npz", IMAGES[:50].repeat(3, -1), LABELS[:50])
    for path in (plain, colour):
        assert "accuracy" not in measure(capsys, "--samples", path, "--reference", path)


def test_images_are_read_in_the_order_of_their_axes(tmp_path, capsys):
    """Wide colour images against themselves with two pixels exchanged: the distance of the pixels, axis by axis."""
    images = numpy.random.default_rng(0).integers(0, 256, (40, 2, 5, 3), dtype=numpy.uint8)
    other = images.copy()
    other[:, 1, 4, 2] = 255 - other[:, 1, 4, 2]
    paths = save(tmp_path / "a.npz", images), save(tmp_path / "b.npz", other)
    first, second = (fid.statistics(array, PixelFeatures()) for array in (images, other))
    by_hand = images.reshape(40, -1) / 255
    assert sorted(first.mean.tolist()) == pytest.approx(sorted(by_hand.mean(0)))
    place = 2 * 10 + 1 * 5 + 4  # channel 2, row 1, column 4 of (3, 2, 5)
    assert [int(k) for k in torch.nonzero(first.mean != second.mean)] == [place]
    assert measure(capsys, "--samples", paths[0], "--reference", paths[1])["distance"] > 0


def bad_sets(folder: Path) -> None:
    (folder / "garbage.npz").write_bytes(b"PK\x03\x04 no archive")
    (folder / "text.npz").write_text("none")
    (folder / "empty.npz").write_bytes(b"")
    numpy.save(folder / "bare.npy", IMAGES[:5])
    numpy.savez(folder / "pickled.npz", arr_0=numpy.array([{"a": 1}], dtype=object))
    numpy.savez(folder / "other.npz", images=IMAGES[:5])
    cut = save(folder / "whole.npz", IMAGES[:50])
    (folder / "cut.npz").write_bytes(cut.read_bytes()[:1500])
    for name, text in (("broken", "{"), ("listed", "[1]")):
        save(folder / name / "samples.npz", IMAGES[:5])
        (folder / name / "samples.json").write_text(text)
    (folder / "bare_folder").mkdir()
    save(folder / "float.npz", IMAGES[:5] / 255)
    save(folder / "flat.npz", IMAGES[:5, :, :, 0])
    save(folder / "one.npz", IMAGES[:1])
    save(folder / "large.npz", numpy.zeros((5, 9, 8, 1), numpy.uint8))
    save(folder / "labels.npz", IMAGES[:5], LABELS[:4])
    save(folder / "real_labels.npz", IMAGES[:5], LABELS[:5] / 2)


REFUSALS = {
    "absent.npz": "there is no file",
    "bare_folder": "there is no file.*samples.npz",
    "garbage.npz": "no .npz file.*numpy.savez",
    "text.npz": "no .npz file.*numpy.savez",
    "empty.npz": "no .npz file.*numpy.savez",
    "bare.npy": "no .npz file.*numpy.savez",
    "pickled.npz": "no .npz file.*numpy.savez",
    "cut.npz": "no .npz file.*numpy.savez",
    "other.npz": "no arr_0.*numpy.savez",
    "broken": "no JSON.*sample again",
    "listed": "no JSON object.*sample again",
    "float.npz": "arr_0 is float64.*give uint8",
    "flat.npz": r"shape \(5, 8, 8\).*give uint8 images \(n, h, w, c\)",
    "one.npz": "1 images.*at least 2",
    "large.npz": r"\(9, 8, 1\).*\(8, 8, 1\).*one size",
    "labels.npz": r"arr_1 is int64 of shape \(4,\).*one whole number for each of the 5",
    "real_labels.npz": "arr_1 is float64.*whole number",
}


def refusal(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        fid.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_sets_are_refused_in_one_line(name, tmp_path, capsys):
    bad_sets(tmp_path)
    message = refusal(capsys, "--samples", tmp_path / name, "--reference", "digits")
    assert f"--samples {tmp_path / name}: " in message
    assert re.search(REFUSALS[name], message), message


def test_bad_references_and_options_are_refused_in_one_line(tmp_path, capsys):
    sets = ("--samples", "digits", "--reference", "digits")
    assert "--reference nowhere: there is no file" in refusal(capsys, "--samples", "digits", "--reference", "nowhere")
    assert "--features inception: unknown; give one of: pixels" in refusal(capsys, *sets, "--features", "inception")
    assert f"--out {tmp_path}: is a folder" in refusal(capsys, *sets, "--out", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(capsys, *sets, "--out", tmp_path / "file" / "fid.json")
    assert "--reference" in refusal(capsys, "--samples", "digits")
    assert "--feature" in refusal(capsys, *sets, "--feature", "pixels")
