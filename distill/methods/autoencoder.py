"""Training of an autoencoder for latent diffusion (Rombach et al. 2112.10752, section 3.1 and appendix G), KL-regularised.

    L = E_x [ |x - D(z)|_1 + beta KL( N(mu(x), sigma(x)^2) || N(0, 1) ) ],   z = mu(x) + sigma(x) n,   n ~ N(0, 1)
    x: (b, c, h, w), mu, sigma, z: (b, l, h/f, w/f); both terms are sums over the elements of an image

The paper adds a perceptual and an adversarial term; images too small for a perceptual network do without. Latents are later
multiplied by ``scaling_factor = 1 / std(z)``, measured on the training data, so that diffusion sees unit variance.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import Metric

from distill.methods.trained import TrainedModule
from distill.optimization import Optimization
from distill.types import Batch, DataSpec, Losses, PerSample

Latent = Float[Tensor, "b l h w"]


def gaussian_kl(mean: Latent, log_variance: Latent) -> PerSample:
    """``KL( N(mean, exp(log_variance)) || N(0, 1) )`` of each image, summed over the elements of its latent."""
    return (0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)).flatten(1).sum(1)


class AutoencoderTraining(TrainedModule):
    """Trains diffusers' ``AutoencoderKL``; exported as ``vae/`` with its scaling factor.

    Args:
        config: keywords of the class: ``in_channels``, ``latent_channels``, ``block_out_channels`` ...
        optimization: see `TrainedModule`.
        kl_weight: beta, at least 0; the paper has 1e-6.
        metrics: each has a ``name`` and ``update(images, real, cond)``; validated are reconstructions from the mean latent.

    Raises:
        ValueError: keywords that the class does not take, or a negative weight.
    """

    def __init__(
        self,
        config: dict[str, Any],
        optimization: Optimization,
        kl_weight: float = 1e-6,
        metrics: list[Metric] | None = None,
    ):
        from diffusers import AutoencoderKL

        if kl_weight < 0:
            raise ValueError(f"kl_weight={kl_weight}: give 0 or more.")
        try:
            student = AutoencoderKL(**config)
        except TypeError as error:
            raise ValueError(f"config={config}: AutoencoderKL does not take it ({error}).") from error
        super().__init__(student, optimization)
        self.kl_weight = kl_weight
        self.metrics: Any = nn.ModuleDict({str(metric.name): metric.clone() for metric in metrics or []})

    def losses(self, batch: Batch) -> Losses:
        assert batch.x0 is not None
        law = self.student.encode(batch.x0).latent_dist
        errors = (self.student.decode(law.sample()).sample - batch.x0).abs().flatten(1).sum(1)
        reconstruction, kl = errors.mean(), gaussian_kl(law.mean, law.logvar).mean()
        return {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}

    def check_data(self, spec: DataSpec) -> None:
        config = self.student.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        fits = len(spec.shape) == 3 and spec.shape[0] == config.in_channels and not any(n % factor for n in spec.shape[1:])
        if spec.codec is not None or not fits:
            raise ValueError(
                f"model.config reads images of {config.in_channels} channels whose sides {factor} divides, but data delivers "
                f"{spec.shape}{'' if spec.codec is None else ', latents of a codec'}: give such images, or another config."
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.x0 is not None
        network = self.ema.module
        images = network.decode(network.encode(batch.x0).latent_dist.mean).sample
        self.log("val/reconstruction", (images - batch.x0).abs().mean(), batch_size=len(batch))
        for name, metric in self.metrics.items():
            metric.update(images, batch.x0, batch.cond)
            self.log(f"val/{name}", metric, batch_size=len(batch))

    @torch.no_grad()
    def latent_std(self, batches: Iterable[Batch]) -> float:
        """Standard deviation of all elements of the averaged encoder's latents, draws included: sigma-hat of appendix G."""
        count, total, squares = 0, 0.0, 0.0
        for batch in batches:
            law = self.ema.module.encode(move_data_to_device(batch, self.device).x0).latent_dist
            mean, variance = law.mean.double(), law.var.double()
            count += mean.numel()
            total += float(mean.sum())
            squares += float((mean.square() + variance).sum())
        return (squares / count - (total / count) ** 2) ** 0.5

    def export(self, folder: Path, data: LightningDataModule) -> None:
        """Writes ``folder/vae``, its scaling factor measured on an epoch of the training data."""
        network = self.ema.module
        network.register_to_config(scaling_factor=1 / self.latent_std(data.train_dataloader()))
        network.save_pretrained(folder / "vae", safe_serialization=True)
