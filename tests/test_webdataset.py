"""Shards in the exact order: each sample once a pass on any ranks and workers, cut anywhere; a stand-in for what is bad."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import trainer
from numbered_shards import COUNTS, member, numbered, numbers, on_rank, trained, write_numbered, write_tar
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from resuming import same, train_cut_and_whole
from script import load_script
from test_encoded import Recorder

from datamodules import webdataset
from datamodules.digits import DigitsDataModule, load_digits
from datamodules.streams.contents import ImageContents
from datamodules.streams.exact import draws_at
from datamodules.streams.grouped_order import GroupedOrder
from datamodules.streams.rejects import Rejected, Rejects
from datamodules.webdataset import WebDatasetDataModule

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIZE = sum(COUNTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """37 samples in five shards, not to be changed."""
    return write_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs write what they reject where they are started."""
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------------------------- order


def test_a_pass_is_a_permutation_of_all_samples_group_after_group_of_shards():
    order = GroupedOrder(list(COUNTS), 2, seed=3)
    passes = [order.items(range(number * SIZE, (number + 1) * SIZE)) for number in range(3)]
    assert all(sorted(found) == list(range(SIZE)) for found in passes) and passes[0] != passes[1] != passes[2]
    shard_of = [shard for shard, count in enumerate(COUNTS) for _ in range(count)]
    for found in passes:
        groups, group, seen = [], set(), Counter()
        for shard in map(shard_of.__getitem__, found):
            group.add(shard)
            seen[shard] += 1
            if all(seen[one] == COUNTS[one] for one in group):  # nothing of it is to come
                groups.append(group)
                group = set()
        assert [len(group) for group in groups] == [2, 2, 1] and set().union(*groups) == set(range(5))
    mixed = [shard_of[item] for item in passes[0]]
    assert sum(a != b for a, b in zip(mixed, mixed[1:])) > 5, "samples of a group are mixed, not only its shards"


def test_order_is_frozen_and_a_function_of_seed_and_position_alone():
    order = GroupedOrder(list(COUNTS), 2, seed=3)
    ahead = order.items(range(90, 100))
    assert pickle.loads(pickle.dumps(order)).items(range(90, 100)) == ahead == order.items(range(85, 100))[5:]
    assert GroupedOrder(list(COUNTS), 2, seed=4).items(range(90, 100)) != ahead
    assert order.items(range(5, 110, 8)) == FROZEN  # of all groups of three passes
    draws = [draws_at(3, position) for position in range(1000)]
    assert len(set(draws)) == 1000 and draws[7] == (0.15166098112240434, 0.22796512651257217, 0.6678616418503225)
    assert draws_at(4, 7) != draws[7] and all(0 <= value < 1 for three in draws for value in three)


