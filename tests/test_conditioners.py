"""Conditioners: to the bit what the pipelines of diffusers make of prompts, the null condition, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tiny_text
import torch

from distill.conditioners import (
    ClipConditioner,
    FluxConditioner,
    GemmaConditioner,
    StableDiffusion3Conditioner,
    StableDiffusionXLConditioner,
    T5Conditioner,
)
from distill.conditioners.base import check_prompts

PROMPTS = ["A photo of the digit seven", " an Astronaut riding a horse on mars, a photo of a horse on mars and two digits ", ""]
PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")


def index(folder, pipeline, **config):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **config}))
    return folder


def clip(folder, ending, **settings):
    pad = "!" if ending == "_2" else "<|endoftext|>"
    tokenizer = tiny_text.clip_tokenizer(folder, f"tokenizer{ending}", pad=pad)
    tiny_text.clip_text_model(folder, f"text_encoder{ending}", vocabulary=tokenizer, layers=3, seed=len(ending), **settings)


def t5(folder, ending, **settings):
    tiny_text.t5_tokenizer(folder, f"tokenizer{ending}")
    tiny_text.t5_encoder(folder, f"text_encoder{ending}", **settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of text towers for each family, not to be changed."""
    root = tmp_path_factory.mktemp("towers")
    folders = {name: root / name for name in ("sd", "sdxl", "sd3", "flux", "pixart", "sigma", "sana")}
    clip(folders["sd"], "")
    clip(folders["sdxl"], "")
    clip(folders["sdxl"], "_2", width=12, projection=10)
    clip(folders["sd3"], "", width=8, projection=6)
    clip(folders["sd3"], "_2", width=12, projection=10)
    t5(folders["sd3"], "_3")
    clip(folders["flux"], "")
    t5(folders["flux"], "_2")
    t5(folders["pixart"], "")
    t5(folders["sigma"], "", seed=1)
    tiny_text.gemma_tokenizer(folders["sana"])
    tiny_text.gemma_model(folders["sana"])
    index(folders["sdxl"], "StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True)
    index(folders["pixart"], "PixArtAlphaPipeline")
    index(folders["sigma"], "PixArtSigmaPipeline")
    return folders


def pipeline(name, conditioner, **others):
    """The pipeline of diffusers around a conditioner's own towers and nothing else."""
    import diffusers

    modules = dict.fromkeys(("scheduler", "vae"))
    endings = ["", "_2", "_3"][: len(conditioner.towers)]
    for ending, tower in zip(endings, conditioner.towers):
        modules |= {f"tokenizer{ending}": tower.tokenizer, f"text_encoder{ending}": tower.encoder}
    return getattr(diffusers, name)(**modules, **others)


def equal(cond, expected, tolerance=0.0):
    assert cond.keys() == expected.keys()
    for name, value in cond.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name].float(), rtol=tolerance, atol=tolerance, msg=name)


def close(null, expected):
    """A null condition is one row here and three in the pipeline: sums round differently."""
    equal(null, expected, tolerance=2e-6)


def widths(cond):
    return {name: value.shape[-1] for name, value in cond.items()}


# ------------------------------------------------------------------------------------------- what pipelines encode


