"""Where streams read from: patterns, addresses, files that fail for a moment; and values that no image or label has."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy
import pytest
from bad_shards import picture
from numbered_shards import numbered, write_numbered

from datamodules.members import to_npy
from datamodules.shards import OpenFiles
from datamodules.streams import exact
from datamodules.streams.contents import ImageContents
from datamodules.streams.decoding import LARGEST_MAX_PIXELS
from datamodules.streams.patterns import expand
from datamodules.streams.rejects import Reject


def test_what_is_written_beside_shards_is_no_shard(tmp_path):
    names = ["00000.tar", "00001.tar", "00000.json", "00000.tar.index.npz", "00000.tar.7.partial"]
    for name in names:
        (tmp_path / name).touch()
    assert expand("shards", f"{tmp_path}/*") == [str(tmp_path / name) for name in names[:2]]
    assert expand("shards", str(tmp_path / "00000.json")) == [str(tmp_path / "00000.json")], "a file that is named is meant"


@pytest.mark.parametrize("url", ["s3://bucket/{00000..00001}.tar", "magnet://a.tar"])
def test_an_address_that_nothing_reads_is_refused(url):
    with pytest.raises(ValueError, match=f"shards='{url[:4]}.*nothing here reads {url.partition(':')[0]}:.*give pipe:COMMAND"):
        expand("shards", url)
    known = ["https://a/b.tar", "pipe:cat a.tar", "hf://a/b.tar"]
    assert expand("shards", known) == known


class Failing:
    """``os.pread`` that fails ``times`` times."""

    def __init__(self, times: int, code: int = errno.ESTALE):
        self.times, self.code, self.read = times, code, os.pread

    def __call__(self, descriptor: int, size: int, begin: int) -> bytes:
        self.times -= 1
        if self.times >= 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.read(descriptor, size, begin)


def test_a_read_that_fails_once_is_made_again_with_the_file_opened_anew(tmp_path, monkeypatch):
    file, files = tmp_path / "a", OpenFiles()
    file.write_bytes(b"first words")
    assert files.read(file, 0, 5) == b"first"
    replaced = tmp_path / "b"
    replaced.write_bytes(b"other words")
    replaced.rename(file)
    assert files.read(file, 0, 5) == b"first", "the descriptor is that of the file that was there"
    monkeypatch.setattr(os, "pread", Failing(1))
    assert files.read(file, 0, 5) == b"other"
    monkeypatch.setattr(os, "pread", Failing(2))
    with pytest.raises(OSError, match="Stale"):
        files.read(file, 0, 5)
    monkeypatch.undo()
    assert files.read(file, 6, 5) == b"words" and len(files.descriptors) == 1


@pytest.mark.parametrize(("failures", "rejected"), [(1, 0), (2, 1)])
def test_a_disk_that_fails_for_a_moment_costs_no_sample(failures, rejected, tmp_path, monkeypatch):
    data = numbered(write_numbered(tmp_path, (6,)))
    monkeypatch.setattr(os, "pread", Failing(failures, errno.EIO))
    samples = [data.indexed.decode(item, None) for item in range(6)]
    wrong = [one for one in samples if isinstance(one, exact.Rejected)]
    assert len(wrong) == rejected and all(one.reason == "unreadable" for one in wrong)


def test_a_shard_that_is_gone_is_missing(tmp_path):
    data = numbered(write_numbered(tmp_path, (3,)))
    data.indexed
    (tmp_path / "00000.tar").unlink()
    assert data.indexed.decode(0, None).reason == "missing"


def test_other_shards_on_resuming_are_refused_with_a_remedy_that_can_be_followed(tmp_path):
    state = numbered(write_numbered(tmp_path / "a", (5, 4))).state_dict()
    other = numbered(write_numbered(tmp_path / "b", (5, 3)))
    with pytest.raises(ValueError, match="data.shards=.sha256 .*lost or repeated; put those back that it began with, or start"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="data.seed=1: .* has 0.*; set data.seed=0, or start"):
        numbered(tmp_path / "a", seed=1).load_state_dict(state)


@pytest.mark.parametrize("label", [b"1e999", b"Infinity", b"-Infinity", b"NaN"])
def test_a_label_that_is_no_number_of_a_class_is_rejected(label):
    contents = ImageContents(8, labels="json.label", num_classes=10)
    with pytest.raises(Reject) as rejected:
        contents.decode({"json": b'{"label": ' + label + b"}", "png": picture(0)}, None)
    assert rejected.value.reason == "bad label"


@pytest.mark.parametrize(("value", "good"), [(200.0, False), (-1.01, False), (1.0, True), (-1.0005, True)])
def test_float_images_outside_of_their_range_are_rejected(value, good):
    contents = ImageContents(2, channels=1)
    member = to_npy(numpy.full((1, 2, 2), value, numpy.float32))
    if good:
        assert (contents.decode({"npy": member}, None)["image"] == numpy.float32(value)).all()
        return
    with pytest.raises(Reject) as rejected:
        contents.decode({"npy": member}, None)
    assert rejected.value.reason == "out of range" and "uint8" in rejected.value.detail


def test_more_pixels_than_pil_opens_cannot_be_asked_for():
    ImageContents(8, max_pixels=LARGEST_MAX_PIXELS)
    with pytest.raises(ValueError, match=f"max_pixels={LARGEST_MAX_PIXELS + 1}: .*give at most that"):
        ImageContents(8, max_pixels=LARGEST_MAX_PIXELS + 1)


def test_a_folder_is_named_where_there_is_no_shard(tmp_path):
    with pytest.raises(FileNotFoundError, match="make_shards.py"):
        expand("shards", str(Path(tmp_path, "*.tar")))
