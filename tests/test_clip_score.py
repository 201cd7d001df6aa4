"""The CLIP score of tools/fid.py: torchmetrics' figure of each image and its own prompt, wherever prompts and processes are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import tiny_features
import tiny_text
import torch
from forked import on_processes
from script import load_script
from test_fid_tool import pictures, png, shard

from distill.metrics.clip_score import ClipScorer
from distill.metrics.features import from_uint8

fid = load_script("fid")

IMAGES = numpy.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=numpy.uint8)
PROMPTS = ["a photo of the digit seven", "an astronaut riding a horse on mars", "zero one two " * 20]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_features.clip_with_words(tmp_path_factory.mktemp("clip"))


def samples(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    numpy.savez(folder / "samples.npz", IMAGES)
    (folder / "samples.json").write_text(json.dumps({"num": len(IMAGES), "seed": 0, **settings}))
    return folder


def words(given: Path, clip: object, *more: str) -> list[str]:
    return ["--samples", str(given), "--reference", "digits", "--metrics", "clip_score", "--clip", str(clip), *more]


def measure(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    fid.main(list(arguments))
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        fid.main(list(arguments))
    assert left.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def expected(clip: Path, prompts: list[str]) -> list[float]:
    """By transformers' own model, image by image: ``100 max(cos, 0)``. The prompts are short enough, or cut by hand."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (fid_mean(), fid_std()))
    scores = []
    for image, prompt in zip(IMAGES, prompts):
        ids = tokenizer(prompt).input_ids
        ids = ids if len(ids) <= tiny_text.CLIP_LENGTH else [*ids[: tiny_text.CLIP_LENGTH - 1], ids[-1]]
        pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), pixel_values=pixels[None])
        scores.append(100 * max(float((output.image_embeds * output.text_embeds).sum()), 0.0))
    return scores


def fid_mean() -> tuple[float, ...]:
    return (0.48145466, 0.4578275, 0.40821073)


def fid_std() -> tuple[float, ...]:
    return (0.26862954, 0.26130258, 0.27577711)


def test_each_image_is_scored_by_its_prompt_in_turn(tmp_path, capsys, clip):
    scores = expected(clip, [PROMPTS[i % 3] for i in range(7)])
    given = samples(tmp_path / "a", prompts=PROMPTS)
    found = measure(capsys, *words(given, clip, "--batch-size", "2"))["metrics"]["clip_score"]
    assert found["value"] == pytest.approx(sum(scores) / 7, abs=1e-5) and min(scores) == 0 < 10 < max(scores)
    assert found["std_error"] == pytest.approx(float(numpy.std(scores, ddof=1)) / math.sqrt(7), abs=1e-5)
    assert found["settings"]["scale"] == 100 and len(found["settings"]["model"]) == 64
    assert found["settings"]["model"] in found["settings"]["protocol"] and "cut to 16 tokens" in found["settings"]["protocol"]


def test_a_long_prompt_keeps_the_token_that_ends_it(clip):
    from transformers import CLIPModel

    scorer, length = ClipScorer(str(clip)), tiny_text.CLIP_LENGTH
    ids = scorer.tokenizer(PROMPTS[2]).input_ids
    assert len(ids) > length
    with torch.no_grad():
        cut = torch.tensor([[*ids[: length - 1], ids[-1]]])
        theirs = CLIPModel.from_pretrained(clip).eval()(input_ids=cut, pixel_values=torch.zeros(1, 3, 16, 16)).text_embeds
        ours = scorer.embed(["seven", PROMPTS[2]], torch.device("cpu"))[1]
    assert torch.allclose(torch.nn.functional.normalize(ours, dim=0), theirs[0].double(), atol=1e-6)


