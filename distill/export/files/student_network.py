"""The network of a student whose family is not one of diffusers, as a model that diffusers loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from .edm_modules import EDMUNet as Network  # type: ignore[import-not-found]


@dataclass
class StudentNetworkOutput(BaseOutput):
    """``sample``: the network's raw output ``(b, c, h, w)``."""

    sample: torch.Tensor


class StudentNetwork(ModelMixin, ConfigMixin):
    """The network of the file beside this one, called as ``UNet2DModel`` is.

    Args:
        settings: the arguments of its class.
        in_channels, sample_size: of a sample.
        num_class_embeds: number of classes, or None.
    """

    # Random frequencies that are rounded would be other features: they stay float32 in a network of half precision.
    _keep_in_fp32_modules = ["frequencies", "phases"]

    @register_to_config
    def __init__(
        self, settings: dict[str, Any], in_channels: int, sample_size: int, num_class_embeds: int | None = None
    ):
        super().__init__()
        self.network = Network(**settings)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> StudentNetworkOutput:
        """The output at one ``timestep`` for all samples, or ``(b,)`` of them."""
        return StudentNetworkOutput(self.network(sample, timestep.expand(len(sample)), class_labels))
