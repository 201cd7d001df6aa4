"""Pairs: what is written is read and its noise drawn again bit for bit; mixtures, orders, damage, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from helpers import trainer
from pytorch_lightning import LightningModule
from script import load_script

from datamodules.digits import DigitsDataModule
from datamodules.encoded import EncodedDataModule
from datamodules.members import checksum, from_npy, to_npy, to_png
from datamodules.pairs import PairsDataModule, noise_hash
from datamodules.shard_writing import save_shard
from datamodules.synthetic import SyntheticDataModule
from distill.checkpoints import atomic_writer
from distill.noise import SeededNoise
from distill.types import DataSpec

SHAPE = [3, 4, 4]
HEADER = {
    "kind": "pairs",
    "format": 1,
    "teacher": {"path": "somewhere", "sha256": "a" * 64},
    "codec": None,
    "conditioner": None,
    "guidance": None,
    "guidance_range": None,
    "anchored": None,
    "steps": 4,
    "shape": SHAPE,
    "num_classes": 5,
    "widths": {},
    "own_null": ["guidance", "time_ids"],
    "prompts": False,
    "seed": 7,
    "noise_check": noise_hash(7, SHAPE),
    "computed_by": {"torch": "1", "numpy": "1.0", "device": "cpu"},
}
NULL = {"labels": torch.tensor([5])}
CODEC = {"path": "vae", "sha256": "c" * 64}


def sample(number: int) -> numpy.ndarray:
    return numpy.random.RandomState(number).randn(*SHAPE).astype(numpy.float32)


def pair(number: int) -> dict[str, bytes]:
    record = {"noise": [7, number], "labels": number % 5}
    return {"x0.npy": to_npy(sample(number)), "json": json.dumps(record).encode()}


def inverted(number: int) -> dict[str, bytes]:
    members = {"x0.npy": to_npy(100 + sample(number)), "noise.npy": to_npy(200 + sample(number))}
    return members | {"json": json.dumps({"labels": number % 5}).encode()}


def write(folder: Path, total: int = 11, of: int = 3, make=pair, null=NULL, only=None, **header) -> str:
    for shard in range(of) if only is None else [only]:
        numbers = range(shard * total // of, (shard + 1) * total // of)
        own = HEADER | {"of": of, "total": total, "shard": shard} | header
        save_shard(folder, atomic_writer, own, null, numbers[0], map(make, numbers))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eleven pairs in three shards, not to be changed."""
    path = tmp_path_factory.mktemp("pairs") / "eleven"
    write(path)
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


# ------------------------------------------------------------------------------------------------------------- reading


def test_pairs_are_what_was_written_and_noise_is_that_of_their_number(folder):
    module = PairsDataModule(str(folder))
    items = torch.tensor([10, 0, 3, 6, 2, 3])
    batch = module.data[items]
    assert torch.equal(batch.x0, torch.from_numpy(numpy.stack([sample(item) for item in items.tolist()])))
    for row, item in enumerate(items.tolist()):
        assert torch.equal(batch.noise[row], SeededNoise(7, [item], SHAPE).draw()[0])
    assert batch.cond["labels"].tolist() == [0, 0, 3, 1, 2, 3] and batch.cond["labels"].dtype == torch.int64
    assert batch.null["labels"].tolist() == [5] * 6 and set(batch.cond) == set(batch.null) == {"labels"}
    assert batch.prompts is None and not batch.encoded and batch.x0.is_contiguous() and batch.x0.dtype == torch.float32


def test_spec_says_whose_pairs_they_are(folder, tmp_path):
    assert PairsDataModule(str(folder)).spec == DataSpec(tuple(SHAPE), 5, paired=True, teacher="a" * 64)
    write(tmp_path / "latents", codec=CODEC, conditioner={"sha256": "d" * 64}, widths={"prompt_embeds": 2}, num_classes=None)
    module = PairsDataModule(str(tmp_path / "latents"))
    expected = DataSpec(tuple(SHAPE), None, False, {"prompt_embeds": 2}, "c" * 64, "d" * 64, True, "a" * 64)
    assert module.spec == expected and module.data[torch.tensor([1])].encoded


