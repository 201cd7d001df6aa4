"""NVIDIA's published EDM and EDM2 networks in this package's terms: settings and names of weights, every one accounted for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.safe_pickle import PickledObject, read_pickle

# Published settings, and their defaults there. Those of a kind that is known here are fixed; sizes are read; rates that
# matter to diffusion training alone, and what makes labels of augmentations, are not.
SONG = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "resample_filter": [1, 1]}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
FIXED: dict[str, dict[str, Any]] = {
    "ddpmpp": {**SONG, "decoder_type": "standard", "channel_mult_emb": 4},
    "ncsnpp": {**NCSNPP, "decoder_type": "standard", "channel_mult_emb": 4},
    "adm": {"channel_mult_emb": 4},
    "edm2": {
        "channel_mult_noise": None,
        "channel_mult_emb": None,
        "label_balance": 0.5,
        "concat_balance": 0.5,
        "resample_filter": [1, 1],
        "res_balance": 0.3,
        "attn_balance": 0.3,
        "clip_act": 256,
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "SongUNet": {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]},
    "DhariwalUNet": {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]},
    "UNet": {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [16, 8]},
}
UNREAD_SETTINGS = ("augment_dim", "dropout", "label_dropout", "dropout_res")
PRECONDITIONINGS = {"EDMPrecond": "model", "Precond": "unet"}
"""The preconditionings that are EDM's, and what they call their network."""

KEYS = [
    (r"map_noise\.freqs", "time.frequencies"),
    (r"emb_fourier\.freqs", "time.frequencies"),
    (r"emb_fourier\.phases", "time.phases"),
    (r"map_layer0\.", "embed.0."),
    (r"map_layer1\.", "embed.2."),
    (r"emb_noise\.", "embed."),
    (r"(map|emb)_label\.", "label."),
    (r"enc\.\d+x\d+_conv\.", "stem."),
    (r"enc\.(\d+)x\d+_down\.", r"encoder.<\1>.down."),
    (r"enc\.(\d+)x\d+_aux_residual\.", r"encoder.<\1>.image.0."),
    (r"enc\.(\d+)x\d+_block(\d+)\.", r"encoder.<\1>.blocks.\2."),
    (r"dec\.(\d+)x\d+_(?:in0|up)\.", r"decoder.<-\1>.entry.0."),
    (r"dec\.(\d+)x\d+_in1\.", r"decoder.<-\1>.entry.1."),
    (r"dec\.(\d+)x\d+_block(\d+)\.", r"decoder.<-\1>.blocks.\2."),
    (r"(dec\.\d+x\d+_aux|out)_norm\.", "norm_out."),
    (r"(dec\.\d+x\d+_aux|out)_conv\.", "conv_out."),
]
"""Beginnings of published keys, and ours; ``<r>`` stands for the level of resolution r, ``<-r>`` counts from the bottom."""

BLOCK_KEYS = {
    "norm0": "norm_in",
    "conv0": "conv_in",
    "conv_res0": "conv_in",
    "affine": "embed",
    "emb_linear": "embed",
    "norm1": "norm_out",
    "conv1": "conv_out",
    "conv_res1": "conv_out",
    "conv_skip": "skip",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "attn_qkv": "attention.qkv",
    "proj": "attention.out",
    "attn_proj": "attention.out",
    "emb_gain": "embed_gain",
}


@dataclass
class Published:
    """A published network in this package's terms.

    Attributes:
        network: ``EDM`` or ``EDM2``.
        config: the keywords of that class.
        sigma_data: of the preconditioning.
        state: the state dict of its model.
        unread: names of the published tensors that no sampler needs: what labels of augmentations and the uncertainty are
            made by, and resampling filters, which follow from the architecture.
    """

    network: str
    config: dict[str, Any]
    sigma_data: float
    state: dict[str, Tensor]
    unread: list[str]


