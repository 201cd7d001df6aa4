"""The families of diffusers models that have a wrapper here, by the name of the model's class."""

from __future__ import annotations

from distill.networks.base import DiffusersNetwork
from distill.networks.dit import DiT
from distill.networks.flux import Flux
from distill.networks.pixart import PixArt
from distill.networks.sana import Sana
from distill.networks.sd3 import SD3
from distill.networks.unet2d import UNet2D
from distill.networks.unet2d_condition import UNet2DCondition

FAMILIES: dict[str, type[DiffusersNetwork]] = {
    family.model_class: family for family in (UNet2D, UNet2DCondition, DiT, PixArt, SD3, Flux, Sana)
}
