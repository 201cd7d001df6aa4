"""The CLIP score: how near images are to the prompts that they were drawn for, by the two towers of CLIP.

    100 max(cos(E_image, E_text), 0),   the mean over images

Hessel et al., CLIPScore: a reference-free evaluation metric for image captioning, 2104.08718, section 3, whose factor is 2.5;
100 is torchmetrics', and that of most papers on generators.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from distill.command_line import Refusal
from distill.conditioners.towers import TOKENIZER_FILES
from distill.frozen import Frozen
from distill.image_features.image_towers import CLIP, CLIP_ADVICE, ClipFeatures, load_tower
from distill.metrics.features import NetworkFeatures
from distill.metrics.image_sets import SETTINGS, ImageSet
from distill.metrics.processes import Processes

SCALE = 100


class ClipScorer(nn.Module):
    """Scores of images and prompts.

    Prompts are cut to the text tower's length by the tokenizer, which keeps the token that ends them; torchmetrics cuts it off.

    Args:
        path: folder or hub id of a whole CLIP (`ClipFeatures`), with its tokenizer.

    Attributes:
        settings: what a score depends on beside images and prompts.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: a folder of another model, without a text tower, or of a tokenizer that does not belong to it.
    """

    def __init__(self, path: str):
        from transformers import AutoTokenizer

        super().__init__()
        folder = ClipFeatures.locate(path)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            files = ", ".join(TOKENIZER_FILES)
            raise FileNotFoundError(f"path={path!r}: there is no tokenizer there (one of {files}); {CLIP_ADVICE}, whole.")
        model = load_tower(path, folder, CLIP, CLIP_ADVICE)
        if not hasattr(model, "text_projection"):
            raise ValueError(f"path={path!r}: a vision tower alone, which reads no prompts; {CLIP_ADVICE}, whole.")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = model.config.text_config
        if len(self.tokenizer) > config.vocab_size:
            sizes = f"its tokenizer has {len(self.tokenizer)} tokens, its text tower knows {config.vocab_size}"
            raise ValueError(f"path={path!r}: {sizes}; {CLIP_ADVICE}, whole.")
        self.length = config.max_position_embeddings
        self.images = NetworkFeatures(ClipFeatures(path))
        self.text = Frozen(nn.ModuleDict({"tower": model.text_model, "projection": model.text_projection}))
        reading = f"prompts cut to {self.length} tokens, {self.images.protocol}"
        self.settings = {"scale": SCALE, "model": self.images.identity["sha256"], "protocol": reading}

    def embed(self, prompts: list[str], device: torch.device) -> Float64[Tensor, "b d"]:
        """The text embeddings, not of unit length."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt").to(device)
        text = self.text.module
        states = text["tower"](input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return text["projection"](states.pooler_output).double()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"], prompts: list[str]) -> Float64[Tensor, " b"]:
        """The score of each image in [-1, 1] and its prompt, 0..100."""
        cosines = torch.cosine_similarity(self.images(images), self.embed(prompts, images.device))
        return SCALE * cosines.clamp(min=0)


def read_prompts(option: str, images: ImageSet) -> list[str]:
    """The prompt of each image that counts: those of ``samples.json`` in turn, else the text that lies beside each image.

    Raises:
        Refusal: there are none, or an image has none.
    """
    given = images.settings.get("prompts")
    if given:
        if not isinstance(given, list) or not all(isinstance(prompt, str) for prompt in given):
            raise Refusal(f"{option} {images.path}: the prompts in {SETTINGS} are no list of texts; sample again")
        return [given[number % len(given)] for number in range(images.count)]
    texts = [images.source.text(number) for number in range(images.count)]
    found = [text for text in texts if text is not None]
    if len(found) < len(texts):
        lacking = images.source.name(texts.index(None)) if found else "the set"
        where = f"{SETTINGS} with prompts (tools/sample.py --prompts), or a .txt beside each picture, in folders or shards"
        raise Refusal(f"{option} {images.path}: {lacking} has no prompt that a CLIP score is of; give {where}")
    return found


@torch.no_grad()
def clip_score(
    images: ImageSet, prompts: list[str], scorer: ClipScorer, batch_size: int, device: str, processes: Processes
) -> dict[str, Any]:
    """``value``, the mean over the images that count, ``std_error``, that of the mean, and ``settings``; in each process.

    Raises:
        Refusal: scores that are not finite.
    """
    from tqdm import tqdm

    scorer.to(device)
    sums = torch.zeros(2, dtype=torch.float64)
    batches = processes.batches(images.count, batch_size)
    for numbers in tqdm(batches, desc=f"{images.path}, CLIP", unit="batch", disable=True if processes.rank else None):
        scores = scorer(images.read(numbers).to(device), prompts[numbers.start : numbers.stop]).cpu()
        sums += torch.stack([scores.sum(), scores.square().sum()])
    mean, square = (processes.sum(sums) / images.count).tolist()
    if not mean == mean:
        raise Refusal(f"{images.path}: scores by {scorer.images.identity['path']} are not finite; give other weights")
    variance = max(square - mean**2, 0.0) * images.count / (images.count - 1)
    asked = {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    return {"value": mean, "std_error": (variance / images.count) ** 0.5, "settings": scorer.settings | asked}