@pytest.mark.parametrize("skip", [0, 1])
@torch.no_grad()
def test_stable_diffusion(skip, folders):
    conditioner = ClipConditioner(str(folders["sd"]), clip_skip=skip)
    cond, null = conditioner(PROMPTS)
    towers = pipeline("StableDiffusionPipeline", conditioner, **dict.fromkeys(("unet", "safety_checker", "feature_extractor")))
    if skip:  # where the pipeline looks for the layer under transformers 4
        conditioner.towers[0].encoder.text_model = conditioner.towers[0].encoder
    embeds, negative = towers.encode_prompt(PROMPTS, "cpu", 1, True, clip_skip=skip or None)
    equal(cond, {"prompt_embeds": embeds})
    close(null, {"prompt_embeds": negative})
    assert conditioner.widths == widths(cond) == {"prompt_embeds": 16}


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_stable_diffusion_xl(zeros, folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    index(folder, "StableDiffusionXLPipeline", force_zeros_for_empty_prompt=zeros)
    sizes = {"target_size": (32, 48), "original_size": (64, 80), "crop": (3, 5)}
    conditioner = StableDiffusionXLConditioner(str(folder), **sizes)
    cond, null = conditioner(PROMPTS)
    towers = pipeline("StableDiffusionXLPipeline", conditioner, unet=None, force_zeros_for_empty_prompt=zeros)
    embeds, negative, pooled, negative_pooled = towers.encode_prompt(PROMPTS, device="cpu")
    ids = torch.tensor([[64.0, 80.0, 3.0, 5.0, 32.0, 48.0]]).repeat(3, 1)
    equal(cond, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": ids})
    close(null, {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled, "time_ids": ids})
    assert (null["prompt_embeds"].abs().max() == 0) == zeros
    (folder / "model_index.json").unlink()  # then it is the pipeline's default
    assert StableDiffusionXLConditioner(str(folder))(PROMPTS)[1]["prompt_embeds"].abs().max() == 0
    assert conditioner.widths == widths(cond) == {"prompt_embeds": 28, "pooled_prompt_embeds": 10, "time_ids": 6}


def test_time_ids_may_be_left_to_the_data(folders):
    conditioner = StableDiffusionXLConditioner(str(folders["sdxl"]), target_size=None)
    cond, null = conditioner(PROMPTS)
    assert "time_ids" not in cond.keys() | null.keys() | conditioner.widths.keys()
    plain = StableDiffusionXLConditioner(str(folders["sdxl"]))(PROMPTS)[0]["time_ids"]
    assert plain.tolist() == [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * 3
    with pytest.raises(ValueError, match="original_size=.* with target_size=null"):
        StableDiffusionXLConditioner(str(folders["sdxl"]), target_size=None, original_size=(8, 8))


@pytest.mark.parametrize("t5", [True, False])
@torch.no_grad()
def test_stable_diffusion_3(t5, folders, tmp_path):
    from diffusers import SD3Transformer2DModel

    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    transformer = SD3Transformer2DModel(sample_size=4, num_layers=1, joint_attention_dim=24, **heads)
    transformer.save_pretrained(folder / "transformer")
    if not t5:
        shutil.rmtree(folder / "text_encoder_3")
        shutil.rmtree(folder / "tokenizer_3")
    conditioner = StableDiffusion3Conditioner(str(folder), max_length=20, t5=t5)
    cond, null = conditioner(PROMPTS)
    third = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    towers = pipeline("StableDiffusion3Pipeline", conditioner, transformer=transformer, **third)
    embeds, negative, pooled, negative_pooled = towers.encode_prompt(PROMPTS, None, None, device="cpu", max_sequence_length=20)
    equal(cond, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    close(null, {"prompt_embeds": negative, "pooled_prompt_embeds": negative_pooled})
    assert conditioner.widths == widths(cond) == {"prompt_embeds": 24, "pooled_prompt_embeds": 16}
    assert cond["prompt_embeds"].shape == (3, tiny_text.CLIP_LENGTH + 20, 24)


@torch.no_grad()
def test_flux(folders):
    conditioner = FluxConditioner(str(folders["flux"]), max_length=24)
    cond, null = conditioner(PROMPTS)
    towers = pipeline("FluxPipeline", conditioner, transformer=None)
    for compare, found, prompts in ((equal, cond, PROMPTS), (close, null, [""] * 3)):
        embeds, pooled, _ = towers.encode_prompt(prompts, None, device="cpu", max_sequence_length=24)
        compare(found, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    assert conditioner.widths == widths(cond) == {"prompt_embeds": 24, "pooled_prompt_embeds": 16}
    assert FluxConditioner(str(folders["flux"]))(["a"])[0]["prompt_embeds"].shape == (1, 512, 24)


@pytest.mark.parametrize(("name", "family", "tokens"), [("pixart", "PixArtAlpha", 120), ("sigma", "PixArtSigma", 300)])
@torch.no_grad()
def test_pixart(name, family, tokens, folders):
    conditioner = T5Conditioner(str(folders[name]))
    cond, null = conditioner(PROMPTS)
    towers = pipeline(f"{family}Pipeline", conditioner, transformer=None)
    embeds, mask, negative, negative_mask = towers.encode_prompt(PROMPTS, device="cpu")
    equal(cond, {"prompt_embeds": embeds, "prompt_mask": mask})
    close(null, {"prompt_embeds": negative, "prompt_mask": negative_mask})
    assert conditioner.widths == widths(cond) == {"prompt_embeds": 24, "prompt_mask": tokens}
    assert 0 < cond["prompt_mask"].mean() < 1 and null["prompt_mask"].sum() == 3


def test_pixart_reads_the_size_of_images(folders):
    conditioner = T5Conditioner(str(folders["pixart"]), max_length=8, size=(512, 1024))
    for found in conditioner(PROMPTS):
        assert found["resolution"].tolist() == [[512.0, 1024.0]] * 3 and found["aspect_ratio"].tolist() == [[0.5]] * 3
        assert conditioner.widths == widths(found)


@pytest.mark.parametrize("instruction", [True, False])
@torch.no_grad()
def test_sana(instruction, folders):
    import inspect

    conditioner = GemmaConditioner(str(folders["sana"]), max_length=40, instruction=instruction)
    cond, null = conditioner(PROMPTS)
    towers = pipeline("SanaPipeline", conditioner, transformer=None)
    lines = inspect.signature(type(towers).__call__).parameters["complex_human_instruction"].default if instruction else None
    embeds, mask, negative, negative_mask = towers.encode_prompt(
        PROMPTS, device="cpu", max_sequence_length=40, complex_human_instruction=lines
    )
    equal(cond, {"prompt_embeds": embeds, "prompt_mask": mask})
    close(null, {"prompt_embeds": negative, "prompt_mask": negative_mask})
    assert conditioner.widths == widths(cond) == {"prompt_embeds": 16, "prompt_mask": 40}


# ----------------------------------------------------------------------------------------------------- how it behaves


def test_null_is_computed_once_and_again_where_the_module_is_moved(folders):
    conditioner, calls = ClipConditioner(str(folders["sd"])), []
    conditioner.towers[0].encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = conditioner(["a"])[1], conditioner(["a photo", "b"])[1]
    assert len(calls) == 3 and second["prompt_embeds"].shape[0] == 2 and second["prompt_embeds"].stride(0) == 0
    assert torch.equal(second["prompt_embeds"][1:], first["prompt_embeds"])
    moved = conditioner.to(torch.bfloat16)(["a"])[1]["prompt_embeds"]
    assert len(calls) == 5 and moved.dtype == torch.float32 and not torch.equal(moved, first["prompt_embeds"])
    assert conditioner.to("meta")._null is None


def test_a_prompt_does_not_depend_on_its_neighbours_and_prompts_matter(folders):
    for name, conditioner in {
        "sd": ClipConditioner(str(folders["sd"])),
        "sana": GemmaConditioner(str(folders["sana"]), max_length=20),
        "flux": FluxConditioner(str(folders["flux"]), max_length=20),
    }.items():
        alone, together = conditioner(["a photo"])[0], conditioner(["a photo", "the digit seven"])[0]
        for key, value in alone.items():
            torch.testing.assert_close(value[0], together[key][0], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
        assert (together["prompt_embeds"][0] - together["prompt_embeds"][1]).abs().max() > 0.1


def test_frozen_and_in_evaluation_mode_for_good(folders):
    conditioner = T5Conditioner(str(folders["pixart"]), max_length=8).train()
    assert not conditioner.towers[0].encoder.training and not any(p.requires_grad for p in conditioner.parameters())
    assert torch.equal(conditioner(["a photo"])[0]["prompt_embeds"], conditioner(["a photo"])[0]["prompt_embeds"])
    assert not conditioner(["a photo"])[0]["prompt_embeds"].requires_grad


def test_precision_is_that_of_dtype_and_not_of_autocast(folders):
    exact = ClipConditioner(str(folders["sd"]))(PROMPTS)[0]["prompt_embeds"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ClipConditioner(str(folders["sd"]))(PROMPTS)[0]["prompt_embeds"], exact)
    half = ClipConditioner(str(folders["sd"]), dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16
    value = half(PROMPTS)[0]["prompt_embeds"]
    assert value.dtype == torch.float32 and not torch.equal(value, exact)
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0.1)


def test_identity_follows_weights_tokenizer_and_settings_not_the_place(folders, tmp_path):
    def sha(folder, **settings):
        return ClipConditioner(str(folder), **settings).identity["sha256"]

    copies = [shutil.copytree(folders["sd"], tmp_path / name) for name in ("same", "weights", "tokenizer")]
    tiny_text.clip_text_model(copies[1], layers=3, seed=9)
    tiny_text.clip_tokenizer(copies[2], pad="!")
    first = sha(folders["sd"])
    assert sha(copies[0]) == first and ClipConditioner(str(copies[0])).identity["path"] == str(copies[0])
    assert len({first, sha(copies[1]), sha(copies[2]), sha(folders["sd"], clip_skip=1)}) == 4


# -------------------------------------------------------------------------------------------------- what is refused


def test_wrong_prompts_are_refused_by_name(folders):
    with pytest.raises(ValueError, match=r"prompts=\[\]: give a list"):
        ClipConditioner(str(folders["sd"]))([])
    with pytest.raises(ValueError, match="prompts='a text': give a list"):
        check_prompts("a text")
    with pytest.raises(ValueError, match=r"prompts\[1\]=None is a NoneType"):
        check_prompts(["a", None])


def test_another_familys_folder_is_refused_by_name(folders, tmp_path):
    with pytest.raises(ValueError, match="text_encoder/ holds a model of type 't5', where a CLIPTextModel"):
        ClipConditioner(str(folders["pixart"]))
    with pytest.raises(ValueError, match="text_encoder/ holds a model of type 'clip_text_model', where a Gemma2Model"):
        GemmaConditioner(str(folders["sd"]))
    with pytest.raises(FileNotFoundError, match="text_encoder_2/ is missing"):
        StableDiffusionXLConditioner(str(folders["sd"]))
    with pytest.raises(ValueError, match="text_encoder_2.*the weights lack text_projection.weight"):
        shutil.copytree(folders["sd"], tmp_path / "xl")
        clip(tmp_path / "xl", "_2")
        StableDiffusionXLConditioner(str(tmp_path / "xl"))


def test_parts_that_do_not_belong_together_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer/ has no tokenizer"):
        ClipConditioner(str(folder))
    shutil.copytree(folders["flux"] / "text_encoder_2", folder / "t5")
    wide = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    clip(wide, "_2", width=20, projection=10)
    with pytest.raises(ValueError, match="widths 8 [+] 20 exceed that of T5, 24"):
        StableDiffusion3Conditioner(str(wide))
    small = shutil.copytree(folders["sana"], tmp_path / "sana")
    config = json.loads((small / "text_encoder/config.json").read_text())
    from transformers import Gemma2Config, Gemma2Model

    Gemma2Model(Gemma2Config(**config | {"vocab_size": 64})).save_pretrained(small / "text_encoder")
    with pytest.raises(ValueError, match="tokenizer/ has 356 tokens, but text_encoder/ knows 64"):
        GemmaConditioner(str(small))


def test_a_broken_tokenizer_is_named(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: CLIPTokenizer cannot read it"):
        ClipConditioner(str(folder))


def test_settings_out_of_range_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match="clip_skip=3: give 0 to 2"):
        ClipConditioner(str(folders["sd"]), clip_skip=3)
    with pytest.raises(ValueError, match="max_length=1"):
        FluxConditioner(str(folders["flux"]), max_length=1)
    t5(tmp_path, "")
    with pytest.raises(ValueError, match="max_length=null: .* is of no pipeline"):
        T5Conditioner(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="t5=false takes T5's width from transformer/config.json"):
        StableDiffusion3Conditioner(str(folders["sd3"]), t5=False)


def test_missing_transformers_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="need transformers .*pip install transformers"):
        ClipConditioner(str(folders["sd"]))
