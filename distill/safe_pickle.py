"""Reads NVIDIA's network pickles as data: tensors, numbers and the arguments they were made with. Nothing in them is executed.

Such a file holds "persistent" objects (torch_utils/persistence.py of NVlabs/edm): each is the source code of its module, which
their reader executes, the name of its class and its state. Here the source code is dropped. Every name that a pickle may ask
for is in a table; each stands for a small function or an inert class of this file (`OrderedDict` and `set` for themselves).
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor
from torch.storage import TypedStorage

MODULES = "torch.nn.modules."


class Held:
    """A tensor, a storage or a function, out of the pickle's reach: on these themselves it could set attributes."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("it sets the state of a tensor or a function")


class PickledObject:
    """An object of a pickle: the name of its class and its attributes.

    Attributes:
        class_name: without the module's.
        state: its ``__dict__``.
    """

    class_name = ""

    def __init__(self, class_name: str | None = None, state: dict[str, Any] | None = None):
        self.class_name = class_name or self.class_name
        self.state = state or {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords of the constructor. Raises ValueError if they were not recorded."""
        if self.state.get("_init_args") not in ((), []) or not isinstance(self.state.get("_init_kwargs"), dict):
            raise ValueError(f"{self.class_name} was pickled without the keywords that it was made with.")
        return dict(self.state["_init_kwargs"])

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers of a module and its parts, named as in ``state_dict``."""
        found = {}
        for kind in ("_parameters", "_buffers"):
            for name, value in self.state.get(kind, {}).items():
                if isinstance(value, Held) and name not in self.state.get("_non_persistent_buffers_set", ()):
                    found[prefix + name] = value.value
        for name, part in self.state.get("_modules", {}).items():
            if isinstance(part, PickledObject):
                found |= part.tensors(f"{prefix}{name}.")
        return found


class EasyDict(dict):
    """Stands for ``dnnlib.util.EasyDict``, a dict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Nothing: its items are all that counts."""


class _Type(PickledObject):
    """Stands for ``numpy.dtype``: remembers what numbers it describes."""

    def __init__(self, code: str = "", *flags: Any):
        self.code, self.state = code, {}

    def __setstate__(self, state: Any) -> None:
        """Nothing: the byte order is this machine's, or the number is refused."""
        if state[1] not in ("<", "|"):
            raise pickle.UnpicklingError(f"numbers of byte order {state[1]!r}")


class _Function(Held):
    """A function that a pickle may call."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        return self.value(*arguments)


def _persistent(meta: dict[str, Any]) -> PickledObject:
    if meta["type"] != "class":
        raise pickle.UnpicklingError(f"a persistent object of type {meta['type']!r}")
    return PickledObject(str(meta["class_name"]), meta["state"] if isinstance(meta["state"], dict) else {})


def _storage(content: bytes) -> Held:
    # A pickle within the pickle: torch's own reader of tensors, which refuses any other name in it.
    storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(storage, TypedStorage):
        raise pickle.UnpicklingError(f"a {type(storage).__name__} where a tensor's storage should be")
    return Held(torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage))  # untyped() warns


def _tensor(storage: Held, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Held:
    # as_strided refuses what lies beyond the storage, where set_ would enlarge it.
    return Held(storage.value.as_strided(size, stride, offset))


def _parameter(value: Held, *rest: Any) -> Held:
    return value


def _number(kind: _Type, content: bytes) -> float | int | bool:
    if re.fullmatch("[fiub][1248]", kind.code) is None:
        raise pickle.UnpicklingError(f"numbers of type {kind.code!r}")
    return numpy.frombuffer(content, dtype=kind.code, count=1)[0].item()


def _array(*arguments: Any) -> PickledObject:
    return PickledObject("ndarray")


NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_persistent),
    ("dnnlib.util", "EasyDict"): EasyDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch.storage", "_load_from_bytes"): _Function(_storage),
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): PickledObject,
} | {
    (f"numpy.{core}.multiarray", name): _Function(function)
    for core in ("core", "_core")
    for name, function in (("scalar", _number), ("_reconstruct", _array))
}


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names in `NAMES` and, as inert objects, the classes of ``torch.nn.modules``."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAMES:
            return NAMES[module, name]
        if module.startswith(MODULES) and name.isidentifier():
            return type(name, (PickledObject,), {"class_name": name})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no network needs")


def read_pickle(path: str | Path) -> Any:
    """What a network pickle holds: dicts, lists, numbers, strings, and `PickledObject` for all else.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file asks for anything else, which is named and was not executed; or it is no pickle.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: there is no such file; give a network pickle of NVlabs/edm or edm2.")
    try:
        with Path(path).open("rb") as stream:
            return _Reader(stream).load()
    except Exception as error:  # a broken or forged pickle may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"path={str(path)!r}: refused, and nothing in it was executed: {reason}. Give a network pickle of NVlabs/edm or "
            "NVlabs/edm2, downloaded again if need be."
        ) from error
