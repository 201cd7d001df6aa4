"""Between data and networks: pixels and prompts are encoded before a method sees them, samples are decoded to be shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.codecs import AutoencoderKLCodec, Codec, DeepCompressionCodec, IdentityCodec, TinyCodec
from distill.conditioners import (
    ClipConditioner,
    Conditioner,
    FluxConditioner,
    GemmaConditioner,
    StableDiffusion3Conditioner,
    StableDiffusionXLConditioner,
    T5Conditioner,
)
from distill.denoiser import Denoiser
from distill.types import Batch, Cond, DataSpec, Sample

CODECS: dict[str, Any] = {
    "AutoencoderKL": AutoencoderKLCodec,
    "AutoencoderDC": DeepCompressionCodec,
    "AutoencoderTiny": TinyCodec,
}
CONDITIONERS: dict[str, Any] = {
    "UNet2DConditionModel": ClipConditioner,
    "PixArtTransformer2DModel": T5Conditioner,
    "SD3Transformer2DModel": StableDiffusion3Conditioner,
    "FluxTransformer2DModel": FluxConditioner,
    "SanaTransformer2DModel": GemmaConditioner,
}


class ModelSpace(nn.Module):
    """Where networks work: latents instead of pixels, conditions instead of prompts.

    Args:
        codec: None if networks work on pixels.
        conditioner: None if the data has no prompts.
        offload: whether the weights of both stay in host memory, and are copied to the device for each call: memory of the
            device for time. Data that was encoded beforehand needs neither.
    """

    def __init__(self, codec: Codec | None = None, conditioner: Conditioner | None = None, offload: bool = False):
        super().__init__()
        self.codec, self.conditioner, self.offload = codec or IdentityCodec(), conditioner, offload
        self.device = torch.device("cpu")
        """Where calls compute."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModelSpace:
        self.device = fn(torch.empty(0, device=self.device)).device
        if self.offload:  # of what `fn` does to a weight, its type alone
            return super()._apply(lambda weight: weight.to(fn(weight.new_empty(0)).dtype), recurse)
        return super()._apply(fn, recurse)

    @contextmanager
    def at_work(self, part: nn.Module) -> Iterator[None]:
        """Within the block the weights of ``part``, the codec or the conditioner, are on the device that calls compute on.

        A backward pass through what was computed within it may come after: what it needs is kept until then.
        """
        if not self.offload or self.device.type == "cpu":
            yield
            return
        stores: list[dict[str, Any]] = [each for module in part.modules() for each in (module._parameters, module._buffers)]
        kept = [(store, name, weight) for store in stores for name, weight in store.items() if weight is not None]
        distinct = {id(weight): weight for _, _, weight in kept}  # one may be in two places
        copies = {number: self._copied(weight) for number, weight in distinct.items()}
        for store, name, weight in kept:
            store[name] = copies[id(weight)]
        try:
            yield
        finally:
            for store, name, weight in kept:
                store[name] = weight

    def _copied(self, weight: Tensor) -> Tensor:
        copied = weight.detach().to(self.device)
        return nn.Parameter(copied, requires_grad=False) if isinstance(weight, nn.Parameter) else copied

    @property
    def identity(self) -> dict[str, Any]:
        """Paths and hashes of the parts, what a checkpoint keeps of them."""
        return {"codec": self.codec.identity, "conditioner": self.conditioner and self.conditioner.identity}

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """The batch in model space; what is encoded already stays as it is. Draws from torch's global generator."""
        if batch.x0 is not None and not batch.encoded:
            with self.at_work(self.codec):
                batch = replace(batch, x0=self.codec.encode(batch.x0), encoded=True)
        if batch.prompts is not None and self.conditioner is not None:
            cond, null = self.condition(batch.prompts)
            batch = replace(batch, cond=batch.cond | cond, null=batch.null | null, prompts=None)
        return batch

    def condition(self, prompts: list[str]) -> tuple[Cond, Cond]:
        """Conditions and null conditions of the prompts, each distinct one encoded once."""
        assert self.conditioner is not None
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        with self.at_work(self.conditioner):
            cond, null = self.conditioner(list(numbers))
        rows = torch.tensor([numbers[prompt] for prompt in prompts])
        cond = {key: value[rows.to(value.device)] for key, value in cond.items()}
        return cond, {key: value[:1].expand(len(prompts), *value.shape[1:]) for key, value in null.items()}

    @torch.no_grad()
    def decode(self, samples: Sample) -> Tensor:
        """Pixels ``(b, c, h, w)`` of samples in model space."""
        return self.decode_with_gradient(samples)

    def decode_with_gradient(self, samples: Sample) -> Tensor:
        """The same, for losses in pixels."""
        with self.at_work(self.codec):
            return self.codec.decode(samples)

    def spec(self, spec: DataSpec) -> DataSpec:
        """What networks are given of data that delivers ``spec``.

        Raises:
            ValueError: prompts without a conditioner, data encoded by another codec or conditioner, images that the codec
                cannot encode; names the keys and the values.
        """
        for part, made_by in (("codec", spec.codec), ("conditioner", spec.conditioner)):
            own = (self.identity[part] or {}).get("sha256")
            if made_by is not None and own is not None and made_by != own:
                raise ValueError(
                    f"data was encoded by a {part} with sha256 {made_by[:12]}, but model.space.{part} is "
                    f"{self.identity[part]}: give the same weights, or encode the data again by tools/encode_latents.py."
                )
        if spec.prompts and self.conditioner is None:
            raise ValueError("data delivers prompts, but model.space.conditioner is null: give that of the teacher.")
        widths = dict(spec.widths) | (self.conditioner.widths if spec.prompts and self.conditioner else {})
        shape = spec.shape if spec.codec is not None else self.codec.latent_shape(spec.shape)
        return replace(spec, shape=shape, widths=widths)


