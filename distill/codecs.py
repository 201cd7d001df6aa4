"""Codecs: between pixels in [-1, 1] and the space that networks work in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill import hub

Precision = Literal["float32", "bfloat16", "float16"]


class Codec(nn.Module, ABC):
    """Pixels ``(b, c, h, w)`` in [-1, 1] to latents and back. Never trained by a method.

    Attributes:
        identity: ``path`` and ``sha256`` of configs and weights, or None for one without weights.
    """

    identity: dict[str, str] | None = None

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents, float32; where the codec is a law, one draw of torch's global generator."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, float32, not clamped."""

    @abstractmethod
    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latent of one image of shape ``(c, h, w)``. Raises ValueError for one that it cannot encode."""


class IdentityCodec(Codec):
    """Networks that work on pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        return pixels


class DiffusersCodec(Codec, ABC):
    """An autoencoder of diffusers: ``latent = (code - shift) factor / deviation``, ``code`` being what its encoder gives.

    Frozen, in evaluation mode for good, and never under autocast: it computes in ``dtype`` and takes and gives float32.
    Gradients pass through it to its input.

    Args:
        path: a pipeline's or an autoencoder's folder, or a hub id.
        subfolder: of the autoencoder; null if ``path`` is the autoencoder itself.
        revision: of a hub repository.
        variant: of the weights' files, ``fp16`` for instance.
        dtype: precision in which it computes, float32 unless given. float16 becomes float32 where the config says
            ``force_upcast`` (SDXL's overflows in float16), as in diffusers' pipelines; bfloat16 does not overflow.
        tiling: whether large images are worked on in overlapping tiles: less memory, slightly other values.
        slicing: whether images are worked on one by one: less memory, the same values.
        micro_batch: images worked on at once (LCM's training script takes 32), or None for all.
        allow_pickle: whether weights may be a ``.bin`` file where there are no safetensors.

    Attributes:
        model: the autoencoder.
        factor: the config's scaling_factor.
        shift, deviation: its shift_factor and 1, or for each channel ``(c, 1, 1)`` its latents_mean and latents_std.

    Raises:
        FileNotFoundError: a missing folder, config or weights.
        ValueError: an autoencoder of another class, a config that is not known, weights that are incomplete.
    """

    model_class: ClassVar[str]
    factor: float
    shift: float | Tensor
    deviation: float | Tensor

    def __init__(
        self,
        path: str,
        subfolder: str | None = "vae",
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        tiling: bool = False,
        slicing: bool = False,
        micro_batch: int | None = None,
        allow_pickle: bool = False,
    ):
        super().__init__()
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch={micro_batch}: give a number of at least 1, or null for the whole batch at once.")
        folder = self.locate(path, subfolder, revision, variant, allow_pickle)
        config = hub.read_json(folder / "config.json")
        self._read_scale(config, folder)
        upcast = dtype == "float16" and config.get("force_upcast", self.model_class == "AutoencoderKL")
        self.model = self._load(folder, "float32" if upcast else dtype or "float32", variant, allow_pickle)
        if tiling:
            self.model.enable_tiling()
        if slicing:
            self.model.enable_slicing()
        self.path, self.micro_batch = path, micro_batch
        root = folder.parent if subfolder else folder
        self.identity = hub.identity(path, root, hub.component_files(root, subfolder or "", variant, allow_pickle))

    @classmethod
    def locate(
        cls,
        path: str,
        subfolder: str | None = "vae",
        revision: str | None = None,
        variant: str | None = None,
        allow_pickle: bool = False,
    ) -> Path:
        """The folder with the config and weights, fetched if need be; see `distill.hub`."""
        folder = hub.component_folder(path, subfolder or "", revision, variant, allow_pickle)
        found = hub.read_json(folder / "config.json").get("_class_name")
        if found != cls.model_class:
            raise ValueError(f"path={path!r}: {subfolder or '.'}/ holds a {found}, {cls.__name__} reads {cls.model_class}.")
        return folder

    @classmethod
    def _load(cls, folder: Path, dtype: str, variant: str | None, allow_pickle: bool) -> Any:
        import diffusers

        if not hub.reads_weights():
            with hub.built_on():
                built = getattr(diffusers, cls.model_class).from_config(hub.read_json(folder / "config.json"))
            return nn.Module.to(built, getattr(torch, dtype)).eval().requires_grad_(False)  # diffusers' own warns for nothing
        model, report = getattr(diffusers, cls.model_class).from_pretrained(
            folder,
            torch_dtype=getattr(torch, dtype),
            variant=variant,
            use_safetensors=not allow_pickle or bool(hub.weight_files(folder, variant)),
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ValueError(f"{folder}: the weights lack {report['missing_keys'][0]} ({len(report['missing_keys'])} in all).")
        return model.eval().requires_grad_(False)

    def _read_scale(self, config: dict[str, Any], folder: Path) -> None:
        shift, mean, std = config.get("shift_factor"), config.get("latents_mean"), config.get("latents_std")
        self.factor, self.shift, self.deviation = config.get("scaling_factor", 1.0), shift or 0.0, 1.0
        if mean is None and std is None:
            return
        if mean is None or std is None or shift:
            given = f"latents_mean={mean}, latents_std={std}, shift_factor={shift}"
            raise ValueError(f"{folder}/config.json: {given}: known are latents_mean with latents_std, or shift_factor.")
        for name, values in {"shift": mean, "deviation": std}.items():
            delattr(self, name)
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    # ------------------------------------------------------------------------------------------------------- the map

    @property
    @abstractmethod
    def compression(self) -> int:
        """Pixels on a side that become one element of the latent."""

    @abstractmethod
    def code(self, pixels: Tensor) -> Tensor:
        """What the encoder gives for ``pixels`` in the model's precision: a code, or the parameters of its law."""

    def draw(self, code: Tensor) -> Tensor:
        """A code of what `code` gave, float32."""
        return code

    def train(self, mode: bool = True) -> DiffusersCodec:
        """Stays in evaluation mode."""
        return super().train(False)

    def latent_shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        channels, height, width = pixels
        config, factor = self.model.config, self.compression
        if channels != config.in_channels:
            raise ValueError(
                f"images have {channels} channels, but the {self.model_class} of path={self.path!r} takes "
                f"{config.in_channels}: give data with {config.in_channels} channels, or another autoencoder."
            )
        if height % factor or width % factor:
            raise ValueError(
                f"images are {height}x{width}, but {self.model_class} turns {factor}x{factor} pixels into one element: "
                f"give a height and a width that {factor} divides."
            )
        return config.latent_channels, height // factor, width // factor

    def encode(self, pixels: Tensor) -> Tensor:
        self.latent_shape(tuple(pixels.shape[1:]))
        code = torch.cat([self._run(self.code, part) for part in pixels.split(self.micro_batch or len(pixels))])
        return (self.draw(code) - self.shift) * self.factor / self.deviation

    def decode(self, latents: Tensor) -> Tensor:
        # In this order pipelines scale, and floats round.
        codes = latents.float() * self.deviation / self.factor + self.shift
        parts = codes.split(self.micro_batch or len(codes))
        return torch.cat([self._run(lambda part: self.model.decode(part).sample, part) for part in parts])

    def _run(self, function: Any, part: Tensor) -> Tensor:
        with torch.autocast(part.device.type, enabled=False):
            return function(part.to(next(self.model.parameters()).dtype)).float()


class AutoencoderKLCodec(DiffusersCodec):
    """The autoencoders of Stable Diffusion 1.x, 2.x, XL, 3, of Flux and of PixArt: AutoencoderKL.

    Args:
        path, subfolder, revision, variant, dtype, tiling, slicing, micro_batch, allow_pickle: see `DiffusersCodec`.
        sample: whether a latent is a draw of the encoder's Gaussian (as LCM trains), or its mean.
    """

    model_class = "AutoencoderKL"

    def __init__(
        self,
        path: str,
        subfolder: str | None = "vae",
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision | None = None,
        tiling: bool = False,
        slicing: bool = False,
        sample: bool = True,
        micro_batch: int | None = None,
        allow_pickle: bool = False,
    ):
        super().__init__(path, subfolder, revision, variant, dtype, tiling, slicing, micro_batch, allow_pickle)
        self.sample = sample

    @property
    def compression(self) -> int:
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    def code(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels).latent_dist.parameters

    def draw(self, code: Tensor) -> Tensor:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        law = DiagonalGaussianDistribution(code)
        # One draw for the whole batch: the same latents whatever micro_batch is.
        return law.sample() if self.sample else law.mode()


class DeepCompressionCodec(DiffusersCodec):
    """The autoencoder of Sana: AutoencoderDC (Chen et al. 2410.10733), 32x32 pixels to one element; no law, no draw."""

    model_class = "AutoencoderDC"

    @property
    def compression(self) -> int:
        return self.model.spatial_compression_ratio

    def code(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels).latent


class TinyCodec(DiffusersCodec):
    """A small autoencoder distilled from a large one, in the latter's latents: AutoencoderTiny; no law, no draw."""

    model_class = "AutoencoderTiny"

    @property
    def compression(self) -> int:
        return 2 ** (len(self.model.config.encoder_block_out_channels) - 1)

    def code(self, pixels: Tensor) -> Tensor:
        return self.model.encode(pixels).latents
