"""What a sample is: pictures of every kind, captions, labels, prompts; nothing that is bad is delivered or executed."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import time
from pathlib import Path

import numpy
import pytest
import test_pair_reading as pairs
import torch
from numbered_shards import member, numbered, on_rank, write_numbered, write_tar
from PIL import Image, ImageOps

from datamodules import webdataset
from datamodules.members import to_npy
from datamodules.streams import resampled
from datamodules.streams.contents import ImageContents, PromptContents
from datamodules.streams.decoding import LARGEST_MAX_PIXELS
from datamodules.streams.rejects import Reject
from datamodules.streams.stored import DrawnContents, EncodedContents
from datamodules.webdataset import WebDatasetDataModule
from distill.types import DataSpec


def coarse(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=numpy.uint8))


def encoded(image: Image.Image, kind: str = "png", **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def pixels(content: bytes, size: int = 8, draws=None, ending: str = "png", **settings) -> torch.Tensor:
    """One decoded image, as bytes 0..255 ``(c, h, w)``."""
    contents = ImageContents(size, **settings)
    x0 = contents.delivered(contents.batch([contents.decode({ending: content}, draws)])).x0
    assert x0.dtype == torch.float32 and x0.shape == (1, *contents.spec.shape) and x0.is_contiguous()
    return ((x0[0] + 1) * 127.5).round().to(torch.uint8)


def as_tensor(image: Image.Image) -> torch.Tensor:
    array = numpy.asarray(image)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_middle_of_a_picture_is_resized_as_pil_does_it():
    image = coarse(50, 31)
    wanted = as_tensor(ImageOps.fit(image, (8, 8), Image.Resampling.LANCZOS))
    assert torch.equal(pixels(encoded(image)), wanted) and torch.equal(pixels(encoded(image, "webp", lossless=True)), wanted)
    same = coarse(8, 8)
    assert torch.equal(pixels(encoded(same)), as_tensor(same))
    small = coarse(4, 5)
    assert torch.equal(pixels(encoded(small)), as_tensor(ImageOps.fit(small, (8, 8), Image.Resampling.LANCZOS)))


def test_jpegs_of_either_ending_are_read_by_what_they_are():
    image = coarse()
    content = encoded(image, "jpeg", quality=95)
    decoded = as_tensor(ImageOps.fit(Image.open(io.BytesIO(content)), (8, 8), Image.Resampling.LANCZOS))
    for ending in ("jpg", "jpeg", "png"):
        assert torch.equal(pixels(content, ending=ending), decoded)


def test_draws_place_the_crop_and_flip_one_in_two():
    image = coarse(12, 8)
    settings = {"crop": "random", "flip": True}
    for across, down, turn in ((0.0, 0.0, 0.9), (0.5, 0.0, 0.7), (1.0, 1.0, 0.6), (0.25, 0.9, 0.4)):
        left = round(across * 4)
        wanted = image.crop((left, 0, left + 8, 8))
        wanted = ImageOps.mirror(wanted) if turn < 0.5 else wanted
        assert torch.equal(pixels(encoded(image), draws=(across, down, turn), **settings), as_tensor(wanted))
    assert torch.equal(pixels(encoded(image), draws=(0.0, 0.0, 0.1)), as_tensor(image.crop((2, 0, 10, 8))))
    flipped = as_tensor(ImageOps.mirror(image.crop((2, 0, 10, 8))))
    assert torch.equal(pixels(encoded(image), draws=(0.0, 0.0, 0.1), flip=True), flipped)


def test_resize_leaves_room_for_the_crop():
    image, draws = coarse(20, 20), (1.0, 0.0, 0.9)
    wanted = image.resize((8, 8), Image.Resampling.LANCZOS, (10, 0, 20, 10))
    assert torch.equal(pixels(encoded(image), draws=draws, crop="random", resize=16), as_tensor(wanted))


def test_pictures_are_turned_upright():
    image = coarse(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert torch.equal(pixels(encoded(image, exif=exif)), as_tensor(image.transpose(Image.Transpose.ROTATE_270)))


def test_every_mode_becomes_colour_or_grey():
    image = coarse(8, 8)
    grey = image.convert("L")
    assert torch.equal(pixels(encoded(grey)), as_tensor(grey).expand(3, 8, 8))
    assert torch.equal(pixels(encoded(image), channels=1), as_tensor(grey))
    palette = image.quantize(16)
    assert torch.equal(pixels(encoded(palette)), as_tensor(palette.convert("RGB")))
    inks = encoded(image.convert("CMYK"), "jpeg", quality=95)
    assert torch.equal(pixels(inks), as_tensor(Image.open(io.BytesIO(inks)).convert("RGB")))
    assert torch.equal(pixels(encoded(image.convert("1"))), as_tensor(image.convert("1").convert("RGB")))
    deep = numpy.arange(64, dtype=numpy.uint16).reshape(8, 8) * 1000
    assert torch.equal(pixels(encoded(Image.fromarray(deep)), channels=1)[0], torch.from_numpy((deep >> 8).astype(numpy.uint8)))


def test_what_is_transparent_is_white():
    image = coarse(8, 8)
    mask = Image.new("L", (8, 8), 255)
    mask.paste(0, (0, 0, 4, 8))
    image.putalpha(mask)
    found = pixels(encoded(image))
    assert (found[..., :4] == 255).all() and torch.equal(found[..., 4:], as_tensor(image.convert("RGB"))[..., 4:])
    assert torch.equal(pixels(encoded(image, "webp", lossless=True)), found)
    index = Image.new("P", (8, 8), 1)
    index.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(encoded(index, transparency=1)) == 255).all()


def test_few_levels_are_delivered_exactly():
    values = numpy.arange(17)
    image = Image.fromarray(numpy.round(values * 255 / 16).astype(numpy.uint8)[None].repeat(17, 0))
    contents = ImageContents(17, channels=1, levels=17)
    row = contents.decode({"png": encoded(image)}, None)
    assert contents.delivered(contents.batch([row])).x0[0, 0, 3].tolist() == [value / 8 - 1 for value in values]


def test_images_as_arrays_are_taken_as_they_are():
    contents = ImageContents(2, channels=1, flip=True)
    own = numpy.array([[[0.1, -0.25], [1.0, 0.5]]], numpy.float32)
    rows = [contents.decode({"npy": to_npy(own)}, draws) for draws in (None, (0.0, 0.0, 0.4))]
    rows.append(contents.decode({"npy": to_npy(numpy.array([[[0, 255], [51, 102]]], numpy.uint8))}, None))
    x0 = contents.delivered(contents.batch(rows)).x0
    assert torch.equal(x0[0], torch.from_numpy(own)) and torch.equal(x0[1], torch.from_numpy(own).flip(2))
    assert x0[2].flatten().tolist() == pytest.approx([-1, 1, -0.6, -0.2])


# ---------------------------------------------------------------------------------------------------- captions and labels


def sample(**members) -> dict[str, bytes]:
    return {"png": encoded(coarse(8, 8)), **members}


def test_captions_and_labels_are_in_members_of_their_own_or_in_a_record():
    record = json.dumps({"Caption": " a dog ", "class": 3}).encode()
    for members, places in (
        (sample(txt=b"a dog\n", cls=b" 3\n"), ("txt", "cls")),
        (sample(json=record), ("json.Caption", "json.class")),
    ):
        contents = ImageContents(8, captions=places[0], labels=places[1], num_classes=5)
        batch = contents.batch([contents.decode(members, None)] * 2)
        assert batch.prompts == ["a dog"] * 2 and batch.cond["labels"].tolist() == [3, 3]
        assert batch.null["labels"].tolist() == [5, 5] and batch.cond["labels"].dtype == torch.int64
        assert contents.spec == DataSpec((3, 8, 8), 5, prompts=True)
    plain = ImageContents(8)
    assert plain.batch([plain.decode(sample(txt=b"a"), None)]).prompts is None and not plain.wants("txt")


GOOD = {"txt": b"a dog", "cls": b"3", "json": b'{"caption": "a", "label": 1}'}
IN_RECORD = {"captions": "json.caption", "labels": "json.label", "num_classes": 5}


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({"txt": None}, {}, "no caption"),
        ({"txt": b" \n"}, {}, "no caption"),
        ({"txt": b"\xff\xfe"}, {}, "bad caption"),
        ({"cls": None}, {}, "no label"),
        ({"cls": b"dog"}, {}, "bad label"),
        ({"cls": b"5"}, {}, "bad label"),
        ({"cls": b"-1"}, {}, "bad label"),
        ({"cls": b"9" * 5000}, {}, "bad label"),
        ({"json": None}, IN_RECORD, "no caption"),
        ({"json": b"{"}, IN_RECORD, "bad json"),
        ({"json": b"[" * 100_000}, IN_RECORD, "bad json"),
        ({"json": b"[1]"}, IN_RECORD, "no caption"),
        ({"json": b'{"caption": 3, "label": 1}'}, IN_RECORD, "bad caption"),
        ({"json": b'{"caption": "a"}'}, IN_RECORD, "no label"),
        ({"json": b'{"caption": "a", "label": 1.0}'}, IN_RECORD, "bad label"),
        ({"json": b'{"caption": "a", "label": [1]}'}, IN_RECORD, "bad label"),
        ({"png": None}, {}, "no image"),
        ({"png": b"GIF89a" + b"\0" * 50}, {}, "bad image"),
        ({"png": encoded(coarse(64, 64))[:5000]}, {}, "bad image"),
        ({"png": encoded(coarse(), "bmp")}, {}, "bad image"),
        ({"png": encoded(coarse(12, 8))}, {"max_pixels": 95}, "huge"),
        ({"png": None, "npy": b"\x93NUMPY"}, {}, "bad array"),
        ({"png": None, "npy": to_npy(numpy.zeros((3, 8, 8), numpy.int32))}, {}, "bad array"),
        ({"png": None, "npy": to_npy(numpy.zeros((1, 8, 8), numpy.float32))}, {}, "other shape"),
        ({"png": None, "npy": to_npy(numpy.full((3, 8, 8), numpy.inf, numpy.float32))}, {}, "not finite"),
    ],
)
def test_what_is_wrong_with_a_sample_is_its_reason(changes, settings, reason):
    members = {name: content for name, content in (sample(**GOOD) | changes).items() if content is not None}
    contents = ImageContents(8, **({"captions": "txt", "labels": "cls", "num_classes": 5} | settings))
    assert contents.decode(sample(**GOOD), None)["label"] in (1, 3)
    with pytest.raises(Reject) as rejected:
        contents.decode(members, None)
    assert rejected.value.reason == reason


def test_a_bomb_is_rejected_by_its_header_and_at_the_limit_a_picture_is_not():
    assert pixels(encoded(coarse(12, 8)), max_pixels=96).shape == (3, 8, 8)
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # 3.6 gigapixels, of which PIL itself refuses to read more
    with pytest.raises(Reject) as rejected:
        pixels(bytes(content), max_pixels=LARGEST_MAX_PIXELS)
    assert rejected.value.reason in ("huge", "bad image")
    with pytest.raises(ValueError, match="give at most that"):
        ImageContents(8, max_pixels=LARGEST_MAX_PIXELS + 1)


def test_prompts_alone_are_batches_without_data():
    contents = PromptContents([3, 512, 512], "json.text")
    assert contents.wants("json") and not contents.wants("jpg")
    rows = [contents.decode({"json": json.dumps({"text": text}).encode()}, None) for text in ("a", "b")]
    batch = contents.batch(rows)
    assert batch.x0 is None and batch.cond == {} and batch.prompts == ["a", "b"] and len(batch) == 2
    assert contents.spec == DataSpec((3, 512, 512), prompts=True)


def test_nothing_is_unpickled(tmp_path):
    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(flag), "w"))

    stream = io.BytesIO()
    numpy.lib.format.write_array(stream, numpy.array([Evil()], dtype=object), allow_pickle=True)
    evil = [(f"0.{ending}", pickle.dumps(Evil())) for ending in ("pth", "pyd", "pt", "pickle", "cls", "txt")]
    good = [("1.npy", to_npy(numpy.zeros((1, 2, 2), numpy.float32))), ("1.cls", b"0"), ("1.pth", pickle.dumps(Evil()))]
    write_tar(tmp_path / "a.tar", [("0.npy", stream.getvalue()), *evil, *good])
    write_tar(tmp_path / "b.tar", [("2.npy", stream.getvalue()), ("2.cls", b"0"), *good])
    for mode in ("exact", "resampled"):
        module = numbered(tmp_path, mode, batches_per_epoch=8)
        for batch in module.train_dataloader():
            assert batch.cond["labels"].tolist() == [0, 0, 0]
        assert module.rejects.counts.keys() == {"bad array", "bad label"}
    assert not flag.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 8, "resize": 7}, "resize=7: give at least size=8"),
        ({"size": 8, "max_pixels": 0}, "max_pixels=0"),
        ({"size": 8, "levels": 1}, "levels=1"),
        ({"size": 8, "labels": "cls"}, "labels=cls, num_classes=None: give both"),
        ({"size": 8, "num_classes": 3}, "num_classes=3: give both"),
        ({"size": 8, "captions": "json"}, "captions=json: which key"),
        ({"size": 8, "labels": "json.", "num_classes": 2}, "labels=json.: which key"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageContents(**settings)
    with pytest.raises(ValueError, match=r"shape=\[3, 0, 8\]"):
        PromptContents([3, 0, 8])


# ------------------------------------------------------------------------------------- what is read before training begins


PROMPTS = PromptContents([3, 8, 8], "cls")


@pytest.mark.parametrize("mode", ["resampled", "exact"])
def test_examples_that_hang_end_the_run(mode, tmp_path):
    shards = "pipe:sleep 9" if mode == "resampled" else str(write_numbered(tmp_path) / "*.tar")
    contents = PromptContents([3, 8, 8], "cls")
    if mode == "exact":
        contents.decode = lambda members, draws: time.sleep(9)
    module, began = numbered(tmp_path, mode, shards=shards, contents=contents, timeout=0.5), time.monotonic()
    with pytest.raises(RuntimeError, match="data.timeout=0.5 seconds: rank 0, worker 0 reads (pipe:sleep 9|.*00000.tar)"):
        module.examples(3)
    assert time.monotonic() - began < 8


def test_a_first_shard_that_hangs_ends_the_run():
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="data.timeout=0.5 seconds: reading pipe:sleep 9"):
        WebDatasetDataModule("pipe:sleep 9", EncodedContents(), "resampled", timeout=0.5)
    assert time.monotonic() - began < 8


def test_dead_shards_are_not_tried_for_examples_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(resampled, "IN_A_ROW", 3)
    shards = [f"pipe:exit {code}" for code in range(3, 9)]
    module = on_rank(numbered(tmp_path, "resampled", shards=shards, contents=PROMPTS), folder=tmp_path)
    with pytest.raises(RuntimeError, match="3 of 3 samples were rejected .3 unreadable., the first ones of the shards"):
        module.examples(4)
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 3


def test_examples_are_read_once_and_their_rejects_counted(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [*member(1), ("002.cls", b" "), *member(3)])
    module = on_rank(numbered(tmp_path, "resampled", contents=PROMPTS), folder=tmp_path)
    first = module.examples(3)
    assert first.prompts == ["1", "3", "1"] and module.rejects.counts == {"no caption": 1} and module.rejects.seen == 3
    monkeypatch.setattr(webdataset, "first_samples", None)
    assert module.examples(3) is first


@pytest.mark.parametrize("odd", [{"more.npy": to_npy(numpy.zeros(2))}, {"json": b'{"labels": 1, "other": 2}'}, {"json": b"{"}])
def test_one_odd_first_sample_does_not_make_all_others_odd(odd, tmp_path):
    def make(number: int) -> dict[str, bytes]:
        return pairs.inverted(number) | (odd if number == 0 else {})

    folder = Path(pairs.write(tmp_path / "pairs", make=pairs.inverted))
    first, header = folder / "00000-of-00003.tar", pairs.HEADER | {"of": 3, "total": 11, "shard": 0}
    with tarfile.open(first) as archive:
        null = archive.extractfile("__null__").read()
    samples = [(f"{number:09d}.{name}", content) for number in range(3) for name, content in make(number).items()]
    write_tar(first, [("__header__", json.dumps(header).encode()), ("__null__", null), *samples])
    module = numbered(folder, "resampled", contents=DrawnContents(), batches_per_epoch=20, shuffle_buffer=0)
    kept = dict(module.contents.__dict__)
    assert kept["names"] == {"x0.npy", "noise.npy", "json"} and kept["record"].keys() == {"labels"}
    assert sum(map(len, on_rank(module, folder=tmp_path).train_dataloader())) == 60
    assert set(module.rejects.counts) <= {"other members", "bad json"}
    assert {key for _, key, _ in module.rejects.named} == {"000000000"}