def check_fit(key: str, denoiser: Denoiser, spec: DataSpec) -> None:
    """Raises ValueError if the denoiser of a config's ``key`` cannot take data, given in model space, of ``spec``."""
    shape = denoiser.shape
    fits = shape is None or (len(shape) == len(spec.shape) and all(a in (None, b) for a, b in zip(shape, spec.shape)))
    if not fits:
        raise ValueError(
            f"{key} works on samples of shape {shape} (channels, height, width), but data delivers {spec.shape}: "
            f"give a {key.split('.')[-1]} of the data's shape, or other data or another model.space.codec."
        )
    if denoiser.num_classes is not None and denoiser.num_classes != spec.num_classes:
        raise ValueError(
            f"{key} has {denoiser.num_classes} classes, but data has {spec.num_classes}: "
            f"give a {key.split('.')[-1]} with as many classes as the data."
        )
    for name, width in denoiser.widths.items():
        if name not in spec.widths:
            raise ValueError(
                f"{key} must be given {name!r}, which neither data nor model.space.conditioner makes "
                f"({sorted(spec.widths) or 'no text conditions'}): set model.space.conditioner to the one of its family."
            )
        if spec.widths[name] != width:
            raise ValueError(
                f"{key} reads {name!r} of width {width}, but model.space.conditioner makes width {spec.widths[name]}: "
                "give the text encoder that the network was trained with."
            )


def space_of(path: str, network: nn.Module) -> ModelSpace:
    """The model space of a teacher: the codec and the text encoders that lie beside its network in a diffusers folder.

    Args:
        path: the pipeline's folder.
        network: the network in it, which says by its class which text encoders belong to it.

    Raises:
        ValueError: the folder has a codec of an unknown class, or no text encoder for a network that reads prompts.
    """
    folder, codec, conditioner = Path(path), None, None
    if (config := folder / "vae" / "config.json").is_file():
        name = json.loads(config.read_text())["_class_name"]
        if name not in CODECS:
            raise ValueError(f"{config}: a codec of class {name} is not known; known are {sorted(CODECS)}.")
        codec = CODECS[name](path)
    if widths := dict(getattr(network, "widths", {})):
        if not (folder / "text_encoder").is_dir():
            raise ValueError(f"{path}: its network reads {sorted(widths)}, but there is no text_encoder/ beside it.")
        kind = str(getattr(network, "model_class", ""))
        two_towers = kind == "UNet2DConditionModel" and "pooled_prompt_embeds" in widths
        conditioner = (StableDiffusionXLConditioner if two_towers else CONDITIONERS[kind])(path)
    return ModelSpace(codec, conditioner)