def read_published(path: str | Path) -> Published:
    """The averaged network of a published pickle (its key ``ema``), read by `distill.safe_pickle`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a pickle; another preconditioning than EDM's; a setting or a tensor that is not known here.
    """
    content = read_pickle(path)
    precondition = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(precondition, PickledObject):
        raise ValueError(f"path={str(path)!r}: holds no network under 'ema', as the files of NVlabs/edm and NVlabs/edm2 do.")
    if precondition.class_name not in PRECONDITIONINGS:
        raise ValueError(
            f"path={str(path)!r}: a network with {precondition.class_name}; only EDM's own preconditioning is known "
            f"({' and '.join(PRECONDITIONINGS)}): give an edm-* or edm2-* file, not a baseline-* one."
        )
    try:
        inner = precondition.state["_modules"][PRECONDITIONINGS[precondition.class_name]]
        network, config = _read_settings(inner)
        sigma_data = float(precondition.arguments.get("sigma_data", 0.5))
        state, unread = _rename(inner.tensors(), config)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"path={str(path)!r}: not a network of NVlabs/edm or edm2 ({error!r}).") from error
    outer = set(precondition.tensors()) - {f"{PRECONDITIONINGS[precondition.class_name]}.{key}" for key in inner.tensors()}
    if unknown := sorted(key for key in outer if not key.startswith("logvar_")):
        raise ValueError(f"path={str(path)!r}: tensors {unknown[:3]} are not known.")
    return Published(network, config, sigma_data, state, sorted({*unread, *outer}))


def _read_settings(inner: PickledObject) -> tuple[str, dict[str, Any]]:
    """Name and keywords of our network. Raises ValueError for a class, a setting or a combination that is not known."""
    kind, given = inner.class_name, inner.arguments
    if kind not in SIZES:
        raise ValueError(f"a network of class {kind}; known are {', '.join(SIZES)}.")
    size = {**SIZES[kind], **{key: value for key, value in given.items() if key in SIZES[kind]}}
    channels = given.get("img_channels") if kind == "UNet" else given.get("in_channels")
    if kind != "UNet" and given.get("out_channels") != channels:
        raise ValueError(f"out_channels={given.get('out_channels')}: only in_channels={channels} of them are known.")
    own = {"img_resolution", "img_channels", "in_channels", "out_channels", "label_dim", "channels_per_head"}
    special = {key: value for key, value in given.items() if key not in {*own, *SIZES[kind], *UNREAD_SETTINGS}}
    architecture = _architecture(kind, special)
    config = {
        "sample_size": given["img_resolution"],
        "in_channels": channels,
        "num_classes": given.get("label_dim") or None,
        "multipliers": list(size["channel_mult"]),
        "blocks": size["num_blocks"],
        "attention": list(size["attn_resolutions"]),
        "head_width": given.get("channels_per_head", 64),
    }
    if kind == "UNet":
        return "EDM2", {"size": size["model_channels"], **config}
    return "EDM", {"architecture": architecture, "width": size["model_channels"], **config}


def _architecture(kind: str, special: dict[str, Any]) -> str:
    """Which of the known networks has these settings; those not given have the published defaults."""
    candidates = {"SongUNet": ("ddpmpp", "ncsnpp"), "DhariwalUNet": ("adm",), "UNet": ("edm2",)}[kind]
    settings = {**FIXED[candidates[0]], **special}
    for name in candidates:
        if settings == FIXED[name]:
            return name
    known = "; ".join(f"{name}: {FIXED[name]}" for name in candidates)
    raise ValueError(f"{kind} with {special}: not a network that is known ({known}).")


def _rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of our model, and the names of tensors that it has no use for. Raises ValueError for an unknown name."""
    state, unread = {}, []
    for key, value in tensors.items():
        if key == "map_augment.weight" or key.endswith(".resample_filter"):
            unread.append(key)
        else:
            state[own_key(key, config["sample_size"], len(config["multipliers"]))] = value
    return state, unread


def own_key(key: str, sample_size: int, levels: int) -> str:
    """Our name of a published tensor. Raises ValueError if there is none."""
    if key == "out_gain":
        return key
    for pattern, replacement in KEYS:
        if match := re.match(pattern, key):
            name = match.expand(replacement)
            rest = key[match.end() :].split(".")
            if "blocks" in name or "entry" in name or "down" in name:
                rest[0] = BLOCK_KEYS.get(rest[0], rest[0])
            return re.sub(r"<(-?)(\d+)>", lambda m: _level(m, sample_size, levels), name + ".".join(rest))
    raise ValueError(f"tensor {key!r}: no such part of an EDM or EDM2 network is known.")


def _level(match: re.Match, sample_size: int, levels: int) -> str:
    level = (sample_size // int(match[2])).bit_length() - 1
    return str(levels - 1 - level if match[1] else level)
