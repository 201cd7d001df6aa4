"""tools/fid.py: its figures are those of training, its record is enough to compare by, and its refusals are one line each."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_features
import torch
from forked import on_processes
from PIL import Image
from script import load_script

from distill.metrics import (
    DigitsAccuracy,
    FrechetDistance,
    PixelFeatures,
    inception_score,
    kernel_distance,
    neighbours,
    to_uint8,
)
from distill.metrics.digits import real_digits
from distill.metrics.extractors import make_extractor
from distill.metrics.features import from_uint8

fid = load_script("fid")

IMAGES, LABELS = real_digits()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Statistics are kept in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "distill" / "statistics"


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
    each = b"".join(hashlib.sha256(image.tobytes()).digest() for image in IMAGES[:100])
    assert result["samples"]["sha256"] == hashlib.sha256(b"[8, 8, 1]" + each).hexdigest()
    assert result["reference"]["count"] == 1797
    assert result["protocol"]["reference"] == result["reference"]["sha256"] != result["samples"]["sha256"]
    assert result["protocol"]["num"] == 100 and result["protocol"]["metrics"] == {"frechet": {}}
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


def png(image: numpy.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


def pictures(folder: Path, images: Any) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / f"{number:04d}.png" if len(images) > 3 else folder / f"{number}.png").write_bytes(png(image))
    return folder


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


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
    save(folder / "nan.npz", numpy.where(IMAGES[:5] == 0, numpy.nan, 1.0))
    save(folder / "channels.npz", numpy.zeros((5, 8, 8, 4), numpy.uint8))
    save(folder / "counted" / "samples.npz", IMAGES[:5])
    (folder / "counted" / "samples.json").write_text('{"num": 6}')
    save(folder / "changed" / "samples.npz", IMAGES[:5])
    (folder / "changed" / "samples.json").write_text('{"num": 5, "sha256": "0000"}')
    pictures(folder / "mixed", [IMAGES[0], numpy.zeros((9, 8, 1), numpy.uint8)])
    pictures(folder / "damaged", IMAGES[:3])
    (folder / "damaged" / "1.png").write_bytes((folder / "damaged" / "1.png").read_bytes()[:60])
    pictures(folder / "run" / "samples", IMAGES[:3])
    (folder / "run" / "config.yaml").touch()
    shard(folder / "texts" / "0.tar", [("a.txt", b"words")])


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
    "nan.npz": "float64 .* and [0-9]+ of its values are not finite: the network has diverged; give uint8",
    "channels.npz": "4 channels; give .* c of 1 or 3",
    "counted": "samples.json says 6 samples and there are 5: .* sample again into an empty folder",
    "changed": "samples.json has the hash of other samples: .* sample again into an empty folder",
    "mixed": r"2 sizes, 8x8 .*0\.png\), 9x8 .*1\.png\); give images of one size",
    "damaged": r"1\.png cannot be read .*write it again, or leave it out",
    "run": "no file .*run/samples.npz.* draw them by tools/sample.py --run .*run --out",
    "texts": "0.tar: sample a holds no picture .*give images",
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
    assert "--features path='no.pt': there is no such file; save https" in refusal(capsys, *sets, "--features", "clean=no.pt")
    assert "--metrics fid: unknown; give some of: frechet, kid" in refusal(capsys, *sets, "--metrics", "fid")
    assert "--kid-subset-size 1: give at least 2" in refusal(capsys, *sets, "--kid-subset-size", 1)
    assert "holds 1797 images, fewer than --num 1798; draw more" in refusal(capsys, *sets, "--num", 1798)
    assert f"--out {tmp_path}: is a folder" in refusal(capsys, *sets, "--out", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(capsys, *sets, "--out", tmp_path / "file" / "fid.json")
    assert "--reference" in refusal(capsys, "--samples", "digits")
    assert "--feature" in refusal(capsys, *sets, "--feature", "pixels")


# ------------------------------------------------------------------------------------------------------------ sources


def test_one_set_in_any_file_is_one_set(tmp_path, capsys):
    """An .npz file, pictures, and shards: the same content hash and the same distance."""
    images = numpy.random.default_rng(0).integers(0, 256, (60, 6, 5, 3), dtype=numpy.uint8)
    reference = save(tmp_path / "reference.npz", images[::-1] // 2)
    for number, start in enumerate((0, 25)):
        part = range(start, 25 if start == 0 else 60)
        content = [(f"{i:04d}.{end}", png(images[i]) if end == "png" else b"text") for i in part for end in ("png", "txt")]
        shard(tmp_path / "shards" / f"{number:05d}.tar", content)
    sets = [save(tmp_path / "a.npz", images), pictures(tmp_path / "pictures", images), tmp_path / "shards"]
    sets.append(tmp_path / "shards" / "{00000..00001}.tar")
    results = [measure(capsys, "--samples", path, "--reference", reference) for path in sets]
    assert len({(result["samples"]["sha256"], result["distance"]) for result in results}) == 1
    assert all(result["samples"]["count"] == 60 for result in results) and results[0]["distance"] > 0.1


def test_grey_pictures_have_one_channel_but_among_coloured_ones_three(tmp_path, capsys):
    grey = pictures(tmp_path / "grey", IMAGES[:40])
    assert measure(capsys, "--samples", grey, "--reference", "digits")["samples"]["shape"] == [8, 8, 1]
    colour = IMAGES[:40].repeat(3, -1)
    colour[0, 0, 0] = (255, 0, 0)
    mixed = pictures(tmp_path / "mixed", [colour[0], *IMAGES[1:40]])
    found = measure(capsys, "--samples", mixed, "--reference", save(tmp_path / "a.npz", colour))
    assert found["samples"]["shape"] == [8, 8, 3] and found["samples"]["sha256"] == found["reference"]["sha256"]
    assert found["distance"] < 1e-9


def test_folder_of_samples_is_found_from_its_run_and_its_grid_is_no_sample(tmp_path, capsys):
    folder = pictures(tmp_path / "run" / "samples", IMAGES[:40])
    (folder / "grid.png").write_bytes(png(numpy.zeros((30, 30, 3), numpy.uint8)))
    (folder / "samples.json").write_text('{"num": 40, "steps": 2}')
    (tmp_path / "run" / "config.yaml").touch()
    found = measure(capsys, "--samples", tmp_path / "run", "--reference", "digits")
    assert found["samples"]["count"] == 40 and found["samples"]["settings"]["steps"] == 2


# ------------------------------------------------------------------------------------------------------------ metrics


def test_every_metric_by_its_name(tmp_path, capsys):
    weights = tiny_features.classifier(tmp_path)
    path = save(tmp_path / "a.npz", IMAGES[:300] // 2)
    names = [metric for metric in fid.METRICS if metric != "clip_score"]  # which tests/test_clip_score.py measures
    settings = ("--kid-subsets", 3, "--kid-subset-size", 50, "--seed", 5, "--kid-convention", "torch-fidelity")
    found = measure(
        capsys, "--samples", path, "--reference", "digits", "--features", weights, *settings, "--num", 200, "--metrics", *names
    )["metrics"]
    features, logits = make_extractor(str(weights)), make_extractor(str(weights), logits=True)
    fake, real = (from_uint8(torch.from_numpy(each).permute(0, 3, 1, 2)) for each in (IMAGES[:200] // 2, IMAGES))
    fakes, reals = features(fake), features(real)
    near, drawn = neighbours(fakes, reals), kernel_distance(fakes, reals, 3, 50, 5, "torch-fidelity")
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name]["value"] == pytest.approx(getattr(near, name), abs=1e-12)
    assert (found["kid"]["value"], found["kid"]["std"]) == pytest.approx(tuple(drawn)[:2], rel=1e-4)
    score = inception_score(logits(fake), 10, 5)
    assert (found["inception_score"]["value"], found["inception_score"]["std"]) == pytest.approx(tuple(score), rel=1e-5)
    assert found["kid"]["settings"] == {"subsets": 3, "subset_size": 50, "seed": 5, "convention": "torch-fidelity"}
    assert found["frechet"]["value"] > 0 and found["precision"]["settings"] == {"k": 3} != found["density"]["settings"]


def every_metric(tmp_path: Path) -> list[str]:
    words: list[Any] = ["--samples", tmp_path / "pictures", "--reference", tmp_path / "b.npz"]
    words += ["--out", tmp_path / "out.json"]
    words += ["--batch-size", 32, "--kid-subsets", 2, "--metrics", *sorted(set(fid.METRICS) - fid.WITHOUT_REFERENCE)]
    return [str(word) for word in words]


def test_three_processes_find_what_one_finds(tmp_path, capsys):
    """Metrics, hashes and counts; one process prints, and a refusal is everyone's."""
    pictures(tmp_path / "pictures", IMAGES[:150]), save(tmp_path / "b.npz", IMAGES[100:300])
    alone = measure(capsys, *every_metric(tmp_path))

    def words() -> str:
        fid.main([*every_metric(tmp_path), "--cache", str(tmp_path / "other cache")])
        return (tmp_path / "out.json").read_text() if os.environ["RANK"] == "0" else ""

    several = json.loads(on_processes(3, tmp_path / "ranks", words)[0])
    for name, figure in several.pop("metrics").items():
        assert figure["value"] == pytest.approx(alone["metrics"][name]["value"], rel=1e-10), name
    assert several["samples"] == alone["samples"] and several["protocol"] == alone["protocol"]

    def refused() -> int:
        with pytest.raises(SystemExit) as ended:
            fid.main([*every_metric(tmp_path), "--num", "151"])
        return ended.value.code

    assert on_processes(2, tmp_path / "two", refused) == [2, 2]


