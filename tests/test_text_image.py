"""The contrastive loss, the tokenizer made of captions, and the recipe of the text tower through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from resuming import same, train_cut_and_whole
from torch.nn.functional import cross_entropy, normalize

from datamodules.digits import caption
from distill.byte_pairs import learn_merges, make_clip_tokenizer
from distill.cli import load_run
from distill.conditioners import ClipConditioner
from distill.grids import DiscreteGrid
from distill.methods.text_image import TextImageTraining, TwoTowers, _distinct, contrastive_loss
from distill.optimization import Optimization
from distill.schedules import VariancePreserving
from distill.types import DataSpec

CAPTIONS_FOLDER = Path(__file__).resolve().parent.parent / "configs/captions"
RECIPE = str(CAPTIONS_FOLDER / "clip.yaml")
CAPTIONS = [caption(digit) for digit in range(10)]
CORPUS = " ".join(dict.fromkeys(" ".join(CAPTIONS).split()))
QUICK = ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def training() -> TextImageTraining:
    """Tiny towers."""
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, **SMALL}
    return TextImageTraining(CORPUS, SMALL, image, Optimization(), length=16, dimension=8)


# ------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_that_of_the_paper():
    images, texts, scale = torch.randn(5, 3), torch.randn(5, 3), 4.0
    logits = torch.tensor([[scale * torch.dot(u, v) / u.norm() / v.norm() for v in texts] for u in images])
    of_texts, of_images = logits.log_softmax(1), logits.log_softmax(0)
    expected = -sum(of_texts[i, i] + of_images[i, i] for i in range(5)) / 10
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(scale)), expected)


def test_equal_texts_are_positives_of_one_another():
    own = torch.tensor([0, 1, 0, 2, 0, 1])
    images, texts, scale = torch.randn(6, 3), torch.randn(3, 3)[own], torch.tensor(4.0)
    targets = (own[:, None] == own[None, :]).float()
    targets = targets / targets.sum(1, keepdim=True)
    logits = scale * normalize(images, dim=-1) @ normalize(texts, dim=-1).T
    spread = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, scale), spread)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 0, 2, 0, 1]])
def test_loss_is_least_at_the_exact_match_and_a_permutation_raises_it(labels):
    own, scale = torch.tensor(labels), torch.tensor(50.0)
    texts = torch.eye(4)[own]
    repeats = torch.bincount(own)[own].float()
    floor = float(repeats.log().mean())
    images = (5 * texts).requires_grad_()
    matched = contrastive_loss(images, texts, scale)
    matched.backward()
    assert matched.item() == pytest.approx(floor, abs=1e-5) and float(images.grad.abs().max()) < 1e-5
    assert float(contrastive_loss(texts.roll(1, 0), texts, scale)) > floor + 1
    assert float(contrastive_loss(texts + torch.randn(len(own), 4), texts, scale)) > floor + 0.01


def test_scale_starts_at_the_paper_s_and_is_at_most_100():
    towers = training().student
    assert towers.scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        towers.log_scale.fill_(9.0)
    assert towers.scale().item() == 100


def test_distinct_texts_give_every_text_back():
    texts, places = _distinct(["b", "a", "b", "c"], torch.device("cpu"))
    assert texts == ["a", "b", "c"] and [texts[place] for place in places.tolist()] == ["b", "a", "b", "c"]


# -------------------------------------------------------------------------------------------------------- tokenizer


def test_merges_are_those_of_the_algorithm():
    # By hand: "ab" is in both words, then "abc</w>" and "abd</w>" are equally frequent and go by the alphabet.
    assert learn_merges(["abc", "abd"]) == [("a", "b"), ("ab", "c</w>"), ("ab", "d</w>")]
    # "c</w>" follows twice as often as anything else.
    assert learn_merges(["bc", "bc", "ac"])[0] == ("b", "c</w>")
    assert learn_merges(["aaaa"]) == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]


def test_tokenizer_is_the_same_every_time_and_whatever_the_order_of_equal_words(tmp_path):
    files = []
    for name, corpus in (("first", CORPUS), ("second", " ".join(reversed(CORPUS.split())))):
        make_clip_tokenizer(corpus, 16).save_pretrained(tmp_path / name)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("text", [*CAPTIONS, "", "an unseen word, and 42!"])
def test_every_text_comes_back_and_words_of_the_corpus_are_one_token(text, tmp_path):
    from transformers import CLIPTokenizer

    make_clip_tokenizer(CORPUS, 77).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # as in CLIP: the largest
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    if text in CAPTIONS:
        assert ids.index(tokenizer.eos_token_id) == 1 + len(text.split())


def test_wrong_corpora_are_named():
    for corpus, length, words in (("", 16, "corpus=''"), ("Seven", 16, "corpus='Seven'"), ("a b", 1, "length=1")):
        with pytest.raises(ValueError, match=words):
            make_clip_tokenizer(corpus, length)


# ----------------------------------------------------------------------------------------------------------- training


def test_towers_learn_to_tell_captions_apart():
    method = training()
    images = torch.randn(4, 1, 8, 8)
    tokens = method.tokens(CAPTIONS[:4])
    towers: TwoTowers = method.student
    optimizer = torch.optim.Adam(towers.parameters(), 1e-2)
    for _ in range(60):
        loss = contrastive_loss(towers.embed_images(images), towers.embed_texts(tokens), towers.scale())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    cosines = normalize(towers.embed_images(images), dim=-1) @ normalize(towers.embed_texts(tokens), dim=-1).T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3] and loss.item() < 0.1


def test_recipe_trains_resumes_and_exports_a_tower_that_the_conditioner_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut, uncut = train_cut_and_whole(RECIPE, *QUICK)
    assert same(cut["state_dict"], uncut["state_dict"])
    conditioner, method = ClipConditioner("whole/export"), load_run("whole")[1]
    assert conditioner.widths == {"prompt_embeds": 64}
    expected = method.ema.module.text(method.tokens(CAPTIONS)).last_hidden_state
    torch.testing.assert_close(conditioner(CAPTIONS)[0]["prompt_embeds"], expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "words"),
    [(DataSpec((1, 8, 8), 10), "without captions: set data.captions"), (DataSpec((3, 8, 8), None, True), r"\(3, 8, 8\) with")],
)
def test_data_that_does_not_fit_is_named(spec, words):
    training().check_data(DataSpec((1, 8, 8), prompts=True))
    with pytest.raises(ValueError, match=words):
        training().check_data(spec)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_student_is_drawn_at_the_times_of_the_scheduler_that_it_is_exported_with(steps):
    from diffusers import LCMScheduler

    recipe = yaml.safe_load((CAPTIONS_FOLDER / "lcm_lora.yaml").read_text())["model"]["init_args"]
    times = recipe["evaluation"]["sampler"]["init_args"]["times"][steps]
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps, original_inference_steps=recipe["pairs"]["init_args"]["points"]["init_args"]["count"])
    schedule = VariancePreserving("scaled_linear", 0.00085, 0.012)
    grid = DiscreteGrid().times(schedule, 50)
    assert times == scheduler.timesteps.tolist() == grid[[50 * step // steps for step in range(steps)]].tolist()
