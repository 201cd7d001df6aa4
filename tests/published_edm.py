"""Published EDM and EDM2 networks made here: their names of settings and tensors, and pickles in their format.

The pickles come about as those of NVlabs/edm do (torch_utils/persistence.py): a persistent object reduces to a call of
``torch_utils.persistence._reconstruct_persistent_obj`` with the source code of its module, its class and its state. The modules
of that name exist while a pickle is written, and not when it is read.
"""

from __future__ import annotations

import pickle
import sys
import types
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn

SONG = {"model_type": "SongUNet", "augment_dim": 9, "dropout": 0.13}
SMALL = {"img_resolution": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NCSNPP = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
CASES: dict[str, dict[str, Any]] = {
    "ddpmpp": {**SONG, **SMALL, "label_dim": 3, "model_channels": 16},
    "ncsnpp": {**SONG, **SMALL, **NCSNPP, "label_dim": 0, "model_channels": 16},
    "adm": {"model_type": "DhariwalUNet", **SMALL, "label_dim": 3, "model_channels": 64},
    "edm2": {**SMALL, "label_dim": 3, "model_channels": 16, "channels_per_head": 16},
}
Shapes = dict[str, tuple[int, ...]]


# ------------------------------------------------------------------------------------------------- the tensors of each


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """A layer of ``weight`` and ``bias``."""
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def edm_block(name: str, wide: int, out: int, embed: int, song: bool, attended: bool = False, taps: int = 0) -> Shapes:
    """A UNetBlock of NVlabs/edm; ``taps`` is the length of its resampling filter, if it has one."""
    shapes = {**layer(f"{name}.norm0", wide), **layer(f"{name}.conv0", out, wide, 3, 3)}
    shapes |= {**layer(f"{name}.affine", out * (1 if song else 2), embed), **layer(f"{name}.norm1", out)}
    shapes |= layer(f"{name}.conv1", out, out, 3, 3)
    if wide != out or (taps and song):
        shapes |= layer(f"{name}.skip", out, wide, 1, 1)
    if taps:
        shapes |= {f"{name}.{part}.resample_filter": (1, 1, taps, taps) for part in ("conv0", "skip")}
    if attended:
        shapes |= {**layer(f"{name}.norm2", out), **layer(f"{name}.qkv", 3 * out, out, 1, 1)}
        shapes |= layer(f"{name}.proj", out, out, 1, 1)
    return shapes


def edm_shapes(case: str) -> Shapes:
    """Names and shapes of the network's tensors in a case of EDM's: levels 8x8 and 4x4, one block each, two on the way up."""
    song, width, taps = case != "adm", CASES[case]["model_channels"], 4 if case == "ncsnpp" else 2
    embed, time = 4 * width, width * (2 if case == "ncsnpp" else 1)
    shapes = {**layer("map_layer0", embed, time), **layer("map_layer1", embed, embed)}
    if case == "ncsnpp":
        shapes |= {"map_noise.freqs": (width,), **layer("enc.4x4_aux_residual", width, 3, 3, 3)}
        shapes |= {"enc.4x4_aux_residual.resample_filter": (1, 1, 4, 4)}
    if song:
        shapes |= layer("map_augment", time, 9, bias=False)
    if CASES[case]["label_dim"]:
        shapes |= layer("map_label", time if song else embed, 3, bias=song)

    def block(name: str, wide: int, out: int, attended: bool = False, resampled: bool = False) -> Shapes:
        return edm_block(name, wide, out, embed, song, attended, taps if resampled else 0)

    shapes |= layer("enc.8x8_conv", width, 3, 3, 3)
    shapes |= block("enc.8x8_block0", width, width)
    shapes |= block("enc.4x4_down", width, width, resampled=True)
    shapes |= block("enc.4x4_block0", width, 2 * width, attended=True)
    shapes |= block("dec.4x4_in0", 2 * width, 2 * width, attended=True)
    shapes |= block("dec.4x4_in1", 2 * width, 2 * width)
    shapes |= block("dec.4x4_block0", 4 * width, 2 * width, attended=not song)
    shapes |= block("dec.4x4_block1", 3 * width, 2 * width, attended=True)
    shapes |= block("dec.8x8_up", 2 * width, 2 * width, resampled=True)
    shapes |= block("dec.8x8_block0", 3 * width, width)
    shapes |= block("dec.8x8_block1", 2 * width, width)
    end = "dec.8x8_aux" if song else "out"
    return shapes | {**layer(f"{end}_norm", width), **layer(f"{end}_conv", 3, width, 3, 3)}


def edm2_block(name: str, wide: int, out: int, embed: int, attended: bool = False) -> Shapes:
    """A Block of NVlabs/edm2."""
    encoder = name.startswith("enc")
    shapes: Shapes = {f"{name}.emb_gain": (), f"{name}.conv_res0.weight": (out, out if encoder else wide, 3, 3)}
    shapes |= {f"{name}.emb_linear.weight": (out, embed), f"{name}.conv_res1.weight": (out, out, 3, 3)}
    shapes |= {f"{name}.conv_skip.weight": (out, wide, 1, 1)} if wide != out else {}
    if attended:
        shapes |= {f"{name}.attn_qkv.weight": (3 * out, out, 1, 1), f"{name}.attn_proj.weight": (out, out, 1, 1)}
    return shapes


def edm2_shapes() -> Shapes:
    """Names and shapes of the network's tensors in the case of EDM2's, likewise."""
    width, embed = 16, 32
    shapes: Shapes = {"out_gain": (), "emb_fourier.freqs": (width,), "emb_fourier.phases": (width,)}
    shapes |= {"emb_noise.weight": (embed, width), "emb_label.weight": (embed, 3), "enc.8x8_conv.weight": (width, 4, 3, 3)}
    shapes |= edm2_block("enc.8x8_block0", width, width, embed)
    shapes |= edm2_block("enc.4x4_down", width, width, embed)
    shapes |= edm2_block("enc.4x4_block0", width, 2 * width, embed, attended=True)
    shapes |= edm2_block("dec.4x4_in0", 2 * width, 2 * width, embed, attended=True)
    shapes |= edm2_block("dec.4x4_in1", 2 * width, 2 * width, embed)
    shapes |= edm2_block("dec.4x4_block0", 4 * width, 2 * width, embed, attended=True)
    shapes |= edm2_block("dec.4x4_block1", 3 * width, 2 * width, embed, attended=True)
    shapes |= edm2_block("dec.8x8_up", 2 * width, 2 * width, embed)
    shapes |= edm2_block("dec.8x8_block0", 3 * width, width, embed)
    shapes |= edm2_block("dec.8x8_block1", 2 * width, width, embed)
    return shapes | {"out_conv.weight": (3, width, 3, 3)}


def shapes_of(case: str) -> Shapes:
    return edm2_shapes() if case == "edm2" else edm_shapes(case)


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """Weights of about unit gain that anyone can make again: sines of a phase that the name gives."""
    count = max(int(numpy.prod(shape)), 1)
    wave = numpy.sin(numpy.arange(count) * 1.7 + numpy.arange(count) ** 2 * 0.013 + zlib.crc32(key.encode()) % 1000)
    values = torch.from_numpy(wave).float().reshape(shape)
    if key.endswith("resample_filter"):
        line = torch.tensor([1.0, 3.0, 3.0, 1.0] if shape[-1] == 4 else [1.0, 1.0])
        return (torch.outer(line, line) / line.sum() ** 2)[None, None]
    if len(shape) > 1:
        return values * (2.0 / values[0].numel()) ** 0.5
    if "norm" in key and key.endswith("weight") or not shape:
        return 1 + 0.2 * values
    return 0.2 * values


def picture(case: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """An input, its times ``ln(sigma) / 4`` and its labels, of which 3 is none."""
    x = torch.from_numpy(numpy.cos(numpy.arange(2 * 3 * 64) * 0.73)).float().reshape(2, 3, 8, 8)
    return x, torch.tensor([-0.9, 0.6]), torch.tensor([1, 3]) if CASES[case]["label_dim"] else None


# ---------------------------------------------------------------------------------------------------------- the pickles


class EasyDict(dict):
    """What ``dnnlib.util.EasyDict`` is for a pickle."""


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a pickle was executed")


class Persistent:
    """A persistent object: its class is but a name, its source code whatever is given."""

    source = "raise SystemExit('the source code in a pickle was executed')"

    def __init__(self, class_name: str, state: dict[str, Any], source: str | None = None):
        self.class_name, self.persistent_state, self.source = class_name, state, source or self.source

    def __reduce__(self) -> tuple:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.persistent_state},), None


