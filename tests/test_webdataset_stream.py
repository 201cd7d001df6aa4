"""Shards as a stream: files, pipes and servers, own draws of each rank and worker, no beginning twice, no wait for ever."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import shutil
import signal
import threading
import time
from itertools import islice
from pathlib import Path

import numpy
import pytest
import test_encoded as encoded_samples
import test_pair_reading as pairs
import torch
from numbered_shards import COUNTS, member, numbered, numbers, on_rank, write_numbered, write_tar

from datamodules.digits import DigitsDataModule
from datamodules.encoded import EncodedDataModule
from datamodules.pairs import PairsDataModule
from datamodules.streams.contents import ImageContents, PromptContents
from datamodules.streams.stored import DrawnContents, EncodedContents
from datamodules.streams.tar_stream import Shard
from distill.types import Batch

SIZE = sum(COUNTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """37 samples in five shards, not to be changed."""
    return write_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs write what they reject where they are started."""
    monkeypatch.chdir(tmp_path)


def stream(folder, count: int = 20, rank: int = 0, ranks: int = 1, trained: int = 0, **settings) -> list[list[int]]:
    module = on_rank(numbered(folder, "resampled", batches_per_epoch=count, **settings), rank, ranks, trained)
    return [numbers(batch) for batch in module.train_dataloader()]


# --------------------------------------------------------------------------------------------------------------- draws


def test_every_rank_has_the_same_number_of_batches_of_its_own(folder):
    parts = [stream(folder, 20, rank, 4) for rank in range(4)]
    assert all(len(part) == 20 and all(len(batch) == 3 for batch in part) for part in parts)
    assert len({str(part) for part in parts}) == 4
    assert {number for part in parts for batch in part for number in batch} == set(range(SIZE))
    assert parts[1] == stream(folder, 20, 1, 4), "the same run, started again from nothing, is the same"
    assert parts[0] != stream(folder, 20, 0, 4, seed=1)


def test_workers_draw_each_their_own(folder):
    both = stream(folder, 20, num_workers=2)
    assert both[0::2] != both[1::2] and len(both) == 20
    assert both[0::2] == stream(folder, 10), "worker 0 of 2 is worker 0 of 1"


def test_a_resumed_run_does_not_repeat_what_it_began_with(folder):
    began = stream(folder, 20)
    for batches in (1, 20, 500):
        resumed = stream(folder, 20, trained=batches)
        assert resumed[0] != began[0] and resumed != began
    url = f"pipe:cat {folder}/00000.tar"
    state = on_rank(numbered(folder, "resampled", shards=url), trained=7).state_dict()
    module = on_rank(numbered(folder, "resampled", shards=url), trained=7)
    module.load_state_dict(state)
    with pytest.raises(ValueError, match="data.mode=exact: the run to be resumed has resampled"):
        on_rank(numbered(folder)).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_are_parts_of_one_stream(workers, folder):
    loader = on_rank(numbered(folder, "resampled", batches_per_epoch=4, num_workers=workers)).train_dataloader()
    assert len(loader) == 4
    epochs = [numbers(batch) for _ in range(3) for batch in loader]
    assert epochs == stream(folder, 12, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_without_a_timeout_the_batches_are_the_same(mode, workers, folder):
    settings = {"batches_per_epoch": 3, "num_workers": workers}
    waits, does_not = ([], [])
    for timeout, found in ((None, waits), (60.0, does_not)):
        loader = on_rank(numbered(folder, mode, timeout=timeout, **settings)).train_dataloader()
        found += [numbers(batch) for _ in range(2) for batch in loader]
    assert waits == does_not and len(waits) == 6


def test_samples_are_mixed_in_the_buffer(folder):
    in_order = [number for batch in stream(folder, 20, shuffle_buffer=0) for number in batch]
    mixed = [number for batch in stream(folder, 20, shuffle_buffer=30) for number in batch]
    follows = [sum(b == a + 1 for a, b in zip(found, found[1:])) for found in (in_order, mixed)]
    assert follows[0] > 40 and follows[1] < 15


def test_augmentation_differs_from_sight_to_sight(tmp_path):
    write_numbered(tmp_path, (4,))
    contents = ImageContents(2, channels=1, labels="cls", num_classes=1000, flip=True)
    module = on_rank(numbered(tmp_path, "resampled", contents=contents, batches_per_epoch=4))
    image = numpy.array([[[0.0, 1.0], [0.0, 1.0]]], numpy.float32)
    write_tar(tmp_path / "00000.tar", [("0.npy", encoded_samples.to_npy(image)), ("0.cls", b"0")])
    left = torch.cat([batch.x0[:, 0, 0, 0] for batch in module.train_dataloader()])
    assert 0 < left.sum() < len(left)


# ----------------------------------------------------------------------------------------------------- where shards are


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Nothing."""


@pytest.fixture
def server(folder):
    """The address of the folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http by curl")
def test_shards_of_a_server_and_of_a_pipe_are_the_files(folder, server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = stream(folder, 8)
    names = "{00000..00004}.tar"
    assert stream(folder, 8, shards=f"{server}/{names}") == files
    assert stream(folder, 8, shards=f"pipe:cat {folder}/{names}", num_workers=1) == files
    half = stream(folder, 8, shards=[f"pipe:cat {folder}/00000.tar", f"{server}/nothing.tar"], max_reject_rate=1.0)
    assert {number for batch in half for number in batch} <= set(range(COUNTS[0]))


@pytest.mark.parametrize(("command", "reason"), [("exit 3", "unreadable"), ("cat no.tar", "unreadable"), ("true", "empty")])
def test_commands_that_fail_are_counted(command, reason, folder):
    shards = [f"pipe:{command}", str(folder / "00000.tar")]
    module = on_rank(numbered(folder, "resampled", shards=shards, batches_per_epoch=20))
    assert len(list(module.train_dataloader())) == 20
    assert module.rejects.counts.keys() == {reason} and module.rejects.seen == 60 + module.rejects.counts[reason]


def test_a_file_that_is_there_twice_is_counted_and_its_sample_delivered(tmp_path):
    write_tar(tmp_path / "a.tar", [*member(0), *member(1), member(1)[0], *member(2), *member(0)])
    module = on_rank(numbered(tmp_path, "resampled", batches_per_epoch=8))
    assert {number for batch in module.train_dataloader() for number in numbers(batch)} == {0, 1, 2}
    assert module.rejects.counts.keys() == {"duplicate key"} and {key for _, key, _ in module.rejects.named} == {"000", "001"}


def test_compressed_tars_are_streamed(folder, tmp_path):
    import gzip

    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((folder / "00002.tar").read_bytes()))
    found = stream(folder, 20, shards=str(tmp_path / "*.gz"))
    assert {number for batch in found for number in batch} == set(range(13, 24))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipe_that_hangs_ends_the_run_and_is_named(workers, folder):
    module = on_rank(numbered(folder, "resampled", shards="pipe:sleep 9", timeout=1.0, num_workers=workers), 1, 2)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="no batch in data.timeout=1 seconds: rank 1, worker 0 reads pipe:sleep 9"):
        next(iter(module.train_dataloader()))
    assert time.monotonic() - began < 5


