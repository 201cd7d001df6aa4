"""PixArt and Sana: one text encoder whose padding is masked (Chen et al. 2310.00426, 2403.04692; Xie et al. 2410.10629)."""

from __future__ import annotations

import inspect
from pathlib import Path

from distill.conditioners.base import PipelineConditioner, pipeline_config
from distill.conditioners.joint import check_length
from distill.conditioners.towers import GEMMA, T5, Precision, locate_towers
from distill.types import Cond

PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


def plain(prompts: list[str]) -> list[str]:
    """Lower case without outer blanks, which is what both pipelines do with ``clean_caption=False``.

    Their ``clean_caption`` (markup, addresses and odd characters removed) needs bs4 and ftfy; clean such captions beforehand.
    """
    return [prompt.lower().strip() for prompt in prompts]


class T5Conditioner(PipelineConditioner):
    """PixArt's conditions, as PixArtAlphaPipeline and PixArtSigmaPipeline have them with ``clean_caption=False``.

    ``prompt_embeds``: T5's states; ``prompt_mask``: where there are tokens; of networks that read them also ``resolution`` and
    ``aspect_ratio``. Null: those of "", with its own mask.

    Args:
        path, revision, variant, dtype, allow_pickle: see `PipelineConditioner`.
        max_length: tokens; null for those of the pipeline that ``model_index.json`` names, 120 of PixArt-alpha, 300 of -Sigma.
        size: height and width of the images in pixels, for PixArt-alpha at 1024, which reads them; null for others.

    Raises:
        FileNotFoundError, ValueError: see `PipelineConditioner`; no ``max_length`` for another pipeline.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        max_length: int | None = None,
        size: tuple[int, int] | None = None,
        allow_pickle: bool = False,
    ):
        if max_length is not None:
            check_length(max_length)
        super().__init__(path, {"": T5}, revision, variant, dtype, allow_pickle)
        pipeline = pipeline_config(self.root).get("_class_name", "")
        if max_length is None and pipeline not in PIXART_TOKENS:
            named = pipeline or "no pipeline"
            raise ValueError(f"max_length=null: {path!r} is of {named}, whose number of tokens is not known; give it.")
        self.max_length, self.size = max_length or PIXART_TOKENS[pipeline], size
        self.identify({"max_length": self.max_length, "size": size})
        self.widths = {"prompt_embeds": self.towers[0].width, "prompt_mask": self.max_length}
        if size is not None:
            self.widths |= {"resolution": 2, "aspect_ratio": 1}

    @staticmethod
    def locate(path: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False) -> Path:
        """Fetches and checks all that the constructor will read."""
        return locate_towers(path, {"": T5}, revision, variant, allow_pickle)

    def encode(self, prompts: list[str]) -> Cond:
        output, mask = self.towers[0](plain(prompts), self.max_length, masked=True)
        cond = {"prompt_embeds": output[0], "prompt_mask": mask}
        if self.size is not None:
            height, width = self.size
            cond["resolution"] = self.rows([height, width], len(prompts))
            cond["aspect_ratio"] = self.rows([height / width], len(prompts))
        return cond


class GemmaConditioner(PipelineConditioner):
    """Sana's conditions, as SanaPipeline has them with ``clean_caption=False``.

    ``prompt_embeds``: Gemma's states of an instruction followed by the prompt, of which the first and the last
    ``max_length - 1`` are kept; ``prompt_mask``: where these are tokens. Null: those of "" without the instruction.

    Args:
        path, revision, variant, dtype, allow_pickle: see `PipelineConditioner`.
        max_length: states that are kept.
        instruction: whether the instruction, the one that SanaPipeline has by default, precedes each prompt.

    Raises:
        FileNotFoundError, ValueError: see `PipelineConditioner`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        max_length: int = 300,
        instruction: bool = True,
        allow_pickle: bool = False,
    ):
        check_length(max_length)
        super().__init__(path, {"": GEMMA}, revision, variant, dtype, allow_pickle)
        self.max_length, self.instruction = max_length, sana_instruction() if instruction else ""
        self.identify({"max_length": max_length, "instruction": self.instruction})
        tokenizer = self.towers[0].tokenizer
        tokenizer.padding_side = "right"
        # The pipeline's count: the begin token and the blank at the instruction's end are among those that are kept.
        self.tokens = max_length + (len(tokenizer.encode(self.instruction)) - 2 if instruction else 0)
        self.widths = {"prompt_embeds": self.towers[0].width, "prompt_mask": max_length}

    @staticmethod
    def locate(path: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False) -> Path:
        """Fetches and checks all that the constructor will read."""
        return locate_towers(path, {"": GEMMA}, revision, variant, allow_pickle)

    def encode(self, prompts: list[str]) -> Cond:
        return self._encode([self.instruction + prompt for prompt in plain(prompts)], self.tokens)

    def encode_null(self) -> Cond:
        return self._encode([""], self.max_length)

    def _encode(self, texts: list[str], tokens: int) -> Cond:
        output, mask = self.towers[0](texts, tokens, masked=True)
        kept = [0, *range(1 - self.max_length, 0)]
        return {"prompt_embeds": output[0][:, kept], "prompt_mask": mask[:, kept]}


def sana_instruction() -> str:
    """The text that SanaPipeline puts before prompts unless told otherwise."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
