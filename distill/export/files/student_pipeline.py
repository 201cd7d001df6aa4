"""Samples of a few-step student of images, with or without classes; needs torch and diffusers alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class StudentPipeline(DiffusionPipeline):
    """Draws images by a ``UNet2DModel`` and a scheduler.

    Args:
        unet: the network.
        scheduler: with the student's own sampler.
    """

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images: one for each of ``class_labels`` (0 to classes - 1), or ``batch_size`` of them for a student without classes.

        Args:
            latents: unit noise ``(n, c, h, w)`` to start from; None draws it from ``generator``.
            output_type: ``pil``, ``np`` (n, h, w, c) or ``pt`` (n, c, h, w), the last two in [0, 1].
        """
        device, config = self._execution_device, self.unet.config
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=device).reshape(-1)
        if (labels is None) != (config.num_class_embeds is None):
            raise ValueError(f"class_labels={class_labels}: this network has {config.num_class_embeds} class embeddings.")
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        count = batch_size if labels is None else len(labels)
        if latents is None:
            shape = (count, config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        image = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma
        for time in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(image, time)
            output = self.unet(seen, time, class_labels=labels).sample
            image = self.scheduler.step(output, time, image, generator=generator, return_dict=False)[0]
        image = (image / 2 + 0.5).clamp(0, 1)
        images: Any = image
        if output_type != "pt":
            images = image.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
