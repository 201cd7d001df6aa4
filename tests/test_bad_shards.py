"""The fourteen kinds of bad shards in training: a named error or a counted skip in both modes, every good sample, no hang."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from bad_shards import GOOD, KINDS, LATENT, good_shard, write_bad

from datamodules.encoded import EncodedDataModule
from datamodules.streams.contents import ImageContents
from datamodules.streams.stored import EncodedContents
from datamodules.webdataset import WebDatasetDataModule

PICTURES = [kind for kind in KINDS if not KINDS[kind].encoded and kind != "missing"]
LATENTS = [kind for kind in KINDS if KINDS[kind].encoded]
OTHERS = [f"more{number}" for number in range(4)]
WITHIN = 30.0
"""Seconds after which a test is taken to hang; most need less than one."""
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def module(shards, mode, contents=None, **settings) -> WebDatasetDataModule:
    """A data module of pictures of 8 x 8 in which all samples may be bad."""
    contents = contents or ImageContents(size=8, captions="txt")
    own = {"batch_size": 2, "batches_per_epoch": 24, "shuffle_buffer": 0, "max_reject_rate": 1.0, "timeout": WITHIN}
    return WebDatasetDataModule([str(shard) for shard in shards], contents, mode, **own | settings)


def delivered(data: WebDatasetDataModule) -> set[str]:
    """The keys of the samples of an epoch, by their captions."""
    prompts: set[str] = set()
    for batch in data.train_dataloader():
        assert batch.x0.shape == (2, 3, 8, 8) and torch.isfinite(batch.x0).all()
        prompts.update(batch.prompts)
    return {prompt.removeprefix("caption of ") for prompt in prompts}


def in_time(work):
    """What ``work`` gives or raises; fails if it takes too long."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WITHIN)
    assert found, f"hangs: no answer in {WITHIN} seconds"
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


def reason_of(kind: str) -> str | None:
    """What training counts a kind under."""
    return KINDS[kind].indexed or KINDS[kind].checked


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize("kind", PICTURES)
def test_each_kind_is_counted_and_all_good_samples_are_delivered(kind, mode, tmp_path):
    bad = write_bad(kind, tmp_path)
    data = module([bad, good_shard(tmp_path / "00001.tar", OTHERS)], mode)
    good = in_time(lambda: delivered(data))
    extra = {"in grey", "in four inks"} if kind == "grayscale and CMYK" else set()
    assert good - {"bad"} == {*OTHERS, *GOOD[: KINDS[kind].good]} | extra
    assert "bad" not in good
    assert set(data.rejects.counts) == ({reason_of(kind)} if reason_of(kind) else set())


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize("kind", PICTURES)
def test_each_reject_says_where_and_which(kind, mode, tmp_path, caplog):
    bad = write_bad(kind, tmp_path)
    data = module([bad, good_shard(tmp_path / "00001.tar", OTHERS)], mode)
    with caplog.at_level("WARNING", "pytorch_lightning"):
        in_time(lambda: delivered(data))
    whole = reason_of(kind) in ("truncated", "empty", "garbage", "bad header")
    key = "shard" if whole else "good0" if kind == "duplicate key" else "bad"
    lines = [record.getMessage() for record in caplog.records if "rejected" in record.getMessage()]
    assert all(f"rejected {key} of {bad}: {reason_of(kind)} (" in line for line in lines)
    assert bool(lines) == (reason_of(kind) is not None)


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize("kind", ["empty", "garbage"])
def test_shards_that_hold_nothing_end_the_run_at_once(kind, mode, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=kind) as failure:
        in_time(lambda: delivered(module([write_bad(kind, tmp_path)], mode)))
    assert "tools/check_shards.py" in str(failure.value)


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_samples_that_are_all_bad_end_the_run(mode, tmp_path):
    good_shard(tmp_path / "00000.tar")
    data = module([tmp_path / "00000.tar"], mode, ImageContents(size=8, captions="json.text"))
    with pytest.raises(RuntimeError, match=r"samples were rejected \(.*no caption.*tools/check_shards.py"):
        in_time(lambda: delivered(data))


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_too_many_rejects_end_the_run(mode, tmp_path):
    files = [write_bad("bad image", tmp_path, shard) for shard in range(2)]
    data = module(files, mode, batches_per_epoch=200, max_reject_rate=0.05)
    with pytest.raises(RuntimeError, match=r"samples were rejected \([0-9]+ bad image\), more than data.max_reject_rate=0.05"):
        in_time(lambda: delivered(data))
    data = module(files, mode, batches_per_epoch=200, max_reject_rate=0.5)
    assert in_time(lambda: delivered(data)) == set(GOOD) and data.rejects.counts.keys() == {"bad image"}


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_a_missing_shard_is_named_before_anything_is_read(mode, tmp_path):
    good_shard(tmp_path / "00000.tar")
    with pytest.raises(FileNotFoundError, match="00001.tar"):
        module([tmp_path / "{00000..00001}.tar"], mode)


def test_a_shard_that_goes_missing_is_counted(tmp_path):
    files = [good_shard(tmp_path / "00000.tar"), good_shard(tmp_path / "00001.tar", OTHERS)]
    data = module(files, "resampled")
    files[0].unlink()
    assert in_time(lambda: delivered(data)) == set(OTHERS) and set(data.rejects.counts) == {"missing"}


@pytest.mark.parametrize("kind", LATENTS)
def test_latents_that_are_bad_are_counted_in_a_stream(kind, tmp_path):
    data = module([write_bad(kind, tmp_path)], "resampled", EncodedContents())
    batches = in_time(lambda: list(data.train_dataloader()))
    assert all(batch.x0.shape == (2, *LATENT) and torch.isfinite(batch.x0).all() for batch in batches)
    assert len({float(row.sum()) for batch in batches for row in batch.x0}) == 4
    assert set(data.rejects.counts) == {reason_of(kind)}


@pytest.mark.parametrize("kind", LATENTS)
def test_a_latent_that_is_bad_is_named_in_the_exact_order(kind, tmp_path):
    file = write_bad(kind, tmp_path)
    data = EncodedDataModule(str(tmp_path), batch_size=json.loads(file.with_suffix(".json").read_text())["count"])
    words = {"NaN latent": "not finite", "wrong latent shape": "not the bytes of an array of shape"}[kind]
    with pytest.raises(ValueError, match=f"00000-of-00001.tar: sample 000000002 is damaged .x0.npy: {words}"):
        in_time(lambda: next(iter(data.train_dataloader())))


@pytest.mark.parametrize("kind", ["truncated", "garbage", "bad header", "bad image", "huge"])
def test_workers_send_what_they_reject(kind, tmp_path):
    data = module([write_bad(kind, tmp_path), good_shard(tmp_path / "00001.tar", OTHERS)], "exact", num_workers=1)
    assert set(OTHERS) <= in_time(lambda: delivered(data)) and set(data.rejects.counts) == {reason_of(kind)}
