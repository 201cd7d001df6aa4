"""tools/make_shards.py: every sample once, as it was, in shards that are the same whoever makes them, killed or not."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy
import pytest
import torch
from bad_shards import picture
from PIL import Image
from script import load_script

from datamodules import kept_indices
from datamodules.digits import load_digits
from datamodules.members import from_npy
from datamodules.tar_index import scan

tool = load_script("make_shards")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eleven pictures in sub-folders, not to be changed: dots in their names, two formats, captions beside them."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(11):
        file = root / "cat dog elk".split()[number % 3] / f"a.{number}.{'png' if number % 2 else 'JPEG'}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture(number, format="png" if number % 2 else "jpeg"))
        file.with_suffix(".txt").write_text(f"picture {number}, ünïcode")
    return root


def run(out: Path, *options: object) -> Path:
    tool.main(["--out", str(out), *map(str, options)])
    return out


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """All samples of a folder by key, as the headers of the tars say."""
    found = {}
    for file in sorted(out.glob("*.tar")):
        index, data = scan(file), file.read_bytes()
        assert not index.problems
        for key, row in zip(index.keys, index.places.tolist()):
            assert key not in found
            found[key] = {name: data[begin : begin + size] for name, (begin, size) in zip(index.names, row) if begin >= 0}
    return found


def bytes_of(out: Path) -> dict[str, str]:
    """Hashes of all files but the indices, in which times are."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir() if file.suffix != ".npz"}


# -------------------------------------------------------------------------------------------------------- what is written


def test_digits_survive_exactly_with_labels_and_captions(tmp_path):
    out = run(tmp_path / "out", "--digits", "--of", 3)
    images, labels = load_digits()
    sources = [name for number in range(3) for name in json.loads((out / f"0000{number}-of-00003.json").read_text())["sources"]]
    assert sorted(sources) == sorted(f"digit {number}" for number in range(1797)) and sources[0] != "digit 0"
    found = samples(out)
    assert list(found) == [f"{place:09d}" for place in range(1797)]
    levels = set()
    for name, sample in zip(sources, found.values()):
        number = int(name.split()[1])
        pixels = numpy.array(Image.open(io.BytesIO(sample["png"])))
        assert pixels.shape == (8, 8) and pixels.dtype == numpy.uint8
        values = (torch.from_numpy(pixels).double() * 16 / 255).round()
        assert torch.equal((values / 8 - 1).float(), images[number, 0])
        assert int(sample["cls"]) == labels[number]
        levels |= set(pixels.flatten().tolist())
    words = "zero one two three four five six seven eight nine".split()
    assert {sample["txt"].decode()[len("a photo of the digit ") :] for sample in found.values()} == set(words)
    assert len(levels) == 17 and {0, 255} <= levels


def test_digits_as_arrays_are_the_same_bits(tmp_path):
    out = run(tmp_path / "out", "--digits", "--store", "npy")
    images, labels = load_digits()
    sources = json.loads((out / "00000-of-00001.json").read_text())["sources"]
    for name, sample in zip(sources, samples(out).values(), strict=True):
        number = int(name.split()[1])
        assert numpy.array_equal(from_npy([sample["npy"]])[0], images[number].numpy()) and int(sample["cls"]) == labels[number]


def test_the_index_of_each_shard_is_there(tmp_path, monkeypatch):
    out = run(tmp_path / "out", "--digits", "--of", 2)
    run(tmp_path / "out", "--digits", "--of", 2)
    monkeypatch.setattr(kept_indices, "scan", None)
    files = sorted(out.glob("*.tar"))
    assert [len(index.keys) for index in kept_indices.read_indices(files)] == [898, 899]