def test_webdataset_reads_the_same_pairs(folder):
    from webdataset import WebDataset

    found = list(WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False, empty_check=False))
    assert [entry["__key__"] for entry in found] == [f"{i:09d}" for i in range(11)]
    for number, entry in enumerate(found):
        assert {key for key in entry if key[0] != "_"} == {"x0.npy", "json"}
        assert numpy.array_equal(from_npy([entry["x0.npy"]])[0], sample(number))
        assert json.loads(entry["json"]) == {"noise": [7, number], "labels": number % 5}


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_their_bytes_in_minus_one_to_one(channels, tmp_path):
    pixels = numpy.random.RandomState(0).randint(0, 256, (4, channels, 5, 6), dtype=numpy.uint8)
    pixels[0, 0, 0, :2] = 0, 255

    def make(number):
        return {"png": to_png(pixels[number]), "json": json.dumps({"noise": [7, number]}).encode()}

    shape = [channels, 5, 6]
    write(tmp_path / "a", 4, 2, make, {}, shape=shape, num_classes=None, noise_check=noise_hash(7, shape))
    batch = PairsDataModule(str(tmp_path / "a")).data[torch.tensor([3, 0])]
    assert torch.equal(batch.x0, torch.from_numpy(pixels[[3, 0]].astype(numpy.float32)) / 127.5 - 1)
    assert batch.x0[1, 0, 0, 0] == -1 and batch.x0[1, 0, 0, 1] == 1 and batch.cond == batch.null == {}


def test_half_precision_guidance_prompts_and_array_conditions(tmp_path):
    def make(number):
        arrays = {"x0": sample(number).astype(numpy.float16), "time_ids": numpy.full(2, number, numpy.float32)}
        arrays["prompt_embeds"] = numpy.full((3, 2), number, numpy.float16)
        record = {"noise": [7, number], "guidance": 1.5 + number / 7, "prompt": f"größe {number}"}
        return {f"{name}.npy": to_npy(value) for name, value in arrays.items()} | {"json": json.dumps(record).encode()}

    null = {"prompt_embeds": torch.full((1, 3, 2), -1.0, dtype=torch.float16)}
    write(tmp_path / "a", 5, 2, make, null, widths={"prompt_embeds": 2}, num_classes=None)
    batch = PairsDataModule(str(tmp_path / "a")).data[torch.tensor([4, 1])]
    assert torch.equal(batch.x0, torch.from_numpy(numpy.stack([sample(4), sample(1)])).half().float())
    assert torch.equal(batch.cond["guidance"], torch.tensor([1.5 + 4 / 7, 1.5 + 1 / 7]))
    assert torch.equal(batch.null["guidance"], batch.cond["guidance"])  # what a pair was guided by has no null
    assert torch.equal(batch.null["time_ids"], torch.tensor([[4.0, 4.0], [1.0, 1.0]]))
    assert batch.cond["prompt_embeds"][:, 0, 0].tolist() == [4, 1] and batch.cond["prompt_embeds"].dtype == torch.float32
    assert batch.null["prompt_embeds"].unique().tolist() == [-1] and batch.prompts is None
    write(tmp_path / "text", 5, 2, make, null, widths={"prompt_embeds": 2}, num_classes=None, prompts=True)
    module = PairsDataModule(str(tmp_path / "text"))
    assert module.spec.prompts and module.data[torch.tensor([4, 1])].prompts == ["größe 4", "größe 1"]


def test_rows_read_on_in_another_process_and_after_a_fork(folder):
    rows = PairsDataModule(str(folder)).data
    items = torch.tensor([5, 9])
    before = rows[items]
    again = pickle.loads(pickle.dumps(rows))[items]
    assert torch.equal(before.x0, again.x0) and torch.equal(before.noise, again.noise)
    alone, forked = (
        list(PairsDataModule(str(folder), batch_size=2, batches_per_epoch=6, num_workers=workers).train_dataloader())
        for workers in (0, 2)
    )
    assert all(torch.equal(one.x0, other.x0) and torch.equal(one.noise, other.noise) for one, other in zip(alone, forked))


# ------------------------------------------------------------------------------------------------------ several folders


@pytest.fixture
def mixed(folder, tmp_path) -> list[str]:
    """The folder of eleven, and four pairs of real data with inverted noise."""
    return [str(folder), write(tmp_path / "real", 4, 1, inverted, noise_check=None, steps=9)]


def test_folders_are_numbered_one_after_the_other(mixed):
    batch = PairsDataModule(mixed).data[torch.tensor([12, 3, 14, 11, 0])]
    expected = [100 + sample(1), sample(3), 100 + sample(3), 100 + sample(0), sample(0)]
    assert torch.equal(batch.x0, torch.from_numpy(numpy.stack(expected)))
    seeded = SeededNoise(7, [3, 0], SHAPE).draw()
    assert torch.equal(batch.noise[[1, 4]], seeded)
    assert torch.equal(batch.noise[[0, 2, 3]], torch.from_numpy(numpy.stack([200 + sample(n) for n in (1, 3, 0)])))
    assert batch.cond["labels"].tolist() == [1, 3, 3, 0, 0] and batch.null["labels"].tolist() == [5] * 5


