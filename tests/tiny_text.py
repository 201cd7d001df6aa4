"""Tiny text towers of the real classes with random weights, and tokenizers made here, in a diffusers pipeline's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "a photo of the digit zero one two three four five six seven eight nine an astronaut riding horse on mars".split()
CLIP_LENGTH = 16


def _byte_symbols() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_tokenizer(folder: str | Path, name: str = "tokenizer", length: int = CLIP_LENGTH, pad: str = "<|endoftext|>") -> Any:
    """Writes ``folder/name`` and returns the tokenizer: bytes, and a token of their own for most of `WORDS`.

    Args:
        length: tokens that prompts are padded and cut to (77 in the published ones).
        pad: the padding token; SDXL's second tokenizer pads with ``!``.
    """
    from transformers import CLIPTokenizer

    tokens, merges = [*_byte_symbols(), *(symbol + "</w>" for symbol in _byte_symbols())], []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=length)
    tokenizer.save_pretrained(Path(folder) / name)
    return tokenizer


def clip_text_model(
    folder: str | Path,
    name: str = "text_encoder",
    width: int = 16,
    layers: int = 2,
    length: int = CLIP_LENGTH,
    projection: int | None = None,
    seed: int = 0,
    vocabulary: Any = None,
) -> Any:
    """Writes ``folder/name`` and returns a CLIPTextModel of `clip_tokenizer`'s vocabulary, random weights of ``seed``.

    Args:
        projection: width of the pooled output of a CLIPTextModelWithProjection (SDXL's second tower, both of SD3), or None.
        vocabulary: another tokenizer.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = vocabulary or CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model_class = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return _saved(model_class, config, Path(folder) / name, seed)


def t5_tokenizer(folder: str | Path, name: str = "tokenizer") -> Any:
    """Writes ``folder/name`` and returns a unigram tokenizer of letters and `WORDS`, which ends prompts with ``</s>``."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"[1:]]
    pieces += [("A", -6.0)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(Path(folder) / name)
    return tokenizer


def t5_encoder(folder: str | Path, name: str = "text_encoder", width: int = 24, layers: int = 2, seed: int = 0) -> Any:
    """Writes ``folder/name`` and returns a T5EncoderModel."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=layers, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return _saved(T5EncoderModel, config, Path(folder) / name, seed)


def gemma_tokenizer(folder: str | Path, name: str = "tokenizer") -> Any:
    """Writes ``folder/name`` and returns a tokenizer of bytes, which begins prompts with ``<bos>``."""
    from tokenizers import processors
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + letters
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokens.index("<bos>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(Path(folder) / name)
    return tokenizer


def gemma_model(folder: str | Path, name: str = "text_encoder", width: int = 16, layers: int = 2, seed: int = 0) -> Any:
    """Writes ``folder/name`` and returns a Gemma2Model."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
        max_position_embeddings=8192,
    )
    return _saved(Gemma2Model, config, Path(folder) / name, seed)


def _saved(model_class: Any, config: Any, folder: Path, seed: int) -> Any:
    """A model with weights large enough that prompts matter, in eval mode, also in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, safe_serialization=True)
    return model
