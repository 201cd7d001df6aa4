"""What every network has in common: one call, what it accepts, extra scalar inputs; and what those of diffusers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill import hub
from distill.adapters import SECOND_TIME, Adapter, AttachedAdapter, ScalarInput, SecondTime, remove_hooks, remove_lora, required
from distill.networks.bottleneck import Bottleneck, Layer
from distill.types import Cond, Sample, Time

SCALAR_ORIGINS = {"guidance": 1.0}
"""The value of each extra scalar input that is embedded as 0."""


class Network(nn.Module, ABC):
    """A raw network behind one call, ``network(x, time, cond, r) -> F``.

    Attributes:
        shape: of a sample ``(c, h, w)``; None where any size will do.
        native_shape: of the samples that it was made for.
        num_classes: classes of ``cond["labels"]``; the null class is the one after them. None for no labels.
        widths: the conditions that it must be given, with the size of their last dimension.
        scalars: extra scalar inputs by name, see `add_scalar_input`.
        own_scalars: scalar inputs that the network has by itself, such as Flux' embedded ``guidance``.
        null_class: whether the class after ``num_classes`` exists; without it ``labels`` cannot be guided.
    """

    shape: tuple[int | None, ...]
    native_shape: tuple[int, ...]
    num_classes: int | None = None
    widths: dict[str, int]
    scalars: nn.ModuleDict
    own_scalars: tuple[str, ...] = ()
    null_class: bool = True

    @abstractmethod
    def forward(self, x: Sample, time: Time, cond: Cond, r: Time | None = None) -> Sample:
        """Raw prediction ``(b, c, h, w)`` at network times ``(b,)``; ``r`` is the second time of networks that have one.

        Raises:
            ValueError: a second time for a network without one or none for one with; no value for a scalar input. Names it.
            KeyError: a condition that the network reads is not in ``cond``.
        """

    @abstractmethod
    def time_embedding(self) -> tuple[nn.Module, int]:
        """The MLP that embeds times, and the size of its input: where scalar inputs are added."""

    def bottleneck(self, layer: Layer = "middle") -> Bottleneck:
        """Where inner features are read: `distill.features` does.

        Raises:
            ValueError: a network that has no such layer, or does not say where it is.
        """
        raise ValueError(f"{type(self).__name__} does not say where its inner features are read: it needs a `bottleneck`.")

    def units(self) -> list[nn.Module]:
        """The blocks that are sharded one by one, from the outside in if one holds another; [] for none.

        No parameter of a block may be read outside of its own call, and a call may change none of its arguments.
        """
        return []

    def add_scalar_input(self, name: str) -> None:
        """The network now also reads ``cond[name]`` ``(b,)``, at first without effect; see `ScalarInput`.

        Nothing changes if it reads one of that name already, its own or one that was added.
        """
        if name in self.scalars or name in self.own_scalars:
            return
        embedding, width = self.time_embedding()
        if name == SECOND_TIME:
            scalar: ScalarInput = SecondTime(embedding, width)
        else:
            scalar = ScalarInput(embedding, width, SCALAR_ORIGINS.get(name, 0.0))
        # Its weights stay in float32, whatever the model's are: they start at zero and are to be trained.
        self.scalars[name] = scalar.to(next(embedding.parameters()).device)

    def read_scalars(self, cond: Cond) -> None:
        """Hands each scalar input its value. Raises ValueError for one that is not in ``cond``."""
        for name, scalar in self.scalars.items():
            if name != SECOND_TIME:
                scalar.value = required(cond, name)

    @property
    def second_time(self) -> bool:
        """Whether it was given a second time input, without which no call of it is complete."""
        return SECOND_TIME in self.scalars

    def add_second_time(self, low: float, high: float, stride: bool = False) -> None:
        """The network now also reads ``r``, at first without effect; see `SecondTime`.

        Args:
            low, high: network times at the ends of the schedule, ``low < high``.
            stride: whether the difference of both times is embedded instead of the second.

        Raises:
            ValueError: it has a second time that is embedded otherwise.
        """
        had = self.second_time
        self.add_scalar_input(SECOND_TIME)
        scalar: Any = self.scalars[SECOND_TIME]
        before = scalar.combination.clone()
        scalar.describe(low, high, stride)
        if had and not torch.equal(before, scalar.combination):
            asked = scalar.combination.tolist()
            scalar.combination.copy_(before)
            raise ValueError(
                f"stride={stride}: the network was trained on a second time that is embedded otherwise, as {before.tolist()} "
                f"times (t, r, 1) instead of {asked}; give what it was trained with, or a new network."
            )

    def read_second_time(self, time: Time, r: Time | None) -> None:
        """Hands the second time input its value. Raises ValueError if there is only one of the two."""
        if self.second_time and r is not None:
            scalar: Any = self.scalars[SECOND_TIME]
            scalar.read(time, r)
        elif self.second_time or r is not None:
            found = "a second time input, and was called without one" if self.second_time else "no second time input"
            raise ValueError(f"{getattr(self, 'model_class', type(self).__name__)} has {found}.")


def inner_models(module: nn.Module) -> list[nn.Module]:
    """The models inside the wrappers of a module: what is compiled, so that the names of their weights stay as they are."""
    models = [getattr(part, "model", None) for part in module.modules() if isinstance(part, Network)]
    return [model for model in models if isinstance(model, nn.Module)]


def put_channels_last(module: nn.Module) -> None:
    """Keeps the convolutions' weights of a module's U-Nets with their channels last in memory; what they compute follows.

    Dropout draws its masks in the order of memory: in training they are others.
    """
    for unet in unets(module):
        unet.to(memory_format=torch.channels_last)


def unets(module: nn.Module) -> list[Any]:
    """The U-Nets of diffusers inside the wrappers of a module."""
    networks = [part for part in module.modules() if isinstance(part, DiffusersNetwork)]
    return [network.model for network in networks if network.component == "unet"]


class DiffusersNetwork(Network):
    """A model of diffusers.

    Args:
        config: the keywords of the model's class, for a new model with random weights; `of` wraps one that exists.

    Attributes:
        model_class: name of its class in diffusers.
        component: its folder in a pipeline's folder, ``unet`` or ``transformer``.
        model: the model itself.
        adapters: what was attached to the model, by the name of its kind; see `add_adapter`.
        guidance_targets: ends of the paths of the attentions that guidance adapters stand beside if they are told no others.
    """

    model_class: ClassVar[str]
    component: ClassVar[str]
    model: Any
    adapters: nn.ModuleDict
    guidance_targets: tuple[str, ...] = ("attn1", "attn")

    def __init__(self, config: dict[str, Any]):
        import diffusers

        model_class = getattr(diffusers, self.model_class)
        try:
            with hub.built_on():
                model = model_class(**config)
        except TypeError as error:
            raise ValueError(f"config={config}: {self.model_class} does not take it ({error}).") from error
        nn.Module.__init__(self)
        self._wrap(model)

    @classmethod
    def of(cls, model: Any) -> Any:
        """Wraps a model of ``model_class``, weights and all."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._wrap(model)
        return self

    def _wrap(self, model: Any) -> None:
        self.model = model
        self.scalars, self.adapters = nn.ModuleDict(), nn.ModuleDict()
        self.widths = {}
        inputs, outputs = model.config.in_channels, model.config.out_channels
        if outputs not in (None, inputs, 2 * inputs):
            raise ValueError(
                f"{self.model_class} with in_channels={inputs} and out_channels={outputs}: known are as many outputs as "
                "inputs, or twice as many with a learned variance; networks that read an image beside their sample are not."
            )
        self.read_config(model.config)

    @abstractmethod
    def read_config(self, config: Any) -> None:
        """Sets ``shape``, ``native_shape``, ``num_classes`` and ``widths`` from the model's config.

        Raises:
            ValueError: a variant of the family that this wrapper does not know, naming the key.
        """

    def refuse_unknown(self, config: Any, known: dict[str, Any]) -> None:
        """Raises ValueError, naming the key, if ``config`` differs from ``known``, the values that this wrapper can call."""
        for key, value in known.items():
            if (own := config.get(key)) != value:
                raise ValueError(f"{self.model_class} with {key}={own!r} is not known here; known is {key}={value!r}.")

    def sample_size(self, config: Any) -> tuple[int, int]:
        """Height and width that the model was made for. Raises ValueError if its config does not say."""
        if config.sample_size is None:
            raise ValueError(f"{self.model_class} with sample_size=None: write the height of its samples into its config.json.")
        size = config.sample_size
        return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)

    def check_size(self, x: Sample, multiple: int) -> None:
        """Raises ValueError if height or width of ``x`` ``(b, c, h, w)`` cannot be cut into patches of this size."""
        if x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise ValueError(f"samples of {x.shape[-2]}x{x.shape[-1]}: {self.model_class} takes multiples of {multiple}.")

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the model computes: that of its weights (of the base's, under LoRA)."""
        return self.model.dtype

    def cast(self, value: Tensor) -> Tensor:
        """``value`` in the model's precision, if it is floating."""
        return value.to(self.dtype) if value.is_floating_point() else value

    def forward(self, x: Sample, time: Time, cond: Cond, r: Time | None = None) -> Sample:
        self.read_second_time(time, r)
        self.read_scalars(cond)
        for adapter in self.attached():
            adapter.read(x, time, cond)
        # A learned variance comes after the prediction, in channels of its own (Nichol & Dhariwal 2102.09672). The layout of
        # `put_channels_last` stays inside: noise that is drawn like a sample is drawn in the sample's order of memory.
        return self.predict(self.cast(x), time, cond)[:, : x.shape[1]].contiguous()

    def class_embedding(self) -> tuple[nn.Module, int] | None:
        """The module that embeds ``labels``, and the size of its output; None for a model without classes."""
        return None

    def units(self) -> list[nn.Module]:
        """The blocks that diffusers itself keeps together on a device; in a model that names none, the levels of its lists."""
        names = self.model._no_split_modules
        if names:
            return [part for part in self.model.modules() if type(part).__name__ in names]
        return [block for blocks in self.model.children() if isinstance(blocks, nn.ModuleList) for block in blocks]

    def attached(self) -> list[AttachedAdapter]:
        """The adapters."""
        return [adapter for adapter in self.adapters.values() if isinstance(adapter, AttachedAdapter)]

    def add_adapter(self, settings: Adapter) -> AttachedAdapter:
        """Attaches an adapter, at first without effect, and returns it.

        Raises:
            ValueError: there is one of its kind already, or the model has no such modules (see `Adapter.build`).
        """
        if settings.name in self.adapters:
            raise ValueError(f"adapter={settings}: the network has one of this kind already; detach it first.")
        adapter = settings.build(self)
        self.adapters[settings.name] = adapter.to(next(self.model.parameters()).device)
        return adapter

    def detach_adapters(self) -> None:
        """Leaves the model alone: removes adapters, extra scalar inputs and LoRA layers, with every hook.

        The model's own weights are the tensors that they were, under the names that they had; LoRA layers are not merged.
        """
        for part in (*self.adapters.values(), *self.scalars.values()):
            remove_hooks(self.model, part)
        self.adapters, self.scalars = nn.ModuleDict(), nn.ModuleDict()
        if getattr(self.model, "peft_config", None):
            remove_lora(self.model)

    @abstractmethod
    def predict(self, x: Sample, time: Time, cond: Cond) -> Tensor:
        """The model's output for ``x`` in its own precision and ``cond`` in any: ``(b, c or 2 c, h, w)``."""