def test_agrees_with_torchmetrics(clip):
    """With its own tokenizer and image processor; of each pair, for of many it would clamp the mean alone."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    class Model(CLIPModel):
        """transformers 5 returns more than torchmetrics reads."""

        def get_image_features(self, pixels):
            return super().get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return super().get_text_features(ids, mask).pooler_output

    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    parts = Model.from_pretrained(clip).eval(), CLIPProcessor(CLIPImageProcessor(**size), CLIPTokenizer.from_pretrained(clip))
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    prompts = [PROMPTS[i % 2] for i in range(7)]
    theirs = [float(clip_score(image, prompt, lambda: parts).detach()) for image, prompt in zip(images, prompts)]
    ours = ClipScorer(str(clip))(from_uint8(images), prompts).tolist()
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5) and max(theirs) > 10


def test_prompts_of_pictures_and_shards_are_those_beside_them(tmp_path, capsys, clip):
    texts = [f"a photo of the digit {word}" for word in tiny_text.WORDS[5:12]]
    mean = sum(expected(clip, texts)) / 7
    folder = pictures(tmp_path / "pictures", IMAGES)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text + "\n")
    pairs = [((f"{i}.png", png(IMAGES[i])), (f"{i}.txt", text.encode())) for i, text in enumerate(texts)]
    members = [member for pair in pairs for member in pair]
    found = [folder, shard(tmp_path / "shards" / "0.tar", members), samples(tmp_path / "a", prompts=texts)]
    results = [measure(capsys, *words(given, clip))["metrics"]["clip_score"] for given in found]
    assert [result["value"] for result in results] == [pytest.approx(mean, abs=1e-5)] * 3
    assert len({result["settings"]["prompts"] for result in results}) == 1
    swapped = measure(capsys, *words(samples(tmp_path / "b", prompts=texts[::-1]), clip))["metrics"]["clip_score"]
    assert swapped["settings"]["prompts"] != results[0]["settings"]["prompts"] and swapped["value"] != pytest.approx(mean)


def test_two_processes_find_what_one_does(tmp_path, capsys, clip):
    given = samples(tmp_path / "a", prompts=PROMPTS)
    alone = measure(capsys, *words(given, clip, "--batch-size", "2"))

    def work() -> str:
        out = tmp_path / "two.json"
        fid.main(words(given, clip, "--batch-size", "2", "--out", str(out)))
        return out.read_text() if out.exists() else ""

    together = json.loads(on_processes(2, tmp_path / "ranks", work)[0] or (tmp_path / "two.json").read_text())
    assert together["metrics"]["clip_score"]["settings"] == alone["metrics"]["clip_score"]["settings"]
    for key in ("value", "std_error"):
        assert together["metrics"]["clip_score"][key] == pytest.approx(alone["metrics"]["clip_score"][key], rel=1e-10)


def test_beside_a_distance_both_are_measured(tmp_path, capsys, clip):
    given = samples(tmp_path / "a", prompts=PROMPTS)
    both = measure(capsys, *words(given, f"clip={clip}"), "--metrics", "frechet", "clip_score", "--reference", str(given))
    assert both["distance"] < 1e-9 and both["metrics"]["clip_score"]["value"] > 0
    assert "transformers" in both["versions"]


def test_what_cannot_be_scored_is_refused(tmp_path, capsys, clip):
    bare, given = samples(tmp_path / "bare", prompts=None), samples(tmp_path / "a", prompts=PROMPTS)
    said = refusal(capsys, *words(bare, clip))
    assert "the set has no prompt that a CLIP score is of; give samples.json with prompts (tools/sample.py --prompts)" in said
    folder = pictures(tmp_path / "pictures", IMAGES)
    (folder / "0000.txt").write_text("a")
    assert "0001.png has no prompt" in refusal(capsys, *words(folder, clip))
    wrong = samples(tmp_path / "wrong", prompts="a text")
    assert "are no list of texts; sample again" in refusal(capsys, *words(wrong, clip))
    said = refusal(capsys, *words(given, "clip"))
    assert "--clip clip: there is no folder weights/clip-vit-large-patch14; where there is a network run `hf download" in said
    said = refusal(capsys, *words(given, tiny_features.clip(tmp_path)))
    assert "there is no tokenizer there (one of tokenizer.json" in said
    tiny_text.clip_tokenizer(tmp_path, "dino")
    said = refusal(capsys, *words(given, tiny_features.dino(tmp_path)))
    assert "is of a model of type 'dinov2'; give a folder of transformers' CLIPModel" in said
