"""Encoded samples: what is written is read, in an exact order that is resumed anywhere; damaged or mixed shards are refused."""

from __future__ import annotations

import io
import json
import pickle

import numpy
import pytest
import torch
from helpers import trainer
from pytorch_lightning import LightningModule

from datamodules.encoded import EncodedDataModule
from datamodules.members import from_npy, to_npy
from datamodules.shard_writing import write_shard
from datamodules.shards import read_folder, shard_name
from distill.codecs import IdentityCodec
from distill.space import ModelSpace
from distill.types import DataSpec

HEADER = {
    "format": 1,
    "codec": {"path": "a/vae", "sha256": "c" * 64},
    "conditioner": {"path": "a", "sha256": "d" * 64},
    "posterior": "sample",
    "shape": [2, 4, 4],
    "num_classes": None,
    "widths": {"prompt_embeds": 5, "time_ids": 6},
    "own_null": ["time_ids"],
    "embeddings": "float16",
    "dataset": {"images": "photos", "size": 16},
    "seed": 0,
}
NULL = {"prompt_embeds": torch.arange(15, dtype=torch.float16).reshape(1, 3, 5)}


def sample(number: int) -> dict:
    generator = numpy.random.RandomState(number)
    return {
        "x0": generator.randn(2, 4, 4).astype(numpy.float32),
        "prompt_embeds": generator.randn(3, 5).astype(numpy.float16),
        "time_ids": generator.randint(0, 99, 6).astype(numpy.float32),
    }


def members(arrays: dict, number: int) -> dict[str, bytes]:
    return {f"{name}.npy": to_npy(array) for name, array in arrays.items()} | {"txt": f"prompt {number}".encode()}