def test_pictures_of_a_folder_are_written_as_they_are(photos, tmp_path):
    out = run(tmp_path / "out", "--images", photos, "--labels", "--of", 2)
    manifests = [json.loads((out / f"0000{number}-of-00002.json").read_text()) for number in range(2)]
    assert [manifest["count"] for manifest in manifests] == [5, 6] and [manifest["first"] for manifest in manifests] == [0, 5]
    sources = [name for manifest in manifests for name in manifest["sources"]]
    assert len(set(sources)) == 11
    for name, sample in zip(sources, samples(out).values(), strict=True):
        file = photos / name
        kind = file.suffix[1:].lower()
        assert sample == {
            kind: file.read_bytes(),
            "txt": file.with_suffix(".txt").read_bytes(),
            "cls": b"%d" % ["cat", "dog", "elk"].index(name.split("/")[0]),
        }
    for number, manifest in enumerate(manifests):
        content = (out / f"0000{number}-of-00002.tar").read_bytes()
        assert manifest["bytes"] == len(content) and manifest["sha256"] == hashlib.sha256(content).hexdigest()
        assert manifest["header"]["classes"] == ["cat", "dog", "elk"]
        assert sum(manifest["endings"][kind] for kind in ("png", "jpeg")) == manifest["count"] == manifest["endings"]["txt"]