def test_a_command_that_does_not_end_is_ended_when_its_shard_is_left(folder):
    command = f"cat {folder}/00000.tar; head -c 300000 /dev/zero; exec sleep 9"
    shard = Shard(f"pipe:{command}", PromptContents([3, 8, 8], "cls"))
    samples = iter(shard)
    assert next(samples).members == {"cls": b"0"}
    began = time.monotonic()
    samples.close()
    assert time.monotonic() - began < 5 and shard.stream.proc.poll() is not None


class Hangs(PromptContents):
    """A file system that does not answer."""

    def decode(self, members, draws):
        time.sleep(9)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_hangs_ends_an_exact_run_too(workers, folder):
    module = on_rank(numbered(folder, contents=Hangs([3, 8, 8], "cls"), timeout=1.0, num_workers=workers))
    with pytest.raises(RuntimeError, match="rank 0, worker 0 reads .*000.*tar"):
        next(iter(module.train_dataloader()))


def test_an_error_in_the_thread_that_reads_is_raised(folder):
    class Broken(PromptContents):
        def decode(self, members, draws):
            raise KeyError("a mistake in the code")

    with pytest.raises(KeyError, match="a mistake"):
        next(iter(on_rank(numbered(folder, contents=Broken([3, 8, 8], "cls"))).train_dataloader()))


# -------------------------------------------------------------------------------------------------- stored by the tools


def rows_by(batch: Batch, name: str) -> dict[bytes, int]:
    return {row.numpy().tobytes(): number for number, row in enumerate(getattr(batch, name))}


def test_a_worker_outlives_the_signals_of_its_job(folder):
    loader = iter(on_rank(numbered(folder, "resampled", num_workers=1, batches_per_epoch=40)).train_dataloader())
    found = [numbers(next(loader))]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
    found += [numbers(batch) for batch in loader]
    assert found == stream(folder, 40, num_workers=1)


def test_encoded_samples_are_those_of_the_exact_module(tmp_path):
    for shard in range(3):
        encoded_samples.write(tmp_path / "encoded", shard, 3, 11)
    exact = EncodedDataModule(str(tmp_path / "encoded"))
    settings = {"contents": EncodedContents(), "batch_size": 4, "batches_per_epoch": 20, "validation": exact}
    module = on_rank(numbered(tmp_path / "encoded", "resampled", **settings))
    assert module.spec == exact.spec and torch.equal(module.examples(3).cond["time_ids"], exact.examples(3).cond["time_ids"])
    whole, seen = exact.data[torch.arange(11)], set()
    places = rows_by(whole, "x0")
    for batch in module.train_dataloader():
        items = [places[row.numpy().tobytes()] for row in batch.x0]
        expected = exact.data[torch.tensor(items)]
        assert batch.encoded and batch.prompts is None and batch.cond.keys() == expected.cond.keys()
        assert all(torch.equal(batch.cond[name], expected.cond[name]) for name in expected.cond)
        assert all(torch.equal(batch.null[name], expected.null[name]) for name in expected.null)
        seen.update(items)
    assert seen == set(range(11)) and not module.rejects.counts