def test_repeats_say_how_often_pairs_come_in_a_pass(mixed):
    module = PairsDataModule(mixed, repeat=[1, 3], batch_size=23, batches_per_epoch=2)
    for batch in module.train_dataloader():
        real = batch.x0.flatten(1).mean(1) > 50
        assert int(real.sum()) == 12 and len(batch) == 23
        assert len(batch.x0[real].flatten(1).unique(dim=0)) == 4 and len(batch.x0[~real].flatten(1).unique(dim=0)) == 11
    for repeat in ([1], [1, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match=f"repeat=.{repeat[0]}.*: give a number of at least 1 for each of 2 folders"):
            PairsDataModule(mixed, repeat=repeat)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher", {"path": "somewhere", "sha256": "b" * 64}),
        ("guidance", {"class_path": "ClassifierFreeGuidance"}),
        ("guidance_range", [1.0, 2.0]),
        ("codec", CODEC),
        ("num_classes", 4),
    ],
)
def test_folders_that_are_no_pairs_of_one_flow_are_refused(key, value, folder, tmp_path):
    moved = write(tmp_path / "moved", 4, 1, teacher={"path": "elsewhere", "sha256": "a" * 64})
    assert PairsDataModule([str(folder), moved]).size == 15
    other = write(tmp_path / "other", 4, 1, **{key: value})
    with pytest.raises(ValueError, match=f"folder='.*other': its pairs have {key}=.*no pairs of one flow"):
        PairsDataModule([str(folder), other])


# ----------------------------------------------------------------------------------------------------------- real data


def test_validation_and_examples_are_of_the_real_data(tmp_path):
    shape = [1, 8, 8]

    def make(number):
        return {"x0.npy": to_npy(numpy.zeros(shape, numpy.float32)), "json": b'{"noise": [7, %d], "labels": 3}' % number}

    settings = dict(shape=shape, num_classes=10, noise_check=noise_hash(7, shape))
    write(tmp_path / "a", 6, 1, make, {"labels": torch.tensor([10])}, **settings)
    real = DigitsDataModule(eval_batch_size=600, captions=True)
    module = PairsDataModule(str(tmp_path / "a"), real=real, eval_batch_size=2)
    digits = torch.cat([batch.x0 for batch in DigitsDataModule(eval_batch_size=600).val_dataloader()])
    for loader in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        assert torch.equal(torch.cat([batch.x0 for batch in loader]), digits)
    assert module.eval_batch_size == real.eval_batch_size == 599
    assert module.examples(12).cond["labels"].tolist() == [*range(10), 0, 1]
    assert module.spec.prompts  # of validation: a space without a conditioner is refused before training
    assert all((batch.x0 == 0).all() and batch.noise is not None for batch in module.train_dataloader())
    module.trainer = type("", (), {"global_rank": 1, "world_size": 2, "fit_loop": DigitsFit()})()
    module.setup("validate")
    assert torch.equal(next(iter(module.val_dataloader())).x0, digits[450:900])


class DigitsFit:
    """As much of a fit loop as says that nothing was trained."""

    class epoch_loop:
        class batch_progress:
            class total:
                processed = 0


def test_without_real_data_validation_reads_the_pairs(folder):
    module = PairsDataModule(str(folder), eval_samples=4, eval_batch_size=3)
    batches = list(module.val_dataloader())
    assert torch.equal(torch.cat([batch.x0 for batch in batches]), module.data[torch.tensor([0, 2, 5, 8])].x0)
    assert [len(batch) for batch in batches] == [2, 2] and module.examples(7).cond["labels"].tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("real", "words"),
    [
        (SyntheticDataModule((3, 4, 5), 5), r"real delivers shape=\(3, 4, 5\), the pairs shape=\(3, 4, 4\)"),
        (SyntheticDataModule((3, 4, 4), 6), "real delivers num_classes=6, the pairs num_classes=5"),
        (SyntheticDataModule((3, 4, 4)), "real delivers num_classes=None, the pairs num_classes=5"),
    ],
)
def test_real_data_of_another_kind_is_refused(real, words, folder):
    with pytest.raises(ValueError, match=words):
        PairsDataModule(str(folder), real=real)