def module(class_name: str, tensors: dict[str, Tensor], arguments: dict[str, Any] | None = None, **others: Any) -> Any:
    """A persistent module, with parts, of tensors by name; the inner ``enc`` and ``dec`` are plain ``ModuleDict``s."""
    own = {key: value for key, value in tensors.items() if "." not in key}
    buffers = {key: value for key, value in own.items() if key in ("freqs", "phases", "resample_filter")}
    parts: OrderedDict[str, Any] = OrderedDict()
    for part in OrderedDict.fromkeys(key.split(".")[0] for key in tensors if "." in key):
        inner = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        parts[part] = _plain(inner) if part in ("enc", "dec") else module("Part", inner)
    state = {
        "training": False,
        "_parameters": OrderedDict((key, nn.Parameter(value)) for key, value in own.items() if key not in buffers),
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": OrderedDict(parts),
        "skip_scale": numpy.sqrt(0.5),
        "_init_args": (),
        "_init_kwargs": arguments or {},
    }
    state["_modules"].update(others)
    return Persistent(class_name, state)


def _plain(tensors: dict[str, Tensor]) -> nn.ModuleDict:
    plain = nn.ModuleDict()
    for part in OrderedDict.fromkeys(key.split(".")[0] for key in tensors):
        inner = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        plain._modules[part] = module("Block", inner)  # type: ignore[assignment]
    return plain