def test_pairs_have_the_noise_of_the_exact_module(tmp_path):
    exact = PairsDataModule(pairs.write(tmp_path / "pairs"))
    settings = {"contents": DrawnContents(), "batch_size": 4, "batches_per_epoch": 20}
    module = on_rank(numbered(tmp_path / "pairs", "resampled", **settings))
    assert module.spec == exact.spec
    whole, seen = exact.data[torch.arange(11)], set()
    places = rows_by(whole, "x0")
    for batch in module.train_dataloader():
        items = torch.tensor([places[row.numpy().tobytes()] for row in batch.x0])
        assert torch.equal(batch.noise, whole.noise[items]) and torch.equal(batch.cond["labels"], whole.cond["labels"][items])
        assert batch.null["labels"].tolist() == [5] * 4
        seen.update(items.tolist())
    assert seen == set(range(11))
    assert module.examples(7).cond["labels"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(ValueError, match="validation=null, validation_shards=null: DrawnContents is a stream's"):
        module.val_dataloader()


def test_a_shard_that_other_things_made_is_skipped(tmp_path):
    encoded_samples.write(tmp_path, 0, 2, 8)
    encoded_samples.write(tmp_path, 1, 2, 8, codec={"path": "b", "sha256": "e" * 64})
    write_numbered(tmp_path / "more", (5,)).joinpath("00000.tar").rename(tmp_path / "z.tar")
    module = on_rank(numbered(tmp_path, "resampled", contents=EncodedContents(), batches_per_epoch=20))
    firsts = {float(row[0, 0, 0]) for batch in module.train_dataloader() for row in batch.x0}
    assert firsts == {float(encoded_samples.sample(number)["x0"][0, 0, 0]) for number in range(4)}
    assert module.rejects.counts.keys() == {"other header"}


def test_stored_samples_are_refused_where_they_are_none(folder, tmp_path):
    encoded_samples.write(tmp_path, 0, 1, 3)
    with pytest.raises(ValueError, match="mode=exact: EncodedContents is a stream's; give EncodedDataModule"):
        numbered(tmp_path, "exact", contents=EncodedContents())
    with pytest.raises(ValueError, match="00000-of-00001.tar: encoded of format 1, not pairs or trajectories; make it again"):
        numbered(tmp_path, "resampled", contents=DrawnContents())
    with pytest.raises(ValueError, match="00000.tar: not a shard of encoded .KeyError.*encode_latents"):
        numbered(folder, "resampled", contents=EncodedContents())


# ------------------------------------------------------------------------------------------------- validation, examples


def test_validation_of_a_stream_is_of_its_local_shards_or_of_other_data(folder):
    local = numbered(folder, "resampled", eval_samples=4)
    assert [numbers(batch) for batch in local.val_dataloader()] == [[0, 9, 18, 27]]
    url = f"pipe:cat {folder}/00000.tar"
    with pytest.raises(ValueError, match="validation=null, validation_shards=null: shards names pipe:cat"):
        numbered(folder, "resampled", shards=url).val_dataloader()
    own = numbered(folder, "resampled", shards=url, validation_shards=str(folder / "00001.tar"))
    assert [numbers(batch) for batch in own.val_dataloader()] == [[9, 10, 11, 12]]
    contents = ImageContents(8, channels=1, labels="cls", num_classes=10)
    real = numbered(folder, "resampled", shards=url, contents=contents, validation=DigitsDataModule(eval_batch_size=600))
    assert sum(map(len, real.val_dataloader())) == 1797


def test_examples_are_classes_in_turn_or_the_first_prompts(folder):
    assert numbered(folder, "resampled").examples(3).cond["labels"].tolist() == [0, 1, 2]
    prompts = numbered(folder, "resampled", shards=f"pipe:cat {folder}/00001.tar", contents=PromptContents([3, 8, 8], "cls"))
    assert prompts.examples(6).prompts == ["9", "10", "11", "12", "9", "10"] == prompts.examples(6).prompts
    assert all(batch.x0 is None and len(batch.prompts) == 3 for batch in islice(prompts.train_dataloader(), 2))


def test_what_is_read_by_whom_is_said_once(folder, caplog):
    module = on_rank(numbered(folder, "resampled", num_workers=2), 0, 4)
    with caplog.at_level("INFO"):
        module.train_dataloader()
        module.train_dataloader()
    said = {record.message for record in caplog.records if record.message.startswith("data: ")}
    assert len(said) == 1 and "5 shards" in min(said) and "4 ranks with 2 readers each" in min(said)
    exact = on_rank(numbered(folder), 0, 2)
    assert "37 samples, exact: 2 ranks with 1 reader each share batches of 6" in exact.shard_map()
    assert "a pass is 6.2 batches" in exact.shard_map()
