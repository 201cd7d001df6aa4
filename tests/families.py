"""A tiny random model of each family of diffusers, with the scheduler's config and the conditions that the family usually has.

``FAMILIES["sdxl"].model()`` is a model of the real class with weights that are the same at every call, ``.scheduler()`` its
scheduler, ``.pipeline()`` the family's own pipeline around both (without text encoders and codec: it takes embeddings and
latents, and gives latents), ``.save(folder)`` the folder that diffusers writes. Samples are ``(channels, size, size)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.types import Cond, label_conditions

TOKENS = 5


def no_conditions(batch: int) -> tuple[Cond, Cond]:
    return {}, {}


def labels(batch: int) -> tuple[Cond, Cond]:
    return label_conditions(torch.arange(batch) % 10, 10)


def texts(
    width: int, pooled: int | None = None, masked: bool = False, sizes: Callable[[int], Cond] | None = None
) -> Callable[[int], tuple[Cond, Cond]]:
    """Random embeddings of prompts and of no prompt; ``sizes`` are conditions that are the same in both."""

    def make(batch: int) -> tuple[Cond, Cond]:
        generator = torch.Generator().manual_seed(batch)
        cond = {"prompt_embeds": torch.randn(batch, TOKENS, width, generator=generator)}
        null = {"prompt_embeds": torch.randn(1, TOKENS, width, generator=generator).repeat(batch, 1, 1)}
        if pooled is not None:
            cond["pooled_prompt_embeds"] = torch.randn(batch, pooled, generator=generator)
            null["pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator).repeat(batch, 1)
        if masked:
            lengths = 2 + torch.arange(batch) % (TOKENS - 1)
            cond["prompt_mask"] = (torch.arange(TOKENS) < lengths[:, None]).long()
            null["prompt_mask"] = (torch.arange(TOKENS) < 1).long().repeat(batch, 1)
        shared = {} if sizes is None else sizes(batch)
        return cond | shared, null | shared

    return make


def sdxl_sizes(batch: int) -> Cond:
    return {"time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(batch, 1)}


def alpha_sizes(batch: int) -> Cond:
    return {"resolution": torch.tensor([[64.0, 64.0]]).repeat(batch, 1), "aspect_ratio": torch.ones(batch, 1)}


@dataclass(frozen=True)
class Tiny:
    """One family: names of the classes in diffusers, the keywords that they are made by, and conditions by batch size."""

    model_class: str
    config: dict[str, Any]
    scheduler_class: str
    scheduler_config: dict[str, Any]
    pipeline_class: str
    conditions: Callable[[int], tuple[Cond, Cond]]
    channels: int = 4
    size: int = 8

    @property
    def component(self) -> str:
        return "unet" if self.model_class.startswith("UNet") else "transformer"

    @property
    def tokens(self) -> int:
        """Patches of 2x2 in a sample: what the shift of Flux's schedule depends on."""
        return (self.size // 2) ** 2

    def model(self, **changes: Any) -> Any:
        """The model in eval mode; ``changes`` of its config. The global random state stays as it was."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(diffusers, self.model_class)(**(self.config | changes)).eval()

    def scheduler(self) -> Any:
        import diffusers

        return getattr(diffusers, self.scheduler_class)(**self.scheduler_config)

    def cond(self, batch: int) -> tuple[Cond, Cond]:
        """Conditions and null conditions of ``batch`` samples, the same at every call."""
        return self.conditions(batch)

    def pipeline(self, model: Any = None, scheduler: Any = None) -> Any:
        """The family's own pipeline around the model (or another one of its class); all its other parts are None."""
        import diffusers

        pipeline_class = getattr(diffusers, self.pipeline_class)
        required, optional = pipeline_class._get_signature_keys(pipeline_class)
        parts: dict[str, Any] = dict.fromkeys(required)
        parts |= {self.component: model or self.model(), "scheduler": scheduler or self.scheduler()}
        if "requires_safety_checker" in optional:
            parts["requires_safety_checker"] = False
        pipeline = pipeline_class(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, folder: str | Path) -> None:
        """Writes ``<component>/``, ``scheduler/`` and ``model_index.json``; the pipeline's other parts are null there."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)


UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=2,
)
"""SD 1.x: convolutional projections in the attention; the keywords of the others are differences to it."""

PIXART = dict(
    sample_size=8,
    in_channels=4,
    out_channels=8,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=1,
    cross_attention_dim=24,
    caption_channels=12,
)
FLUX = dict(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 6, 6),
)
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
LINEAR_BETAS = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000)
SD_STEPS = dict(steps_offset=1, set_alpha_to_one=False)

FAMILIES = {
    "ddpm": Tiny(
        "UNet2DModel",
        dict(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            freq_shift=1,
            flip_sin_to_cos=False,
        ),
        "DDPMScheduler",
        dict(LINEAR_BETAS, clip_sample=True, variance_type="fixed_large"),
        "DDPMPipeline",
        no_conditions,
        channels=3,
    ),
    "sd15": Tiny(
        "UNet2DConditionModel",
        UNET,
        "PNDMScheduler",
        dict(SD_BETAS, **SD_STEPS, skip_prk_steps=True),
        "StableDiffusionPipeline",
        texts(12),
    ),
    "sd2": Tiny(
        "UNet2DConditionModel",
        dict(UNET, use_linear_projection=True, attention_head_dim=(2, 4)),
        "DDIMScheduler",
        dict(SD_BETAS, **SD_STEPS, clip_sample=False, prediction_type="v_prediction"),
        "StableDiffusionPipeline",
        texts(12),
    ),
    "sdxl": Tiny(
        "UNet2DConditionModel",
        dict(
            UNET,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 10,
        ),
        "EulerDiscreteScheduler",
        dict(SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        "StableDiffusionXLPipeline",
        texts(12, pooled=10, sizes=sdxl_sizes),
    ),
    "dit": Tiny(
        "DiTTransformer2DModel",
        dict(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_embeds_ada_norm=10,
        ),
        "DDIMScheduler",
        dict(LINEAR_BETAS, clip_sample=False),
        "DiTPipeline",
        labels,
    ),
    # The pipeline gives sizes to models whose sample_size is 128, as the published one's is: such is this one too.
    "pixart-alpha": Tiny(
        "PixArtTransformer2DModel",
        dict(PIXART, sample_size=128),
        "DPMSolverMultistepScheduler",
        LINEAR_BETAS,
        "PixArtAlphaPipeline",
        texts(12, masked=True, sizes=alpha_sizes),
    ),
    "pixart-sigma": Tiny(
        "PixArtTransformer2DModel",
        dict(PIXART, use_additional_conditions=False),
        "DPMSolverMultistepScheduler",
        LINEAR_BETAS,
        "PixArtSigmaPipeline",
        texts(12, masked=True),
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=6,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "FlowMatchEulerDiscreteScheduler",
        dict(shift=3.0),
        "StableDiffusion3Pipeline",
        texts(12, pooled=10),
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        dict(FLUX, guidance_embeds=True),
        "FlowMatchEulerDiscreteScheduler",
        dict(shift=3.0, use_dynamic_shifting=True),
        "FluxPipeline",
        texts(12, pooled=10),
    ),
    "flux-schnell": Tiny(
        "FluxTransformer2DModel",
        dict(FLUX, guidance_embeds=False),
        "FlowMatchEulerDiscreteScheduler",
        dict(shift=1.0),
        "FluxPipeline",
        texts(12, pooled=10),
    ),
    "sana": Tiny(
        "SanaTransformer2DModel",
        dict(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
        ),
        "DPMSolverMultistepScheduler",
        dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        "SanaPipeline",
        texts(12, masked=True),
    ),
}
"""By a short name; ``flux`` embeds guidance and has a shift that depends on the number of tokens, ``flux-schnell`` neither."""

LCM = Tiny(
    "UNet2DConditionModel",
    dict(UNET, time_cond_proj_dim=32),
    "LCMScheduler",
    dict(SD_BETAS),
    "LatentConsistencyModelPipeline",
    texts(12),
)
"""A student whose time embedding reads the guidance scale: not a family of teachers, hence apart."""
