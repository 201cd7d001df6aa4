"""A CLIP tokenizer for a small vocabulary: byte pairs (Sennrich et al. 1508.07909, algorithm 1) learnt from given words."""

from __future__ import annotations

from collections import Counter
from typing import Any

END = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Pairs of symbols to be merged, in order, until every word is one symbol (its last letter marked by ``</w>``).

    The most frequent pair goes first, of equally frequent ones the first in the alphabet: the same words give the same merges.
    """
    counts = Counter((*word[:-1], word[-1] + END) for word in words)
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in counts.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        counts = Counter({_merged(symbols, best): count for symbols, count in counts.items()})


def _merged(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """``symbols`` with every neighbouring ``pair``, from the left, made one."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def make_clip_tokenizer(corpus: str, length: int) -> Any:
    """transformers' ``CLIPTokenizer`` in which every word of the corpus is one token, and any other text is spelt in bytes.

    Tokens are in CLIP's order: bytes, bytes that end a word, merges, start and end of the text; the end also pads.

    Args:
        corpus: words of letters a-z, lower case, separated by blanks.
        length: tokens, start and end included, that texts are padded and cut to; at least 2.

    Raises:
        ValueError: an empty corpus, other characters in it, or too short a length.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    words = corpus.split()
    if not words or not all(word.isascii() and word.isalpha() and word.islower() for word in words):
        raise ValueError(f"corpus={corpus!r}: give words of letters a-z, separated by blanks.")
    if length < 2:
        raise ValueError(f"length={length}: give at least 2, the start and the end of a text.")
    merges, letters = learn_merges(words), sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + END for letter in letters), *(left + right for left, right in merges), *SPECIAL]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)  # type: ignore[arg-type]
