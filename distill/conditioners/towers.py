"""Text towers: a tokenizer and its encoder, read from the folder of a pipeline. transformers is imported where it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill import hub

Precision = Literal["float32", "bfloat16", "float16"]
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Kind:
    """A kind of tower.

    Attributes:
        encoder, tokenizer: its classes in transformers.
        model_type: what the encoder's ``config.json`` calls it.
    """

    encoder: str
    tokenizer: str
    model_type: str


CLIP = Kind("CLIPTextModel", "CLIPTokenizer", "clip_text_model")
CLIP_PROJECTED = Kind("CLIPTextModelWithProjection", "CLIPTokenizer", "clip_text_model")
T5 = Kind("T5EncoderModel", "T5TokenizerFast", "t5")
GEMMA = Kind("Gemma2Model", "GemmaTokenizerFast", "gemma2")


def locate_towers(
    path: str, towers: Mapping[str, Kind], revision: str | None, variant: str | None, allow_pickle: bool
) -> Path:
    """The folder that holds the towers of these endings, fetched if need be; see `distill.hub`. Loads no weights.

    Raises:
        FileNotFoundError: a missing folder, tokenizer, config or weights.
        ValueError: an encoder of another kind; weights that are only there as a pickle.
    """
    small = [pattern for ending in towers for pattern in hub.component_patterns(f"tokenizer{ending}")]
    root = hub.resolve(path, revision, ["model_index.json", *small])
    for ending, kind in towers.items():
        encoder = hub.component_folder(path, f"text_encoder{ending}", revision, variant, allow_pickle)
        found = hub.read_json(encoder / "config.json").get("model_type")
        if found != kind.model_type:
            raise ValueError(
                f"path={path!r}: text_encoder{ending}/ holds a model of type {found!r}, where a {kind.encoder} "
                f"({kind.model_type!r}) is needed: give the conditioner of this pipeline's family, or another folder."
            )
        if hub.reads_weights() and not any((root / f"tokenizer{ending}" / name).is_file() for name in TOKENIZER_FILES):
            raise FileNotFoundError(
                f"path={path!r}: tokenizer{ending}/ has no tokenizer there (one of {', '.join(TOKENIZER_FILES)}): "
                "give the folder of a whole pipeline."
            )
    return root


def import_transformers() -> Any:
    """The library. Raises ValueError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"text conditions need transformers ({error}): pip install transformers sentencepiece.") from error
    return transformers


class TextTower(nn.Module):
    """A tokenizer and its encoder, frozen.

    Attributes:
        tokenizer: of transformers.
        encoder: of transformers.
        length: tokens of a prompt that the tokenizer pads and cuts to by itself.
        width: size of the encoder's states.
    """

    def __init__(
        self, root: Path, ending: str, kind: Kind, variant: str | None, dtype: Precision | None, allow_pickle: bool
    ):
        super().__init__()
        transformers = import_transformers()
        folder = root / f"text_encoder{ending}"
        if not hub.reads_weights():
            self._describe(getattr(transformers, kind.encoder), folder, dtype)
            return
        self.tokenizer = _load_tokenizer(getattr(transformers, kind.tokenizer), root / f"tokenizer{ending}")
        encoder, report = getattr(transformers, kind.encoder).from_pretrained(
            folder,
            dtype=getattr(torch, dtype or "float32"),
            variant=variant,
            use_safetensors=not allow_pickle or bool(hub.weight_files(folder, variant)),
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{folder}: the weights lack {missing[0]} ({len(missing)} in all), so it is no {kind.encoder}.")
        if len(self.tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"{root}: tokenizer{ending}/ has {len(self.tokenizer)} tokens, but text_encoder{ending}/ knows "
                f"{encoder.config.vocab_size}: they do not belong together."
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.length, self.width = self.tokenizer.model_max_length, encoder.config.hidden_size

    def _describe(self, encoder_class: Any, folder: Path, dtype: Precision | None) -> None:
        """An encoder without weights and no tokenizer: enough to count its parameters."""
        config = encoder_class.config_class.from_pretrained(folder)
        with hub.built_on():
            self.encoder = encoder_class(config).to(getattr(torch, dtype or "float32")).eval().requires_grad_(False)
        self.tokenizer, self.width = None, config.hidden_size
        self.length = getattr(config, "max_position_embeddings", 0)

    def forward(
        self, prompts: list[str], length: int, masked: bool = False, states: bool = False
    ) -> tuple[Any, Tensor]:
        """The encoder's output for the prompts, and ``(b, length)``, 1 where there is a token rather than padding.

        Args:
            prompts: texts.
            length: tokens that each is padded or cut to.
            masked: whether the encoder is told of the padding.
            states: whether its output has the states of all layers.
        """
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        device = next(self.encoder.parameters()).device
        mask = tokens.attention_mask.to(device)
        with torch.autocast(device.type, enabled=False):
            ids = tokens.input_ids.to(device)
            output = self.encoder(ids, attention_mask=mask if masked else None, output_hidden_states=states)
        return output, mask


def _load_tokenizer(tokenizer_class: Any, folder: Path) -> Any:
    try:
        return tokenizer_class.from_pretrained(folder)
    except Exception as error:  # a broken file raises a bare Exception in the library's Rust part
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: {tokenizer_class.__name__} cannot read it ({type(error).__name__}: {reason}).") from error