def test_pixels_may_stand_for_latents_in_validation(tmp_path):
    write(tmp_path / "a", codec=CODEC)
    assert PairsDataModule(str(tmp_path / "a"), real=SyntheticDataModule((3, 32, 32), 5)).spec.shape == (3, 4, 4)


# --------------------------------------------------------------------------------------------------------------- order


class Recorder(LightningModule):
    """Keeps the first number of the noise of each training pair that it sees."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        self.seen += batch.noise[:, 0, 0, 0].tolist()
        return self.layer(torch.zeros(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        """Nothing."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def run(folders, steps, resume=None, save=None, **settings):
    model, data = Recorder(), PairsDataModule(folders, batches_per_epoch=3, batch_size=2, **settings)
    loop = trainer(steps)
    loop.fit(model, data, ckpt_path=resume)
    if save:
        loop.save_checkpoint(save)
    return model.seen


def test_a_pass_has_every_pair_and_is_resumed_exactly(mixed, tmp_path):
    whole = run(mixed, 17, repeat=[1, 2])
    assert len(set(whole[:19])) == 15 and sorted(whole[:19]) != sorted(whole[19:])
    cut = run(mixed, 5, repeat=[1, 2], save=tmp_path / "a.ckpt")
    moved = [str(shutil.copytree(folder, tmp_path / f"moved{number}")) for number, folder in enumerate(mixed)]
    assert cut + run(moved, 17, resume=tmp_path / "a.ckpt", repeat=[1, 2], num_workers=1) == whole
    with pytest.raises(ValueError, match=r"data.repeat=\[1, 1\]: the run to be resumed has \[1, 2\]"):
        run(mixed, 17, resume=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="data.folder=.sha256"):
        run(mixed[:1], 17, resume=tmp_path / "a.ckpt", repeat=[1])


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_truncated_shard_is_named(copied):
    cut = copied / "00001-of-00003.tar"
    module = PairsDataModule(str(copied))
    cut.write_bytes(cut.read_bytes()[:-10000])
    with pytest.raises(ValueError, match="00001-of-00003.tar: has .* bytes, .*truncated or replaced; make it again by tools"):
        PairsDataModule(str(copied))
    with pytest.raises(ValueError, match="00001-of-00003.tar: sample 000000006 is damaged"):
        module.data[torch.tensor([0, 6])]  # cut while a run reads it


@pytest.mark.parametrize(("member", "bit"), [("x0.npy", 1), ("x0.npy", 128), ("json", 4)])
def test_a_damaged_member_is_named_with_its_shard_and_key(member, bit, copied):
    file = copied / "00002-of-00003.tar"
    rows = PairsDataModule(str(copied)).data.folders[0]
    begin, size, _ = rows.shards[2].places[1, rows.shards[2].names.index(member)].tolist()
    content = bytearray(file.read_bytes())
    content[begin + size - 2] ^= bit
    file.write_bytes(content)
    module = PairsDataModule(str(copied))
    assert len(module.data[torch.tensor([0, 7, 9, 10])]) == 4
    expected = f"00002-of-00003.tar: sample 000000008 is damaged .{member}: .*; delete it and make it again by tools/make_pairs"
    with pytest.raises(ValueError, match=expected):
        module.data[torch.tensor([7, 8])]
    with pytest.raises(ValueError, match="00002-of-00003.tar: sha256 .*: damaged; delete it"):
        PairsDataModule(str(copied), verify=True)


def test_damage_anywhere_in_a_large_member_is_found():
    content = bytearray(numpy.random.RandomState(0).bytes(20_001))
    before = checksum(bytes(content))
    for place in [*range(0, 20_001, 511), 20_000]:
        content[place] ^= 64
        assert checksum(memoryview(content)) != before
        content[place] ^= 64
    assert checksum(content) == before
    content[4096:12288] = bytes(8192)  # blocks of a disk that were never written
    assert checksum(content) != before


def test_arrays_of_all_kinds_are_read_and_those_that_differ_are_not():
    arrays = [numpy.asfortranarray(numpy.random.RandomState(n).randn(2, 3)) for n in range(4)]
    assert numpy.array_equal(from_npy([to_npy(array) for array in arrays]), numpy.stack(arrays))
    named = numpy.zeros(2, [("é", "f4")])  # a header of version 3
    assert from_npy([to_npy(named)] * 2).shape == (2, 2)
    assert from_npy([to_npy(numpy.int64(5)), to_npy(numpy.int64(6))]).tolist() == [5, 6]
    for other in (numpy.zeros((3, 2)), numpy.zeros((2, 4)), numpy.zeros((2, 3), numpy.int64)):
        with pytest.raises(ValueError, match=r"\(2, 3\) of float64"):
            from_npy([to_npy(numpy.zeros((2, 3))), to_npy(other)])