# ---------------------------------------------------------------------------------------------------------- references


def test_statistics_of_a_reference_are_kept_by_its_content(tmp_path, capsys, cache):
    samples, reference = save(tmp_path / "a.npz", IMAGES[:100]), save(tmp_path / "b.npz", IMAGES[100:300])
    first = measure(capsys, "--samples", samples, "--reference", reference)
    (file,) = cache.iterdir()
    moved = pictures(tmp_path / "moved", IMAGES[100:300])
    again = measure(capsys, "--samples", samples, "--reference", moved)
    assert (first["reference"]["kept"], again["reference"]["kept"]) == (False, True)
    assert again["distance"] == first["distance"] and list(cache.iterdir()) == [file]
    changed = IMAGES[100:300].copy()
    changed[7, 3, 3] ^= 1
    other = measure(capsys, "--samples", samples, "--reference", save(tmp_path / "b.npz", changed))
    assert not other["reference"]["kept"] and len(list(cache.iterdir())) == 2
    by_file = measure(capsys, "--samples", samples, "--reference", file)
    assert by_file["distance"] == first["distance"] and by_file["protocol"] == first["protocol"]
    file.write_bytes(file.read_bytes()[:200])
    damaged = measure(capsys, "--samples", samples, "--reference", moved)
    assert damaged["distance"] == first["distance"] and not damaged["reference"]["kept"]