ROWS = [("cat/a.0.JPEG", "a cat, sitting", "7"), ("dog/a.1.png", 'the "dog"', "10"), ("dog/a.1.png", "again", "7")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_says_which_pictures_captions_and_labels(kind, photos, tmp_path):
    table = tmp_path / f"table.{kind}"
    if kind == "csv":
        lines = ["file,text,class"] + ['{},"{}",{}'.format(a, b.replace('"', '""'), c) for a, b, c in ROWS]
    else:
        lines = [json.dumps({"file": a, "text": b, "class": int(c)}) for a, b, c in ROWS]
    table.write_text("\n".join(lines), encoding="utf-8-sig")
    options = ("--image-column", "file", "--caption-column", "text", "--label-column", "class")
    out = run(tmp_path / "out", "--images", photos, "--captions", table, *options)
    found = sorted((sample["txt"].decode(), sample["cls"]) for sample in samples(out).values())
    assert found == sorted((caption, label.encode()) for _, caption, label in ROWS)
    assert [sample["png"] for sample in samples(out).values() if "png" in sample] == [(photos / "dog/a.1.png").read_bytes()] * 2
    manifest = json.loads((out / "00000-of-00001.json").read_text())
    assert sorted(manifest["sources"]) == sorted(row[0] for row in ROWS)
    assert manifest["header"]["classes"] == [str(number) for number in range(11)]


def test_pictures_alone_have_neither_captions_nor_labels(photos, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes((photos / "dog/a.1.png").read_bytes())
    assert samples(run(tmp_path / "out", "--images", tmp_path / "bare")) == {
        "000000000": {"png": (photos / "dog/a.1.png").read_bytes()}
    }


# --------------------------------------------------------------------------------------------- array tasks, kills, repeats


def test_shards_one_by_one_are_those_of_one_command(photos, tmp_path, capsys):
    together = run(tmp_path / "a", "--images", photos, "--of", 3, "--seed", 4)
    assert capsys.readouterr().out.endswith("3 shards made, 0 were there, of 3 in all; 11 samples, 0 classes\n")
    for shard in (2, 0, 1):
        run(tmp_path / "b", "--images", photos, "--of", 3, "--seed", 4, "--shard", shard)
    assert bytes_of(together) == bytes_of(tmp_path / "b") and len(bytes_of(together)) == 6
    other = samples(run(tmp_path / "c", "--images", photos, "--of", 3, "--seed", 5))
    assert list(other.values()) != list(samples(together).values())


def test_what_is_finished_is_kept_and_the_rest_is_made_again(photos, tmp_path, capsys):
    out = run(tmp_path / "out", "--images", photos, "--of", 4)
    expected = bytes_of(out)
    (out / "00000-of-00004.json").unlink()
    (out / "00001-of-00004.tar").write_bytes(b"cut")
    (out / "00002-of-00004.json").write_text("{")
    (out / "00001-of-00004.tar.123.partial").write_bytes(b"of a killed task")
    (out / "00003-of-00004.tar.123.partial").write_bytes(b"of a task that runs")
    kept = (out / "00003-of-00004.tar").stat().st_mtime_ns
    capsys.readouterr()
    run(out, "--images", photos, "--of", 4)
    assert "3 shards made, 1 were there, of 4 in all" in capsys.readouterr().out
    assert (out / "00003-of-00004.tar").stat().st_mtime_ns == kept
    assert bytes_of(out).keys() - expected.keys() == {"00003-of-00004.tar.123.partial"}
    assert {name: digest for name, digest in bytes_of(out).items() if name in expected} == expected


def test_a_task_that_dies_leaves_nothing(photos, tmp_path, monkeypatch):
    calls = []

    def dies(number):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"png": b"1"}

    monkeypatch.setattr(tool, "digits", lambda store: tool.Source(["a"] * 9, dies, "digits", None))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "--digits")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_other_samples_is_refused(photos, tmp_path, capsys):
    out = run(tmp_path / "out", "--images", photos, "--of", 2)
    before = bytes_of(out)
    for options, key in ((("--of", 3), "of=2"), (("--seed", 1), "seed=0"), (("--labels",), "samples=")):
        with pytest.raises(SystemExit, match=f"holds shards of other samples: 00000-of-00002.json has {key}"):
            run(out, "--images", photos, *(("--of", 2) + options if "--of" not in options else options))
    assert bytes_of(out) == before


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--digits=False and --images=None: give one"),
        (["--digits", "--images", "x"], "give one of them"),
        (["--digits", "--labels"], "--labels: goes with --images"),
        (["--images", "x", "--captions", "t.csv"], "at least one of the columns"),
        (["--images", "x", "--caption-column", "c"], "--caption-column=c"),
        (["--images", "x", "--store", "npy"], "--store=npy: goes with --digits"),
        (["--digits", "--of", "0"], "--of=0: give at least 1"),
        (["--digits", "--of", "2", "--shard", "2"], "--shard=2: give 0 to 1"),
        (["--digits", "--sead", "1"], "unrecognized arguments: --sead"),
    ],
)
def test_wrong_commands_are_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "out", *options)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_wrong_sources_are_named_before_anything_is_written(photos, tmp_path):
    def refused(message, *options, root=photos):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "out", "--images", root, *options)

    table = tmp_path / "table.csv"
    columns = ("--captions", table, "--caption-column", "text")
    refused("no such file ending in .csv or .jsonl", *columns)
    table.write_text("image,text\ncat/a.0.JPEG,one\ncat/a.6.JPEG,\n")
    refused("row 2 has no value in the column 'text' .--caption-column=text; it has image, text.", *columns)
    table.write_text("picture,text\ncat/a.0.JPEG,one\n")
    refused("row 1 has no value in the column 'image' .--image-column=image; it has picture, text.", *columns)
    table.write_text("image,text\ncat/a.0.JPEG,one\ncat/none.png,two\n")
    refused("cat/none.png: no such picture, though row 2", *columns)
    table.write_text("image,text\n")
    refused("holds no rows", *columns)
    (tmp_path / "t.jsonl").write_text('{"image": 1}\n[1, 2\n')
    refused("line 2 is no record", "--captions", tmp_path / "t.jsonl", "--caption-column", "text")
    refused("there are no pictures", root=tmp_path)
    refused("there are 11 samples, give at most", "--of", 12)
    table.write_text("image,text\ncat/a.0.txt,one\n")
    refused("a.0.txt: training reads jpg, jpeg, png, webp alone", *columns)
    refused("lies in no sub-folder", "--labels", root=photos / "cat")
    assert not (tmp_path / "out").exists()


def test_files_without_bytes_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture(0))
    (tmp_path / "in" / "a.txt").write_text(" \n")
    with pytest.raises(SystemExit, match="a.txt: is empty; fill it, or leave the picture out"):
        run(tmp_path / "out", "--images", tmp_path / "in")
    assert list((tmp_path / "out").iterdir()) == []