@pytest.mark.parametrize("broken", ["x0.npy", "json"])
def test_what_cannot_be_decoded_is_named_with_its_shard_and_key(broken, tmp_path):
    write(tmp_path / "a", make=lambda number: pair(number) | ({broken: b"{"} if number == 8 else {}))
    data = PairsDataModule(str(tmp_path / "a")).data
    assert len(data[torch.tensor([7, 9])]) == 2
    with pytest.raises(ValueError, match=f"00002-of-00003.tar: sample 000000008 is damaged .{broken}: "):
        data[torch.tensor([7, 8, 9])]


@pytest.mark.parametrize(
    ("key", "value"), [("teacher", {"path": "somewhere", "sha256": "b" * 64}), ("steps", 5), ("seed", 8), ("of", 4)]
)
def test_foreign_shards_in_a_folder_are_named(key, value, copied):
    write(copied, only=1, **{key: value})
    found = "00001-of-00004" if key == "of" else "00001-of-00003"
    with pytest.raises(ValueError, match=f"00000-of-00003.json and {found}.json differ in {key}: .*make all of them again"):
        PairsDataModule(str(copied))


def test_another_machine_and_another_path_of_the_teacher_are_not_foreign(copied):
    write(copied, only=1, teacher={"path": "elsewhere", "sha256": "a" * 64}, computed_by={"numpy": "2.0"})
    assert PairsDataModule(str(copied)).size == 11


def test_missing_manifests_and_shards_are_named(copied, tmp_path):
    (copied / "00001-of-00003.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing \(00001-of-00003 first\): run tools/make_pairs.py"):
        PairsDataModule(str(copied))
    write(copied, only=1)
    (copied / "00002-of-00003.tar").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00003.tar: missing, though 00002-of-00003.json says"):
        PairsDataModule(str(copied))
    with pytest.raises(FileNotFoundError, match="there is no such folder; make one by tools/make_pairs.py"):
        PairsDataModule(str(tmp_path / "nowhere"))


def test_noise_that_is_drawn_otherwise_here_is_said_before_training(copied, monkeypatch):
    monkeypatch.setattr("datamodules.pairs.noise_hash", lambda seed, shape: "0" * 64)
    with pytest.raises(ValueError, match="numpy .* here draws other noise from the same seed than numpy 1.0, .*install that"):
        PairsDataModule(str(copied))


def test_each_kind_is_read_by_its_own_module(folder, tmp_path):
    with pytest.raises(ValueError, match="made by tools/make_pairs.py; give one that tools/encode_latents.py made"):
        EncodedDataModule(str(folder))
    header = {key: value for key, value in HEADER.items() if key != "kind"} | {"of": 1, "total": 1, "shard": 0}
    save_shard(tmp_path / "a", atomic_writer, header, NULL, 0, [pair(0)])
    with pytest.raises(ValueError, match="made by tools/encode_latents.py; give one that tools/make_pairs.py made"):
        PairsDataModule(str(tmp_path / "a"))


def test_samples_of_one_shard_have_the_same_members(tmp_path):
    with pytest.raises(ValueError, match=r"sample 4 has members \['json'\], the first one \['json', 'x0.npy'\]"):
        write(tmp_path / "a", make=lambda number: pair(number) if number != 4 else {"json": b"{}"}, of=1)
    assert not list((tmp_path / "a").iterdir())


# ----------------------------------------------------------------------------------------------------------- the benchmark


@pytest.mark.parametrize("parse", [True, False], ids=["standard decoders", "known headers"])
@pytest.mark.parametrize("case", ["digits", "pixels", "latents"])
def test_the_benchmarks_bare_loop_decodes_what_is_read(case, parse, tmp_path):
    bench = load_script("bench_pairs")
    made = bench.write_pairs(tmp_path, case, 20)
    batch = PairsDataModule(str(tmp_path)).rows()[torch.tensor([3, 17])]
    x0, noise, labels = bench.decode([made[3], made[17]], case, parse)
    assert torch.equal(batch.x0, x0) and torch.equal(batch.noise, noise) and torch.equal(batch.cond["labels"], labels)