def write(folder, shard: int, of: int, total: int, make=sample, null=NULL, **header):
    """One shard of ``total`` samples, in ``folder``; returns its path without an ending."""
    folder.mkdir(exist_ok=True)
    path = folder / shard_name(shard, of)
    numbers = range(shard * total // of, (shard + 1) * total // of)
    header = HEADER | {"of": of, "total": total, "shard": shard} | header
    with open(path.with_suffix(".tar"), "wb") as file:
        manifest = write_shard(file, header, null, numbers[0], (members(make(i), i) for i in numbers))
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven samples in three shards, not to be changed."""
    path = tmp_path_factory.mktemp("encoded")
    for shard in range(3):
        write(path, shard, 3, 11)
    return path


def copy(folder, to):
    import shutil

    return shutil.copytree(folder, to)


# ------------------------------------------------------------------------------------------------------------- reading


def test_samples_are_what_was_written(folder):
    data = EncodedDataModule(str(folder)).data
    assert len(data) == 11 and [shard.count for shard in data.shards] == [3, 4, 4]
    items = torch.tensor([10, 0, 3, 6, 2])
    batch = data[items]
    for row, item in enumerate(items.tolist()):
        for name, value in {"x0": batch.x0, **batch.cond}.items():
            assert value.dtype == torch.float32
            assert numpy.array_equal(value[row].numpy(), sample(item)[name].astype(numpy.float32)), (item, name)
    assert batch.encoded and batch.prompts is None and len(batch) == 5
    assert torch.equal(batch.null["prompt_embeds"], NULL["prompt_embeds"].float().expand(5, 3, 5))
    assert batch.null["prompt_embeds"].stride(0) == 0 and torch.equal(batch.null["time_ids"], batch.cond["time_ids"])


def test_shards_of_before_there_were_places_are_read_and_damage_is_named(folder, tmp_path):
    old = copy(folder, tmp_path / "old")
    for path in old.glob("*.json"):
        manifest = json.loads(path.read_text())
        kept = {key: manifest[key] for key in ("header", "count", "bytes", "sha256", "offsets")}
        path.write_text(json.dumps(kept))
    items = torch.tensor([10, 0, 5])
    new, found = EncodedDataModule(str(folder)), EncodedDataModule(str(old))
    assert torch.equal(found.data[items].x0, new.data[items].x0) and found.spec == new.spec
    assert torch.equal(found.data[items].cond["time_ids"], new.data[items].cond["time_ids"]) and found.order() == new.order()
    file = old / "00001-of-00003.tar"
    content, start = bytearray(file.read_bytes()), new.data.shards[1].offsets[2]
    content[start : start + 600] = b"x" * 600
    file.write_bytes(content)
    with pytest.raises(ValueError, match="00001-of-00003.tar: sample 000000005 is damaged"):
        found.data[torch.tensor([5])]


def test_every_single_byte_of_a_member_is_guarded(folder, tmp_path):
    file = copy(folder, tmp_path / "bit") / "00000-of-00003.tar"
    module = EncodedDataModule(str(file.parent))
    content = bytearray(file.read_bytes())
    begin, size, _ = module.data.shards[0].places[2, module.data.shards[0].names.index("x0.npy")].tolist()
    content[begin + size - 1] ^= 1  # the last bit of a value: still an array of the right shape
    file.write_bytes(content)
    assert len(module.data[torch.tensor([0, 1, 3])]) == 3
    with pytest.raises(ValueError, match="00000-of-00003.tar: sample 000000002 is damaged .x0.npy: not the bytes that"):
        module.data[torch.tensor([2])]


def test_more_shards_than_files_that_are_kept_open(folder, monkeypatch):
    monkeypatch.setattr("datamodules.shards.OPEN_FILES", 2)
    rows = EncodedDataModule(str(folder)).data
    order = torch.tensor([0, 4, 8, 1, 9, 5, 10, 2])
    firsts = [float(sample(number)["x0"][0, 0, 0]) for number in order.tolist()]
    assert rows[order].x0[:, 0, 0, 0].tolist() == pytest.approx(firsts) and len(rows.files.descriptors) == 2
    copied = pickle.loads(pickle.dumps(rows))
    assert not copied.files.descriptors and torch.equal(copied[order].x0, rows[order].x0)


def test_webdataset_reads_the_same_samples(folder):
    from webdataset import WebDataset

    found = list(WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False, empty_check=False))
    assert [entry["__key__"] for entry in found] == [f"{i:09d}" for i in range(11)]
    for number, entry in enumerate(found):
        assert {key for key in entry if key[0] != "_"} == {"x0.npy", "prompt_embeds.npy", "time_ids.npy", "txt"}
        assert numpy.array_equal(from_npy([entry["x0.npy"]])[0], sample(number)["x0"])
        assert entry["txt"] == f"prompt {number}".encode()


def test_spec_says_what_made_them_and_another_space_is_refused(folder):
    spec = EncodedDataModule(str(folder)).spec
    assert spec == DataSpec((2, 4, 4), None, False, {"prompt_embeds": 5, "time_ids": 6}, "c" * 64, "d" * 64)
    codec = IdentityCodec()
    assert ModelSpace(codec).spec(spec).shape == (2, 4, 4)
    codec.identity = {"path": "b", "sha256": "e" * 64}
    with pytest.raises(ValueError, match="encoded by a codec with sha256 cccccccccccc, but model.space.codec is .*'b'"):
        ModelSpace(codec).spec(spec)


def test_pixels_that_no_codec_encoded_are_still_to_be_encoded(tmp_path):
    write(tmp_path / "pixels", 0, 1, 2, codec=None, conditioner=None)
    module = EncodedDataModule(str(tmp_path / "pixels"))
    assert module.spec.codec is None and not module.data[torch.tensor([0])].encoded


def test_labels_keep_their_type_and_examples_run_through_the_classes(tmp_path):
    def labelled(number):
        return {"x0": sample(number)["x0"], "labels": numpy.int64(number % 3)}

    null = {"labels": torch.tensor([3])}
    write(tmp_path / "labels", 0, 1, 4, labelled, null, num_classes=3, widths={}, own_null=[])
    module = EncodedDataModule(str(tmp_path / "labels"))
    batch = module.data[torch.tensor([2, 1])]
    assert batch.cond["labels"].tolist() == [2, 1] and batch.cond["labels"].dtype == torch.int64
    assert batch.null["labels"].tolist() == [3, 3]
    examples = module.examples(5)
    assert examples.cond["labels"].tolist() == [0, 1, 2, 0, 1] and examples.null["labels"].tolist() == [3] * 5
    assert examples.x0 is None


@pytest.mark.parametrize(("count", "numbers"), [(4, [0, 2, 5, 8]), (13, [*range(11), 0, 1])])
def test_examples_are_conditions_of_evenly_spaced_samples(count, numbers, folder):
    module = EncodedDataModule(str(folder))
    examples = module.examples(count)
    assert examples.x0 is None and len(examples) == count
    assert torch.equal(examples.cond["prompt_embeds"], module.data[torch.tensor(numbers)].cond["prompt_embeds"])


# --------------------------------------------------------------------------------------------------------------- order


class Recorder(LightningModule):
    """Keeps the first number of each training sample that it sees."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen += batch.x0[:, 0, 0, 0].tolist()
        return self.layer(torch.zeros(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def run(folder, steps, workers=0, resume=None, save=None, **settings):
    model, data = Recorder(), EncodedDataModule(str(folder), batches_per_epoch=3, num_workers=workers, **settings)
    loop = trainer(steps)
    loop.fit(model, data, ckpt_path=resume)
    if save:
        loop.save_checkpoint(save)
    return model.seen


def test_each_pass_has_all_samples_once_and_is_resumed_exactly(folder, tmp_path):
    whole = run(folder, 11, batch_size=2)
    firsts = sorted(float(sample(number)["x0"][0, 0, 0]) for number in range(11))
    assert sorted(whole[:11]) == sorted(whole[11:]) == pytest.approx(firsts) and whole[:11] != whole[11:]
    cut = run(folder, 4, batch_size=2, save=tmp_path / "a.ckpt")
    assert cut + run(copy(folder, tmp_path / "moved"), 11, workers=1, batch_size=2, resume=tmp_path / "a.ckpt") == whole


def test_another_seed_or_other_samples_are_refused_on_resuming(folder, tmp_path):
    run(folder, 2, batch_size=2, save=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="data.seed=1: the run to be resumed has 0"):
        run(folder, 4, batch_size=2, resume=tmp_path / "a.ckpt", seed=1)
    write(tmp_path / "other", 0, 1, 11)
    with pytest.raises(ValueError, match="data.folder=.sha256"):
        run(tmp_path / "other", 4, batch_size=2, resume=tmp_path / "a.ckpt")


def test_validation_reads_evenly_spaced_samples_in_order(folder):
    batches = list(EncodedDataModule(str(folder), eval_samples=4, eval_batch_size=3).val_dataloader())
    assert [len(batch) for batch in batches] == [2, 2]
    firsts = torch.cat([batch.x0 for batch in batches])[:, 0, 0, 0].tolist()
    assert firsts == pytest.approx([float(sample(number)["x0"][0, 0, 0]) for number in (0, 2, 5, 8)])
    assert sum(map(len, EncodedDataModule(str(folder), eval_batch_size=3).val_dataloader())) == 11


# ----------------------------------------------------------------------------------------------------- what is refused


def test_missing_things_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder='.*nowhere': there is no such folder"):
        EncodedDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        EncodedDataModule(str(tmp_path))
    part = copy(folder, tmp_path / "part")
    (part / "00001-of-00003.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing \(00001-of-00003 first\)"):
        EncodedDataModule(str(part))
    (copy(folder, tmp_path / "tar") / "00002-of-00003.tar").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003.tar: missing"):
        EncodedDataModule(str(tmp_path / "tar"))


def test_truncated_and_foreign_tars_are_named(folder, tmp_path):
    cut = copy(folder, tmp_path / "cut") / "00001-of-00003.tar"
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="00001-of-00003.tar: has .* bytes, .* truncated"):
        EncodedDataModule(str(cut.parent))
    swapped = copy(folder, tmp_path / "swapped")
    (swapped / "00002-of-00003.tar").write_bytes((swapped / "00001-of-00003.tar").read_bytes())
    with pytest.raises(ValueError, match="its own header is not that of 00002-of-00003.json"):
        EncodedDataModule(str(swapped))
    zeros = copy(folder, tmp_path / "zeros") / "00000-of-00003.tar"
    zeros.write_bytes(b"x" * zeros.stat().st_size)
    with pytest.raises(ValueError, match="00000-of-00003.tar: not a tar"):
        EncodedDataModule(str(zeros.parent))


def test_damage_inside_is_found_by_its_hash_or_when_it_is_read(folder, tmp_path):
    file = copy(folder, tmp_path / "damaged") / "00001-of-00003.tar"
    shard = read_folder(file.parent, "encoded")[1]
    content = bytearray(file.read_bytes())
    content[shard.offsets[1] : shard.offsets[1] + 600] = b"x" * 600
    file.write_bytes(content)
    with pytest.raises(ValueError, match="00001-of-00003.tar: sha256 .*: damaged"):
        EncodedDataModule(str(file.parent), verify=True)
    module = EncodedDataModule(str(file.parent))
    with pytest.raises(ValueError, match="00001-of-00003.tar: sample 000000004 is damaged"):
        module.data[torch.tensor([4])]
    assert EncodedDataModule(str(folder), verify=True).data[torch.tensor([4])].encoded


@pytest.mark.parametrize(
    ("key", "value"),
    [("codec", {"path": "a/vae", "sha256": "f" * 64}), ("conditioner", None), ("posterior", "mode"), ("shape", [2, 8, 8])],
)
def test_shards_of_different_things_are_refused(key, value, folder, tmp_path):
    mixed = copy(folder, tmp_path / "mixed")
    write(mixed, 1, 3, 11, **{key: value})
    with pytest.raises(ValueError, match=f"00000-of-00003.json and 00001-of-00003.json differ in {key}"):
        EncodedDataModule(str(mixed))
    write(mixed, 1, 3, 11, codec={"path": "elsewhere", "sha256": "c" * 64})
    assert len(EncodedDataModule(str(mixed)).data) == 11


def test_manifests_that_are_none_or_of_another_format_are_named(folder, tmp_path):
    for name, text in {"text": "{", "list": "[]", "empty": "{}"}.items():
        file = copy(folder, tmp_path / name) / "00000-of-00003.json"
        file.write_text(text)
        with pytest.raises(ValueError, match="00000-of-00003.json: not a manifest"):
            EncodedDataModule(str(file.parent))
    write(tmp_path / "format", 0, 1, 2, format=2)
    with pytest.raises(ValueError, match="format 2 is not known"):
        EncodedDataModule(str(tmp_path / "format"))


def test_a_pickle_in_a_shard_is_not_executed(tmp_path):
    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    stream = io.BytesIO()
    numpy.lib.format.write_array(stream, numpy.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        from_npy([stream.getvalue()])
    with pytest.raises(ValueError):
        to_npy(numpy.array([Evil()], dtype=object))
    path = tmp_path / "evil" / shard_name(0, 1)
    path.parent.mkdir()
    with open(path.with_suffix(".tar"), "wb") as file:
        manifest = write_shard(file, HEADER | {"of": 1, "total": 1, "shard": 0}, NULL, 0, [{"x0.npy": stream.getvalue()}])
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="sample 000000000 is damaged"):
        EncodedDataModule(str(path.parent)).data[torch.tensor([0])]
    assert not flag.exists()


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"seed": -1}, {"eval_samples": 0}, {"num_workers": -1}])
def test_arguments_out_of_range_are_named(setting, folder):
    ((key, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{key}={value}: give a number of at least"):
        EncodedDataModule(str(folder), **setting)


def test_a_shard_is_the_same_bytes_each_time(tmp_path):
    first, second = (write(tmp_path / name, 0, 1, 3).with_suffix(".tar").read_bytes() for name in ("a", "b"))
    assert first == second
