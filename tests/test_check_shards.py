"""tools/check_shards.py: each kind of bad shard is named with its sample, good ones are counted, nothing hangs."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from bad_shards import GOOD, KINDS, captioned, good_shard, picture, write_bad, write_tar
from script import load_script

from datamodules import kept_indices
from datamodules.members import to_npy
from datamodules.shard_writing import write_shard

tool = load_script("check_shards")


def check(tmp_path, *options, wrong=True):
    """The report of a run, which ends with 1 if anything is wrong."""
    with pytest.raises(SystemExit) as stop:
        tool.main([*map(str, options), "--out", str(tmp_path / "report.json")])
    assert stop.value.code == int(wrong), stop.value
    return json.loads((tmp_path / "report.json").read_text())


def problems(report) -> list[tuple[str, str, str]]:
    """File, reason and key of all problems."""
    return [(Path(shard["file"]).name, one["reason"], one["key"]) for shard in report["shards"] for one in shard["problems"]]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_bad_shard_is_named(kind, tmp_path, capsys):
    file = write_bad(kind, tmp_path)
    expected = KINDS[kind].checked
    report = check(tmp_path, file, wrong=expected is not None)
    assert list(report["wrong"]) == [expected] * (expected is not None)
    of_a_sample = {"duplicate key": "good0", "not finite": "000000002", "other shape": "000000002"}
    whole = expected in ("truncated", "empty", "garbage", "bad header", "missing")
    key = "" if whole else of_a_sample.get(expected, "bad")
    assert set(problems(report)) == ({(file.name, expected, key)} if expected else set())
    text = capsys.readouterr().out
    assert (f"{expected}: {file}" in text) == (expected is not None)
    assert text.endswith(": nothing wrong\n") == (expected is None)


def test_what_is_there_is_counted(tmp_path, capsys):
    good_shard(tmp_path / "a.tar")
    other = [("y.jpeg", picture(1, "L", "jpeg", 24)), ("y.txt", b"t"), ("y.bin", b"\x80")]
    write_tar(tmp_path / "b.tar", captioned("x") + other)
    report = check(tmp_path, tmp_path / "*.tar", wrong=False)
    assert report["samples"] == 6 and not report["wrong"]
    first, second = report["shards"]
    assert first["members"] == {"png": 4, "txt": 4} and first["pictures"] == {"PNG RGB 16x16": 4}
    assert second["members"] == {"png": 1, "jpeg": 1, "txt": 2, "bin": 1}
    assert second["pictures"] == {"PNG RGB 16x16": 1, "JPEG L 24x24": 1}
    assert second["bytes"] == (tmp_path / "b.tar").stat().st_size
    text = capsys.readouterr().out
    assert "        5 PNG RGB 16x16\n        1 JPEG L 24x24\n2 shards, 6 samples: nothing wrong\n" in text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_two_workers_find_what_one_does(tmp_path):
    for shard, kind in enumerate(kind for kind in KINDS if not KINDS[kind].encoded):
        write_bad(kind, tmp_path, shard)
    pattern = tmp_path / "{00000..00011}.tar"
    alone, together = check(tmp_path, pattern), check(tmp_path, pattern, "--workers", 2)
    assert alone == together and len(alone["shards"]) == 12 and set(alone["wrong"]) >= {"truncated", "bad image", "missing"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cls", b"seven", "bad label"),
        ("json", b"{", "bad json"),
        ("json", b"[" * 5000 + b"]" * 5000, "bad json"),
        ("txt", b"\xff\xfe", "bad caption"),
        ("x0.npy", to_npy(numpy.zeros(3))[:-1], "bad array"),
        ("x0.npy", b"\x80\x04K\x01.", "bad array"),
        ("webp", picture(0, format="webp")[:-40], "bad image"),
        ("jpg", picture(0, format="jpeg")[:-100], "bad image"),
        ("png", picture(0)[:33] + b"\xff" * 40, "bad image"),
        ("png", b"GIF89a" + bytes(100), "bad image"),
    ],
)
def test_members_that_cannot_be_decoded_are_named(name, content, reason, tmp_path):
    write_tar(tmp_path / "a.tar", [("a." + name, content)])
    assert problems(check(tmp_path, tmp_path / "a.tar")) == [("a.tar", reason, "a")]


def test_a_picture_is_measured_before_it_is_decoded(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    cut = picture(0)[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture(0)[33:]
    write_tar(tmp_path / "a.tar", [("a.png", cut)])
    assert problems(check(tmp_path, tmp_path / "a.tar", "--max-pixels", 80_999_999)) == [("a.tar", "huge", "a")]
    good_shard(tmp_path / "b.tar")
    assert check(tmp_path, tmp_path / "b.tar", "--max-pixels", 256, wrong=False)
    assert check(tmp_path, tmp_path / "b.tar", "--max-pixels", 255)["wrong"] == {"huge": 4}


# ---------------------------------------------------------------------------------------------------------- among shards


def test_a_key_of_two_shards_is_named(tmp_path):
    good_shard(tmp_path / "a.tar", ["one", "two"])
    good_shard(tmp_path / "b.tar", ["two", "three"])
    report = check(tmp_path, tmp_path / "*.tar")
    assert problems(report) == [("b.tar", "duplicate key", "two")]
    assert report["shards"][1]["problems"][0]["detail"] == f"also in {tmp_path / 'a.tar'}"


def test_what_most_samples_have_all_must_have(tmp_path):
    good_shard(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", [("x.png", picture(1)), ("y.txt", b"text"), ("y.cls", b"3")])
    assert sorted(problems(check(tmp_path, tmp_path / "*.tar"))) == [("b.tar", "no caption", "x"), ("b.tar", "no image", "y")]


def test_shapes_are_those_of_most_samples_of_all_shards(tmp_path):
    shapes = {"a": [(2, 3)] * 3, "b": [(3, 2)] * 2, "c": [(2, 3)]}
    for name, arrays in shapes.items():
        write_tar(tmp_path / f"{name}.tar", [(f"{name}{i}.x0.npy", to_npy(numpy.zeros(s))) for i, s in enumerate(arrays)])
    report = check(tmp_path, tmp_path / "*.tar")
    assert problems(report) == [("b.tar", "other shape", "b0"), ("b.tar", "other shape", "b1")]
    assert report["shards"][1]["arrays"] == {"x0.npy": {"float64 [3, 2]": 2}}


def test_manifests_are_compared_and_missing_shards_are_named(tmp_path):
    header = {"shard": 1, "of": 3}
    for number in (0, 1):
        file = tmp_path / f"0000{number}-of-00003.tar"
        with open(file, "wb") as stream:
            samples = [{"txt": b"one"}, {"txt": b"two"}]
            manifest = write_shard(stream, header, {"a": torch.zeros(1)}, 2 * number, samples)
        file.with_suffix(".json").write_text(json.dumps(manifest))
    pattern = tmp_path / "*.tar"
    assert problems(check(tmp_path, pattern)) == [("00002-of-00003.tar", "missing", "")]
    content = bytearray(file.read_bytes())
    content[content.index(b"two")] ^= 1
    file.write_bytes(content)
    found = check(tmp_path, pattern)
    assert problems(found)[0] == ("00001-of-00003.tar", "other than its manifest", "")
    assert found["shards"][1]["problems"][0]["detail"].startswith("sha256 ") and found["wrong"]["other than its manifest"] == 1
    file.with_suffix(".json").write_text("[]")
    assert "is no manifest" in check(tmp_path, pattern)["shards"][1]["problems"][0]["detail"]


# ------------------------------------------------------------------------------------------------ as training sees them


def test_contents_say_what_a_sample_is(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", captioned("a") + [("b.png", picture(1)), ("b.cls", b"1"), ("b.txt", b"text")])
    (tmp_path / "contents.yaml").write_text("{class_path: ImageContents, init_args: {size: 8, labels: cls, num_classes: 1}}")
    assert check(tmp_path, tmp_path / "a.tar", wrong=False)
    report = check(tmp_path, tmp_path / "a.tar", "--contents", tmp_path / "contents.yaml")
    assert problems(report) == [("a.tar", "no label", "a"), ("a.tar", "bad label", "b")]
    (tmp_path / "contents.yaml").write_text("{class_path: ImageContents, init_args: {size: 8, lables: cls}}")
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(tmp_path / "a.tar"), "--contents", str(tmp_path / "contents.yaml")])
    assert "contents.lables: there is no such key" in capsys.readouterr().err
    (tmp_path / "contents.yaml").write_text("{class_path: EncodedContents}")
    with pytest.raises(SystemExit, match="shards of EncodedContents say themselves what they hold"):
        tool.main([str(tmp_path / "a.tar"), "--contents", str(tmp_path / "contents.yaml")])


def test_a_problem_is_named_once(tmp_path):
    (tmp_path / "contents.yaml").write_text("{class_path: ImageContents, init_args: {size: 8, captions: txt}}")
    for kind in ("bad image", "zero size", "no caption"):
        file = write_bad(kind, tmp_path)
        report = check(tmp_path, file, "--contents", tmp_path / "contents.yaml")
        assert [key for _, _, key in problems(report)] == ["bad"], kind
    assert GOOD[0] not in {key for _, _, key in problems(report)}


@pytest.mark.parametrize("workers", [1, 2])
def test_indices_are_kept_on_the_way(workers, tmp_path, monkeypatch, capsys):
    files = [good_shard(tmp_path / f"{name}.tar", [name]) for name in "ab"]
    settings = ("--workers", workers, "--index-cache", tmp_path / "cache")
    check(tmp_path, tmp_path / "*.tar", *settings, wrong=False)
    check(tmp_path, files[0], wrong=False)
    assert "could not be kept" not in capsys.readouterr().out
    monkeypatch.setattr(kept_indices, "scan", None)
    assert [index.keys for index in kept_indices.read_indices(files, tmp_path / "cache")] == [["a"], ["b"]]
    assert kept_indices.is_kept(files[0]) and not kept_indices.is_kept(files[1])


def test_an_index_that_cannot_be_kept_is_said_and_the_shard_is_not_wrong(tmp_path, capsys):
    file = good_shard(tmp_path / "a.tar")
    (tmp_path / "file").write_text("in the way")
    check(tmp_path, file, "--index-cache", tmp_path / "file/cache", wrong=False)
    assert f"1 indices could not be kept, that of {file}: " in (text := capsys.readouterr().out) and "--index-cache" in text


def test_keys_that_are_no_text_are_printed(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a\udcff.png", picture(0))] + captioned("b") + captioned("c"))
    (tmp_path / "contents.yaml").write_text("{class_path: ImageContents, init_args: {size: 8, captions: txt}}")
    report = check(tmp_path, tmp_path / "a.tar", "--contents", tmp_path / "contents.yaml")
    assert problems(report) == [("a.tar", "no caption", "a\udcff")] and "a\\udcff" in capsys.readouterr().out


def test_wrong_commands_are_named(tmp_path, capsys):
    for pattern, message in (("https://a/{0..9}.tar", "only files can be checked"), (tmp_path / "*.tar", "no file matches it")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            tool.main([str(pattern)])
    with pytest.raises(SystemExit, match="2"):
        tool.main(["a.tar", "--workers", "0"])
    assert "--workers=0: give at least 1" in capsys.readouterr().err
    assert tool.files_of([f"{tmp_path}/{{3..4}}.tar"]) == [f"{tmp_path}/3.tar", f"{tmp_path}/4.tar"]
