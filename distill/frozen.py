"""Networks that are not trained: kept apart from their owner, and copied into ones that are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network that is never trained and never saved.

    It is always in evaluation mode, is not seen by ``parameters()``, ``state_dict()``, DDP or ``deepcopy`` (copies share it),
    and still moves to a device and a precision with its owner. A network whose denoiser asks for a ``frozen_dtype`` (a teacher
    in bfloat16) is cast to it here: copies that were made before, to be trained, keep float32.
    """

    module: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        # Past nn.Module's own __setattr__, which would register it.
        object.__setattr__(self, "module", module.eval().requires_grad_(False))
        if (dtype := getattr(module, "frozen_dtype", None)) is not None:
            module.to(dtype)
            self.module.own_precision = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.module._apply(fn)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return Frozen(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def still_copy(module: Any) -> Any:
    """A copy of ``module`` as it is now, not trained, in evaluation mode; what is not trained is shared with it, not copied."""
    shared = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, shared).requires_grad_(False).eval()


def trainable_copy(module: Any) -> Any:
    """A copy of ``module`` with parameters of its own that are all trained: how a student starts from its teacher."""
    return copy.deepcopy(module).requires_grad_(True).train()
