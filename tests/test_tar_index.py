"""The index of a tar: members lie where it says, whatever the tar's format; what is wrong is said, and nothing hangs."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile

import numpy
import pytest
from bad_shards import GOOD, KINDS, captioned, good_shard, write_bad, write_tar
from webdataset import tariterators

from datamodules import kept_indices
from datamodules.kept_indices import SUFFIX, kept_keys, read_index, read_indices
from datamodules.tar_index import scan

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(file, members, format=tarfile.USTAR_FORMAT, **attributes):
    with tarfile.open(file, "w", format=format) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in attributes.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(content))
    return file


def contents(index) -> dict[str, dict[str, bytes]]:
    """What lies at the places of an index."""
    data, found = index.file.read_bytes(), {}
    for key, row in zip(index.keys, index.places.tolist()):
        found[key] = {name: data[begin : begin + size] for name, (begin, size) in zip(index.names, row) if begin >= 0}
    return found


def reasons(index) -> list[tuple[str, str]]:
    return [(problem.reason, problem.key) for problem in index.problems]


# ------------------------------------------------------------------------------------------------------------ what it is


@pytest.mark.parametrize("format", FORMATS)
def test_members_lie_where_the_index_says_in_every_format_of_tars(format, tmp_path):
    folder = "a folder with dots.1/" + ("long" if format == "ustar" else "ü" * 150)
    sizes = [(number, end, 1 + 511 * number) for number in range(5) for end in ("JPG", "x0.npy")]
    members = [(f"{folder}/{number}.{end}", os.urandom(size)) for number, end, size in sizes]
    index = scan(write(tmp_path / "a.tar", members, FORMATS[format]))
    assert index.keys == [f"{folder}/{number}" for number in range(5)] and index.names == ["jpg", "x0.npy"]
    assert index.places.dtype == numpy.int64 and index.size == (tmp_path / "a.tar").stat().st_size
    assert [list(sample.values()) for sample in contents(index).values()] == [
        [members[2 * number][1], members[2 * number + 1][1]] for number in range(5)
    ]
    assert not index.problems


def test_samples_are_those_that_webdataset_reads(tmp_path):
    names = "__header__ one.jpg one.txt bare dir.d/two.jpg __meta__/three.jpg .hidden.jpg __four.jpg five.7".split()
    file = write(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    with open(file, "rb") as stream:
        read = list(tariterators.tar_file_expander([{"url": "a", "stream": stream}]))
    theirs = {sample.pop("__key__"): sample for sample in tariterators.group_by_keys(iter(read))}
    theirs = {key: {name: data for name, data in sample.items() if name[0] != "_"} for key, sample in theirs.items()}
    assert contents(scan(file)) == theirs and len(theirs) == 4


def test_a_sample_that_lacks_a_member_has_minus_one(tmp_path):
    index = scan(write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("b.txt", b"3")]))
    assert index.keys == ["a", "b"] and index.places.tolist() == [[[512, 1], [1536, 1]], [[-1, -1], [2560, 1]]]
    assert not index.problems


def test_links_and_folders_are_no_samples(tmp_path):
    assert scan(write(tmp_path / "a.tar", [("a.jpg", b"")], type=tarfile.DIRTYPE)).keys == []
    assert scan(write(tmp_path / "b.tar", [("a.jpg", b"")], type=tarfile.SYMTYPE)).keys == []


# --------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "missing"])
def test_each_kind_of_bad_shard_leaves_the_good_samples(kind, tmp_path):
    index = scan(write_bad(kind, tmp_path))
    expected = KINDS[kind]
    assert [reason for reason, _ in reasons(index)] == [expected.indexed] * len(index.problems)
    assert bool(index.problems) == (expected.indexed is not None)
    if not expected.encoded:
        assert [key for key in index.keys if key in GOOD] == GOOD[: expected.good]


def test_a_cut_anywhere_keeps_the_samples_before_it(tmp_path):
    whole = good_shard(tmp_path / "whole.tar")
    data, places = whole.read_bytes(), scan(whole).places
    ends = (places[:, 1, 0] + places[:, 1, 1]).tolist()
    for cut in [*range(512, ends[-1] + 512, 271), *ends]:
        file = tmp_path / "cut.tar"
        file.write_bytes(data[:cut])
        index = scan(file)
        assert reasons(index) == [("truncated", "")]
        assert index.keys[: sum(end <= cut for end in ends)] == GOOD[: sum(end <= cut for end in ends)], cut
        assert all((row >= 0).all() for row in index.places) or len(index.keys) == 1, cut


def test_a_sample_that_is_cut_within_is_left_out(tmp_path):
    for members in ([("a.jpg", b"1"), ("a.txt", b"22")], [("a.jpg", b"1"), ("b.jpg", b"1"), ("b.cls", b"22")]):
        file = write(tmp_path / "a.tar", members)
        file.write_bytes(file.read_bytes()[: 1024 * len(members) - 511])
        assert scan(file).keys == ["a"][: len(members) - 2]


def test_what_is_left_out_is_named(tmp_path):
    names = "a.jpg b.jpg b.jpg a.jpg a.txt".split()
    twice = scan(write(tmp_path / "a.tar", [(name, b"%d" % place) for place, name in enumerate(names, 1)]))
    assert contents(twice) == {"a": {"jpg": b"1"}, "b": {"jpg": b"2"}}
    assert reasons(twice) == [("duplicate key", "b"), ("duplicate key", "a")]
    dotted = scan(write_tar(tmp_path / "b.tar", captioned("a") + captioned("b.c") + captioned("d")))
    assert dotted.keys == ["a", "d"] and sorted(reasons(dotted)) == [("dotted key", "b")] * 2
    assert "b.c.png: a key ends at its first dot" in {problem.detail[:36] for problem in dotted.problems}


def test_endings_with_a_dot_that_most_samples_have_are_endings(tmp_path):
    members = [(f"{key}.{end}", b"1") for key in "abc" for end in ("png", "mask.png", "x0.npy")]
    index = scan(write(tmp_path / "a.tar", members))
    assert index.names == ["mask.png", "png", "x0.npy"] and not index.problems


def test_numbers_behind_dots_do_not_make_a_column_each(tmp_path):
    index = scan(write(tmp_path / "a.tar", [(f"photo.{number}.dat", b"1") for number in range(100)]))
    assert index.places.shape == (1, 64, 2) and reasons(index) == [("dotted key", "photo")] * 36


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data + data, "bad header"),
        (lambda data: b"\x1f\x8b" + data, "garbage"),
        (lambda data: data[:1024] + bytes(512) + data[1536:], "bad header"),
        (lambda data: bytes(10240), "empty"),
    ],
)
def test_tars_that_end_too_early_are_said(change, reason, tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(change(write(file, [("a.jpg", b"1" * 512), ("b.jpg", b"1" * 512)]).read_bytes()))
    assert [problem.reason for problem in scan(file).problems] == [reason]


@pytest.mark.parametrize("size", ["-5000", "-100", "99999999999999999", "1e3", "-0"])
def test_sizes_that_make_no_sense_end_the_walk(size, tmp_path):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("a.jpg", {}), ("b.jpg", {"size": size})):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = 100, headers
            archive.addfile(entry, io.BytesIO(b"x" * 100))
    index = scan(file)
    assert index.keys[:1] == ["a"] and index.problems[-1].reason in ("bad header", "truncated")
    assert index.places.min() >= 0


@pytest.mark.parametrize("field", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0"])
@pytest.mark.parametrize("type", [b"0", b"x", b"g", b"L", b"S"])
def test_headers_that_lie_end_the_walk(field, type, tmp_path):
    file = good_shard(tmp_path / "a.tar")
    data = bytearray(file.read_bytes())
    begin = int(scan(file).places[2, 0, 0]) - 512
    data[begin + 124 : begin + 136], data[begin + 156 : begin + 157] = field, type
    data[begin + 148 : begin + 156] = b" " * 8
    data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])
    file.write_bytes(data)
    index = scan(file)
    assert index.keys == GOOD[:2] and len(index.problems) == 1
    assert index.problems[0].reason in ("bad header", "truncated")


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.tar: there is no such shard"):
        scan(tmp_path / "nowhere.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("pipe.tar", ""):
        with pytest.raises(ValueError, match="not a regular file"):
            read_index(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------- cache


def same(first, second) -> bool:
    assert numpy.array_equal(first.places, second.places)
    return [(i.file, i.size, i.keys, i.names, i.problems) for i in (first,)] == [
        (i.file, i.size, i.keys, i.names, i.problems) for i in (second,)
    ]


def test_an_index_is_kept_until_the_tar_changes(tmp_path, monkeypatch):
    file = write_bad("duplicate key", tmp_path)
    first = read_index(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, file.name + SUFFIX]
    with monkeypatch.context() as patch:
        patch.setattr(kept_indices, "scan", None)
        assert same(read_index(file), first) and first.problems
    good_shard(file, ["new", "samples"])
    assert read_index(file).keys == ["new", "samples"]
    again = write(file, [("one.jpg", b"1")])
    stamp = file.stat()
    assert read_index(again).keys == ["one"]
    write(file, [("two.jpg", b"1")])
    os.utime(file, ns=(stamp.st_mtime_ns + 1, stamp.st_mtime_ns + 1))
    assert read_index(file).keys == ["two"]


def test_tars_of_one_name_do_not_share_an_index(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        good_shard(tmp_path / name / "0.tar", [name])
        os.utime(tmp_path / name / "0.tar", ns=(5, 5))
    (tmp_path / "\udcff").mkdir()
    good_shard(tmp_path / "\udcff" / "0.tar", ["no text"])
    assert read_index(tmp_path / "\udcff" / "0.tar", tmp_path / "other").keys == ["no text"]
    assert [read_index(tmp_path / name / "0.tar", tmp_path / "cache").keys for name in "abab"] == [["a"], ["b"]] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 2 and len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no index", b"\x80\x04.", None])
def test_a_damaged_index_is_made_again(content, tmp_path):
    file = good_shard(tmp_path / "a.tar")
    kept = file.with_name(file.name + SUFFIX)
    read_index(file)
    kept.write_bytes(kept.read_bytes()[:-200] if content is None else content)
    assert read_index(file).keys == GOOD and numpy.load(kept)["places"].shape == (4, 2, 2)


def test_where_nothing_can_be_written_the_tars_are_read_and_the_remedy_is_said(tmp_path):
    files = [good_shard(tmp_path / f"{name}.tar", [name]) for name in "ab"]
    (tmp_path / "file").write_text("in the way")
    assert read_index(files[0], tmp_path / "file" / "cache").keys == ["a"]
    with pytest.warns(UserWarning, match="file/cache: the index of .*tar cannot be kept .*Set data.index_cache") as warned:
        assert [index.keys for index in read_indices(files, tmp_path / "file" / "cache")] == [["a"], ["b"]]
    assert len(warned) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_an_index_is_the_umasks_to_say(umask, tmp_path):
    file, before = good_shard(tmp_path / "a.tar"), os.umask(umask)
    try:
        read_index(file)
    finally:
        os.umask(before)
    assert file.with_name(file.name + SUFFIX).stat().st_mode & 0o777 == 0o666 & ~umask


def test_tars_without_an_index_are_counted_before_they_are_scanned(tmp_path, caplog, monkeypatch):
    files = [good_shard(tmp_path / f"{name}.tar", [name]) for name in "abcd"]
    read_index(files[1])
    read_index(files[2])
    os.utime(files[2], ns=(5, 5))

    def told() -> list[str]:
        return [record.message for record in caplog.records if record.message.startswith("data: indexing")]

    with caplog.at_level("INFO"):
        indices = read_indices(files)
        assert next(indices).keys == ["a"] and len(told()) == 1 and "indexing 3 shards that have no index yet" in told()[0]
        assert [index.keys for index in indices] == [["b"], ["c"], ["d"]]
        monkeypatch.setattr(kept_indices, "scan", None)
        assert [index.keys for index in read_indices(files)] == [[name] for name in "abcd"] and len(told()) == 1


def test_processes_that_start_together_share_the_scans(tmp_path, monkeypatch):
    files, scanned = [good_shard(tmp_path / f"{name}.tar", [name]) for name in "abcdefgh"], []

    def scan_and_another_too(file):
        scanned.append(file)
        if len(scanned) == 3:  # meanwhile
            for other in files[:4]:
                kept_indices._save(kept_indices._kept(other, None), scan(other), kept_indices._stamp(other))
        return scan(file)

    orders = set()
    for _ in range(4):
        scanned.clear()
        for file in files:
            _forget(file)
        monkeypatch.setattr(kept_indices, "scan", scan_and_another_too)
        assert [index.keys for index in read_indices(files)] == [[name] for name in "abcdefgh"]
        assert len(set(scanned)) == len(scanned) == 3 + len(set(files[4:]) - set(scanned[:3]))
        orders.add(tuple(scanned))
    assert len(orders) > 1, "each begins at another tar"


def test_keys_are_looked_up_also_when_the_tar_is_gone(tmp_path):
    file, other = good_shard(tmp_path / "a.tar"), good_shard(tmp_path / "b.tar", ["no index"])
    read_index(file)
    file.unlink()
    assert kept_keys(file) == GOOD and kept_keys(other) == ["no index"]
    with pytest.raises(FileNotFoundError, match="nowhere.tar"):
        kept_keys(tmp_path / "nowhere.tar")


def test_names_that_are_no_text_are_kept_as_they_are(tmp_path):
    file = write(tmp_path / "a.tar", [("a\udcff.jpg", b"1"), ("line\nbreak.jpg", b"2")])
    assert scan(file).keys == ["a\udcff", "line\nbreak"] == read_index(file).keys and same(read_index(file), scan(file))


def _read_often(file, barrier, answers):
    barrier.wait()
    answers.put({tuple(read_index(file).keys) for _ in range(20) if not _forget(file)})


def _forget(file):
    file.with_name(file.name + SUFFIX).unlink(missing_ok=True)


def test_many_processes_at_once_read_the_same(tmp_path):
    file = good_shard(tmp_path / "a.tar")
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_read_often, args=(file, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=30) for _ in processes] == [{tuple(GOOD)}] * 4
    for process in processes:
        process.join()
    assert {path.name for path in tmp_path.iterdir()} <= {file.name, file.name + SUFFIX}