FROZEN = [4, 26, 19, 30, 9, 5, 14, 36, 29, 22, 12, 4, 1, 31]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_once_a_pass_on_2_then_1_then_4_ranks(workers, folder):
    """A run that is cut within a pass and within an epoch, twice, and goes on with other ranks and batch sizes."""
    state, seen, order = None, [], GroupedOrder(list(COUNTS), 2, seed=5)
    for ranks, batch_size, batches in ((2, 3, 3), (1, 5, 2), (4, 2, 7)):
        parts = []
        for rank in range(ranks):
            settings = {"batch_size": batch_size, "num_workers": workers, "seed": 5, "batches_per_epoch": 9}
            module = on_rank(numbered(folder, **settings), rank, ranks)
            if state is not None:
                module.load_state_dict(state)
            parts.append([numbers(batch) for batch in islice(module.train_dataloader(), batches)])
            trained(module, batches)
        seen += [number for batch in zip(*parts) for part in batch for number in part]
        state = module.state_dict()
    assert state["consumed"] == len(seen) == 2 * SIZE + 10 and seen == order.items(range(len(seen)))
    assert sorted(seen[:SIZE]) == sorted(seen[SIZE : 2 * SIZE]) == list(range(SIZE))


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 0)])
def test_augmentation_is_the_same_on_any_number_of_ranks(ranks, workers, tmp_path):
    pixels = torch.randint(0, 256, (16, 12, 10, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    members = []
    for number, image in enumerate(pixels.numpy()):
        Image.fromarray(image).save(tmp_path / "a.png")
        members.append((f"{number}.png", (tmp_path / "a.png").read_bytes()))
    write_tar(tmp_path / "0.tar", members)

    def batches(ranks: int, rank: int, workers: int = 0) -> list[torch.Tensor]:
        contents = ImageContents(4, resize=6, crop="random", flip=True)
        settings = {"contents": contents, "batch_size": 16 // ranks, "batches_per_epoch": 2, "num_workers": workers}
        return [batch.x0 for batch in on_rank(numbered(tmp_path, **settings), rank, ranks).train_dataloader()]

    whole = torch.cat(batches(1, 0))
    parts = [batches(ranks, rank, workers) for rank in range(ranks)]
    assert torch.equal(torch.cat([part[step] for step in range(2) for part in parts]), whole)
    first, second = (sorted(map(hash_of, half)) for half in whole.split(16))
    assert first != second, "a sample is cropped otherwise in each pass"


def hash_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def test_state_refuses_other_shards_another_mode_and_another_seed(folder, tmp_path):
    state = on_rank(numbered(folder)).state_dict()
    moved = on_rank(numbered(write_numbered(tmp_path / "moved")))
    moved.load_state_dict(state)
    write_numbered(tmp_path / "other", (9, 4, 11, 6, 7))
    for other, key in (
        (numbered(tmp_path / "other"), "data.shards"),
        (numbered(folder, shards=str(folder / "{00000,00002,00001,00003,00004}.tar")), "data.shards"),
        (numbered(folder, seed=1), "data.seed=1: the run to be resumed has 0"),
        (numbered(folder, shuffle_shards=3), "data.shuffle_shards=3"),
        (numbered(folder, "resampled"), "data.mode=resampled: the run to be resumed has exact"),
    ):
        with pytest.raises(ValueError, match=key):
            on_rank(other).load_state_dict(state)


def test_keys_that_are_no_text_have_a_state(tmp_path):
    write_tar(tmp_path / "0.tar", [("a\udcff." + name[4:], content) for name, content in member(3)] + member(4))
    module = on_rank(numbered(tmp_path))
    on_rank(numbered(tmp_path)).load_state_dict(module.state_dict())
    text = b"0.tar %d 2\n" % (tmp_path / "0.tar").stat().st_size + b"a\xff\n004"
    assert module.state_dict()["shards"] == f"(sha256 {hashlib.sha256(text).hexdigest()[:12]})"


def test_places_of_wanted_members_alone_are_held(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{number}.{name}", b"1") for number in range(4) for name in ("npy", "bin", "cls")])
    (index,) = numbered(tmp_path).indexed.indices
    assert index.names == ["cls", "npy"] and not index.keys and index.places.shape == (4, 2, 2) and index.places.itemsize == 4


def test_a_run_that_is_cut_ends_in_the_bits_of_one_that_is_not(tmp_path, monkeypatch):
    """The recipe, through the command line, with a worker and flips."""
    monkeypatch.chdir(tmp_path)
    load_script("make_shards").main(["--digits", "--of", "3", "--out", "data/shards/digits"])
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"]
    data = ["--data.init_args.batch_size=8", "--data.init_args.num_workers=1", "--data.init_args.batches_per_epoch=3"]
    flip = "--data.init_args.contents.init_args.flip=true"
    cut, whole = train_cut_and_whole(str(CONFIGS / "digits/teacher_shards.yaml"), *quiet, *data, flip, "--sample_grid.lines=1")
    for key in ("state_dict", "optimizer_states", "distill"):
        assert same(cut[key], whole[key]), key
    data_state = whole["WebDatasetDataModule"]
    assert data_state["consumed"] == 32 and data_state["mode"] == "exact" and same(cut["WebDatasetDataModule"], data_state)


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_validation_reads_evenly_spaced_samples_those_of_own_shards_or_other_data(folder, tmp_path):
    assert [numbers(batch) for batch in numbered(folder, eval_samples=4).val_dataloader()] == [[0, 9, 18, 27]]
    every = on_rank(numbered(folder, num_workers=1), 1, 2)
    assert [numbers(batch) for batch in every.test_dataloader()] == [[*range(7, 14)], [*range(21, 28)], [35, 36]]
    own = numbered(folder, validation_shards=str(write_numbered(tmp_path / "own", (2, 3)) / "*.tar"))
    assert [numbers(batch) for batch in own.val_dataloader()] == [[*range(5)]]
    assert [numbers(batch) for batch in own.held_out_dataloader()] == [[*range(5)]]
    contents = ImageContents(8, channels=1, labels="cls", num_classes=10)
    real = on_rank(numbered(folder, contents=contents, validation=DigitsDataModule(eval_batch_size=100)), 1, 2)
    assert real.validation.trainer is real.trainer and real.eval_batch_size == 100
    assert torch.equal(next(iter(real.val_dataloader())).x0, load_digits()[0][100:200])
    assert len(next(iter(real.held_out_dataloader()))) == 100


def test_validation_on_what_is_trained_on_is_not_all_of_it(folder, monkeypatch):
    monkeypatch.setattr(webdataset, "EVALUATED", 4)
    assert [numbers(batch) for batch in numbered(folder).val_dataloader()] == [[0, 9, 18, 27]]
    assert len(numbered(folder, eval_samples=30).evaluation_items()) == 30
    assert len(numbered(folder, validation_shards=str(folder / "00002.tar")).evaluation_items()) == 11


def test_validation_counts_what_it_rejects_on_its_own(tmp_path):
    write_numbered(tmp_path / "good", (30,))
    write_numbered(tmp_path / "bad", (60,), bad=tuple(range(0, 60, 20)))
    own = {"validation_shards": str(tmp_path / "bad/*.tar"), "max_reject_rate": 0.05, "batches_per_epoch": 40}
    module = on_rank(numbered(tmp_path / "good", **own), folder=tmp_path)
    assert len(list(module.val_dataloader())) == 9 and len(list(module.train_dataloader())) == 40
    assert not module.rejects.counts and module.eval_rejects.counts == {"not finite": 3} and module.eval_rejects.seen == 60
    on_rank(module := numbered(tmp_path / "good", **(own | {"max_reject_rate": 0.04})), folder=tmp_path)
    with pytest.raises(RuntimeError, match="6 of 102 samples were rejected"):
        for _ in range(2):
            list(module.val_dataloader())


def test_digits_survive_their_shards_to_the_bit(tmp_path):
    load_script("make_shards").main(["--digits", "--of", "2", "--out", str(tmp_path)])
    contents = ImageContents(8, channels=1, levels=17, labels="cls", num_classes=10, captions="txt")
    module = WebDatasetDataModule(str(tmp_path / "*.tar"), contents, "exact", eval_batch_size=1000)
    batches = list(module.val_dataloader())
    images, labels = load_digits()
    wanted = {(image.numpy().tobytes(), label) for image, label in zip(images, labels.tolist())}
    found = [(one.numpy().tobytes(), label) for b in batches for one, label in zip(b.x0, b.cond["labels"].tolist())]
    assert set(found) == wanted and len(found) == 1797
    assert module.spec.shape == (1, 8, 8) and module.spec.num_classes == 10 and module.spec.prompts
    examples = module.examples(3)
    assert examples.x0 is None and examples.prompts == [batches[i // 899].prompts[i % 899] for i in (0, 599, 1198)]


def test_tools_read_samples_by_number_and_are_told_of_bad_ones(tmp_path):
    module = numbered(write_numbered(tmp_path, (5, 6), bad=(7,)))
    items = module.training_items()
    assert len(items) == 11 and numbers(module.rows()[items[:7]]) == [*range(7)]
    with pytest.raises(ValueError, match="00001.tar: sample 007: not finite"):
        module.rows()[items]


# ------------------------------------------------------------------------------------------------------------- rejects


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 5), (2, 3), (4, 1)])
def test_the_next_good_sample_of_the_order_stands_in_for_a_bad_one(ranks, batch_size, tmp_path):
    """Whatever the ranks and the size of a batch, also where a batch holds no good one."""
    bad = (0, 1, 2, 11, 20, 30, 36)
    write_numbered(tmp_path, bad=bad)
    items = GroupedOrder(list(COUNTS), 2, seed=0).items(range(3 * SIZE))
    expected = [next(item for item in items[place:] if item not in bad) for place in range(2 * SIZE)]
    seen: dict[int, int] = {}
    for rank in range(ranks):
        settings = {"batch_size": batch_size, "batches_per_epoch": SIZE // (ranks * batch_size) + 1}
        module = on_rank(numbered(tmp_path, **settings), rank, ranks, folder=tmp_path)
        for step, batch in enumerate(module.train_dataloader()):
            first = (step * ranks + rank) * batch_size
            seen |= dict(enumerate(numbers(batch), first))
            assert len(batch) == batch_size
        assert module.rejects.seen == settings["batches_per_epoch"] * batch_size
        own = [(step * ranks + rank) * batch_size for step in range(settings["batches_per_epoch"])]
        places = [place for first in own for place in range(first, first + batch_size)]
        assert module.rejects.counts == {"not finite": sum(items[place] in bad for place in places)}
    assert [seen[place] for place in sorted(seen)] == expected[: len(seen)] and len(seen) >= SIZE


@pytest.mark.parametrize("workers", [0, 2])
def test_rejects_are_named_once_with_shard_key_and_reason(workers, tmp_path, caplog):
    write_numbered(tmp_path / "shards", (12, 12), bad=(2, 3, 5, 7, 14, 15, 17, 20))
    module = numbered(tmp_path / "shards", num_workers=workers, batches_per_epoch=16)
    logged = []
    on_rank(module, folder=tmp_path / "run")
    module.trainer.loggers.append(type("Logger", (), {"log_metrics": lambda self, values, step: logged.append(values)})())
    handler = logging.getLogger("pytorch_lightning")
    handler.addHandler(caplog.handler)
    try:
        assert sum(map(len, module.train_dataloader())) == 48  # two passes
    finally:
        handler.removeHandler(caplog.handler)
    lines = [json.loads(line) for line in (tmp_path / "run/rejected.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["002", "003", "005", "007", "014", "015", "017", "020"]
    assert {line["reason"] for line in lines} == {"not finite"}
    assert all(Path(line["shard"]).name == ("00000.tar" if line["key"] < "012" else "00001.tar") for line in lines)
    told = list(dict.fromkeys(record.message for record in caplog.records if "rejected" in record.message))
    assert len(told) == 5 and "rank 0: rejected 0" in told[0] and "not shown" in told[-1]
    assert module.rejects.counts == {"not finite": 16} and logged[-1] == {"data/rejected": 16.0}


def test_a_run_logs_the_total(tmp_path):
    module = numbered(write_numbered(tmp_path / "shards", (9, 9), bad=(1, 2, 12)), batches_per_epoch=6)
    loop = trainer(6, logger=CSVLogger(tmp_path, name="", version="csv"), log_every_n_steps=1, default_root_dir=tmp_path)
    loop.fit(Recorder(), module)
    rows = list(csv.DictReader((tmp_path / "csv/metrics.csv").open()))
    totals = [float(row["data/rejected"]) for row in rows if row["data/rejected"]]
    assert totals == sorted(set(totals)) and totals[-1] == 3.0
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 3


def test_the_reject_rate_ends_a_run_after_a_hundred_samples(tmp_path):
    write_numbered(tmp_path, (60, 60), bad=tuple(range(0, 120, 10)))  # one in ten
    settings = {"batch_size": 20, "batches_per_epoch": 12, "shuffle_shards": 2}
    on_rank(module := numbered(tmp_path, max_reject_rate=0.11, **settings), folder=tmp_path)
    assert len(list(module.train_dataloader())) == 12
    on_rank(module := numbered(tmp_path, max_reject_rate=0.05, **settings), 3, 4, folder=tmp_path)
    with pytest.raises(RuntimeError, match=r"rank 3: \d+ of 100 samples .* not finite.*max_reject_rate=0.05.*check_shards"):
        for count, _ in enumerate(module.train_dataloader(), 1):
            assert count < 5
    assert (tmp_path / "rejected_3.jsonl").is_file()


def test_an_outage_after_many_samples_ends_the_run_too():
    rejects, bad = Rejects(0.05), [Rejected("a.tar", "", "missing", "")]
    for _ in range(10_000):
        rejects.add(100, [], None)
    for _ in range(500):
        rejects.add(100, bad * 5, None)  # just what is allowed
    with pytest.raises(RuntimeError, match="2506 of 1050100 .*, 501 of the last 10000, more than data.max_reject_rate=0.05"):
        rejects.add(100, bad * 6, None)


def test_all_rejected_is_an_error_at_once(tmp_path):
    write_numbered(tmp_path, (30, 30), bad=tuple(range(60)))
    module = on_rank(numbered(tmp_path, num_workers=1), folder=tmp_path)
    with pytest.raises(RuntimeError, match="of 1003 samples were rejected .1003 not finite., the last 1000 one after another"):
        next(iter(module.train_dataloader()))


def test_problems_of_the_tars_are_named_and_too_many_refused(tmp_path):
    write_numbered(tmp_path / "cut", (50, 50, 50))
    content = (tmp_path / "cut/00001.tar").read_bytes()
    (tmp_path / "cut/00001.tar").write_bytes(content[: len(content) // 2])
    module = on_rank(numbered(tmp_path / "cut"), folder=tmp_path)
    assert 100 < len(module.indexed) < 150 and len(list(module.train_dataloader())) == 4
    line = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert line["reason"] == "truncated" and line["shard"].endswith("00001.tar") and module.rejects.counts == {"truncated": 1}
    twice = [one for number in range(60) for one in [(f"{number}.cls", b"1")]] * 2
    write_tar(tmp_path / "twice/0.tar", twice)
    with pytest.raises(ValueError, match="shards: 60 samples in 1 shards and 60 problems .60 duplicate key., more than max"):
        numbered(tmp_path / "twice", max_reject_rate=0.05)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="shards: 0 samples in 1 shards and 1 problems .1 garbage., no sample is left"):
        numbered(tmp_path / "none")


def test_a_shard_that_vanishes_or_shrinks_is_counted(tmp_path):
    module = on_rank(numbered(write_numbered(tmp_path), batches_per_epoch=12), folder=tmp_path)
    (tmp_path / "00001.tar").unlink()
    os.truncate(tmp_path / "00003.tar", 3000)
    assert len(list(module.train_dataloader())) == 12
    assert module.rejects.counts.keys() == {"missing", "truncated"} and module.rejects.counts["missing"] == COUNTS[1]


# ----------------------------------------------------------------------------------------------------- what is refused


CAPTIONED = ImageContents(8, channels=1, captions="txt", labels="cls", num_classes=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": "nowhere/*.tar"}, "shards='nowhere/.*there is no nowhere"),
        ({"shards": "{0000,000.tar"}, "shards='{0000,000.tar': (there is no|braces)"),
        ({"shards": []}, "names no shards"),
        ({"shards": "https://host/{0..3}.tar"}, "mode=exact: shards names https://host/0.tar, .*copy it to a file"),
        ({"shards": "pipe:cat a.tar"}, "mode=exact: shards names pipe:cat a.tar"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shuffle_shards": 0}, "shuffle_shards=0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer=-1"),
        ({"max_reject_rate": 1.5}, "max_reject_rate=1.5"),
        ({"timeout": 0}, "timeout=0"),
        ({"eval_samples": 0}, "eval_samples=0"),
        ({"validation": DigitsDataModule(), "validation_shards": "a.tar"}, "give one of them"),
        ({"validation": DigitsDataModule(), "contents": CAPTIONED}, "validation delivers no prompts, shards do"),
        ({"validation": DigitsDataModule()}, r"validation delivers shape=\(1, 8, 8\), shards shape=\(1, 2, 2\)"),
    ],
)
def test_bad_arguments_are_named(settings, message, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        numbered(folder, **settings)


def test_a_shard_that_is_named_twice_is_refused(folder):
    with pytest.raises(ValueError, match="names .*00001.tar more than once"):
        numbered(folder, shards=[str(folder / "*.tar"), str(folder / "00001.tar")])
