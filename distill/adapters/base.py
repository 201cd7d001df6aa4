"""Adapters: small trained parts beside a network whose own weights stay as they are, attached to its modules by hooks.

`Adapter` is the settings, what a config writes and a file keeps; `AttachedAdapter` is the module that is made of them for one
network. A network holds its adapters itself (`distill.networks.base.DiffusersNetwork.add_adapter`) and hands them what every
call is about before its model runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from distill.types import Cond, Sample, Time


@dataclass
class Adapter(ABC):
    """Settings of an adapter: numbers, words and lists of them, so that JSON can hold them.

    Attributes:
        name: under which a network keeps it; one of a name for a network.
    """

    name: ClassVar[str]

    @abstractmethod
    def build(self, network: Any) -> AttachedAdapter:
        """The adapter of these settings for ``network``, a `DiffusersNetwork`, hooked to its modules and without effect yet.

        Its weights are in float32, whatever the model's are. It is the caller's to keep: `DiffusersNetwork.add_adapter` does.

        Raises:
            ValueError: a module that the settings name is not there, or the network has nothing that such an adapter reads.
        """

    def as_dict(self) -> dict[str, Any]:
        """The settings and the name of their class, ``{"class": ..., ...}``: `adapter_of` reads them."""
        return {"class": type(self).__name__, **asdict(self)}


def adapter_of(settings: dict[str, Any]) -> Adapter:
    """Settings from what `Adapter.as_dict` gave.

    Raises:
        ValueError: a class that is not known, or keys that are not its own.
    """
    known = {kind.__name__: kind for kind in Adapter.__subclasses__()}
    kind = known.get(settings.get("class", ""))
    if kind is None:
        raise ValueError(f"adapter class={settings.get('class')!r} is not known here; known are {', '.join(sorted(known))}.")
    try:
        return kind(**{key: value for key, value in settings.items() if key != "class"})
    except TypeError as error:
        raise ValueError(f"adapter {settings}: {kind.__name__} does not take it ({error}).") from error


class Values(dict[str, Tensor]):
    """What an adapter was told for the present call. A copy is empty: what was computed with a graph cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Values:
        return type(self)()


class AttachedAdapter(nn.Module, ABC):
    """The trained part of an adapter. Its hooks are its own methods, registered on the model's modules.

    A deep copy of the network copies hooks and adapter together: Python copies a bound method with the object that it is
    bound to, so the copy's modules call the copy's adapter. A closure would call the first one's.

    Between `read` and the end of the backward pass the adapter holds the values of one call. Under gradient checkpointing the
    backward pass computes blocks again, with the values of the *last* call: call the network once for each backward pass, or
    all rows in one batch.

    Args:
        settings: what it was built of.

    Attributes:
        scalar_inputs: scalar conditions that it reads, ``("guidance",)``: they appear in a denoiser's ``scalar_inputs``.
        call: values of the present call by name; `read` puts them there.
    """

    scalar_inputs: tuple[str, ...] = ()

    def __init__(self, settings: Adapter):
        super().__init__()
        self.settings, self.call = settings, Values()

    @abstractmethod
    def read(self, x: Sample, time: Time, cond: Cond) -> None:
        """Takes what the hooks will need of the call ``network(x, time, cond)``: runs before the model.

        Args:
            x: the model's input ``(b, c, h, w)``, in the precision in which it came.
            time: network times ``(b,)``.
            cond: conditions by name.

        Raises:
            ValueError: a condition that the adapter cannot do without is missing.
        """

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Calls ``hook(module, args, kwargs, output)`` after a module; what it returns is the module's output.

        Args:
            module: of the network's model.
            hook: a method of this adapter, or of a part of it that is registered already.

        Raises:
            TypeError: ``hook`` is not such a method.
        """
        self._check(hook)
        module.register_forward_hook(hook, with_kwargs=True)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Calls ``hook(module, args, kwargs)`` before a module; it returns both anew, or None. Otherwise as `after`."""
        self._check(hook)
        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _check(self, hook: Callable[..., Any]) -> None:
        if not any(getattr(hook, "__self__", None) is part for part in self.modules()):
            raise TypeError(f"{hook!r} is not a method of this {type(self).__name__}: copies of the network would share it.")


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "hidden_states") -> Tensor:
    """The input of a hooked module, whether it was given by place or by name."""
    return args[0] if args else kwargs[name]


def ends_with(name: str, end: str) -> bool:
    """Whether the path of a module is ``end`` or ends with it, whole names only: ``attn1`` ends ``blocks.0.attn1``."""
    return name == end or name.endswith("." + end)


def key_of(path: str) -> str:
    """A path as a key of `torch.nn.ModuleDict`, which holds no dots."""
    return path.replace(".", "-")


def missing_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Those of ``targets``, ends of paths, that no module of ``model`` has."""
    names = [name for name, _ in model.named_modules()]
    return [target for target in targets if not any(ends_with(name, target) for name in names)]


def find_modules(network: Any, targets: Sequence[str] | None, usual: Sequence[str], key: str) -> dict[str, nn.Module]:
    """Modules of a network's model by their paths, in the model's order.

    Args:
        network: a `DiffusersNetwork`.
        targets: ends of paths, as LoRA's: ``attn1``, ``transformer_blocks.3.attn1``; None for ``usual``.
        usual: the family's own; those that this model does not have are left out.
        key: of the setting, for the messages.

    Raises:
        ValueError: a target that was asked for by name and is not there, or none of ``usual`` is.
    """
    model: nn.Module = network.model
    if targets is not None and (missing := missing_targets(model, targets)):
        raise ValueError(f"{key}={missing}: no module of {network.model_class} has a path that ends so.")
    ends = usual if targets is None else targets
    found = {name: module for name, module in model.named_modules() if any(ends_with(name, end) for end in ends)}
    if not found:
        raise ValueError(f"{key}={targets}: {network.model_class} has none of {list(ends)}; name the modules to attach to.")
    return found


def required(cond: Cond, name: str) -> Tensor:
    """``cond[name]`` for a network that cannot do without. Raises ValueError if it is missing."""
    if name not in cond:
        raise ValueError(f"cond[{name!r}] is missing: this network was trained with {name} as an input; pass a value.")
    return cond[name]