def network(
    case: str,
    tensors: dict[str, Tensor] | None = None,
    precondition: str | None = None,
    outer: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A published network of a case; ``tensors`` and ``settings`` instead of, or beside, its own.

    ``outer`` are settings, and, where they are tensors, buffers, of the preconditioning around it.
    """
    outer = outer or {}
    extra = {key: value for key, value in outer.items() if isinstance(value, Tensor)}
    told = {key: value for key, value in outer.items() if key not in extra}
    tensors = {key: fill(key, shape) for key, shape in shapes_of(case).items()} if tensors is None else tensors
    given = {**CASES[case], **settings}
    if case == "edm2":
        inner = module("UNet", tensors, {"img_channels": 3, **given})
        logvar = {"freqs": torch.ones(4), "phases": torch.ones(4)}
        return module(
            precondition or "Precond",
            extra,
            {"img_channels": 3, "use_fp16": True, **given, **told},
            unet=inner,
            logvar_fourier=module("MPFourier", logvar),
            logvar_linear=module("MPConv", {"weight": torch.ones(1, 4)}),
        )
    kind = given.pop("model_type")
    inner = module(kind, tensors, {"in_channels": 3, "out_channels": 3, **given})
    return module(precondition or "EDMPrecond", extra, {"img_channels": 3, **given, "model_type": kind, **told}, model=inner)


def write_pickle(path: Path, content: Any) -> Path:
    """Pickles as NVIDIA's training scripts do."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    setattr(persistence, "_reconstruct_persistent_obj", _reconstruct_persistent_obj)  # noqa: B010
    setattr(util, "EasyDict", EasyDict)  # noqa: B010
    modules = {"torch_utils.persistence": persistence, "dnnlib.util": util}
    modules |= {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    names = ((_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util"))
    with mock.patch.dict(sys.modules, modules):
        with mock.patch.object(names[0][0], "__module__", names[0][1]), mock.patch.object(EasyDict, "__module__", names[1][1]):
            path.write_bytes(pickle.dumps(content))
    return path


def write_network(path: Path, case: str, **settings: Any) -> Path:
    """The pickle of a published network of a case, with what else such a file holds."""
    data = {"ema": network(case, **settings), "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2})}
    data["dataset_kwargs"] = EasyDict(class_name="training.dataset.ImageFolderDataset", path="x.zip")
    return write_pickle(path, EasyDict(data) if case == "edm2" else data)