def test_published_statistics_are_compared_with(tmp_path, capsys):
    """clean-fid's form: mu and sigma alone."""
    rows = IMAGES.reshape(len(IMAGES), -1) / 255
    numpy.savez(tmp_path / "stats.npz", mu=rows.mean(0), sigma=numpy.cov(rows, rowvar=False))
    path = save(tmp_path / "a.npz", IMAGES[:100])
    expected = measure(capsys, "--samples", path, "--reference", "digits")
    found = measure(capsys, "--samples", path, "--reference", tmp_path / "stats.npz")
    assert found["distance"] == pytest.approx(expected["distance"], rel=1e-9) and found["reference"]["published"]
    words = ("--samples", path, "--reference", tmp_path / "stats.npz")
    assert "--metrics kid: need each image of" in refusal(capsys, *words, "--metrics", "kid")
    colour = save(tmp_path / "colour.npz", IMAGES[:50].repeat(3, -1))
    assert "has 64 features, the samples 192" in refusal(capsys, "--samples", colour, *words[2:])
    absent = refusal(capsys, "--samples", path, "--reference", "clean-fid:cifar10,32,train")
    name = "cifar10_clean_train_32.npz"
    assert re.search(f"no file .*{name}; save https://.*clean-fid/stats/{name} there", absent)


def test_statistics_of_another_protocol_are_refused(tmp_path, capsys, cache):
    path, weights = save(tmp_path / "a.npz", IMAGES[:100]), tiny_features.classifier(tmp_path)
    measure(capsys, "--samples", path, "--reference", "digits", "--features", weights)
    (file,) = cache.iterdir()
    refused = refusal(capsys, "--samples", path, "--reference", file)
    assert "statistics of another protocol than --features: hidden layer" in refused


def test_figures_of_unequal_protocols_are_not_put_side_by_side(tmp_path, capsys):
    path, one = save(tmp_path / "a.npz", IMAGES[:100]), tmp_path / "one.json"
    common = ("--samples", path, "--kid-subsets", 2, "--metrics", "frechet", "kid", "--compare-to", one)
    base = measure(capsys, *common[:-2], "--reference", "digits", "--out", one)
    found = measure(capsys, *common, "--reference", "digits")
    assert found["compared"]["metrics"] == {name: figure["value"] for name, figure in base["metrics"].items()}
    fewer = refusal(capsys, *common, "--reference", "digits", "--num", 99)
    assert "the number of samples: 99 and 100; measure both alike" in fewer
    assert "another protocol, the reference: " in refusal(capsys, *common, "--reference", path)
    assert "the settings of kid: " in refusal(capsys, *common, "--reference", "digits", "--seed", 1)
    weights = tiny_features.classifier(tmp_path)
    assert "another protocol, features: " in refusal(capsys, *common, "--reference", "digits", "--features", weights)
    one.write_text("{}")
    assert "is no result of this tool" in refusal(capsys, *common, "--reference", "digits")
