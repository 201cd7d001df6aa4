"""Floating point operations, counted as they are executed, without changing what they compute."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class OperationCounter(TorchDispatchMode):
    """Counts within its block the operations of matrix products, convolutions and attentions, those of backward passes too.

    By torch's formulas, in which a product and its sum are two operations. Torch's own ``FlopCounterMode`` takes composite
    operations apart to count them, which rounds otherwise: a step that is counted would not have the bits of one that is not.

    Attributes:
        total: operations so far.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Executes the operation, and adds what it takes."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
