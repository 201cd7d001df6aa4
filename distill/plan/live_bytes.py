"""How many bytes the tensors that a computation makes hold, at every moment: of real ones, and of ones without memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Within it, every storage that an operator makes counts from then until it is freed; each once, whatever views it has.

    What an allocator adds (rounding, fragments, workspaces of kernels) is not in it.

    Args:
        known: tensors that were there before and do not count.

    Attributes:
        now: bytes that live.
        gradients: how many of these the caller knows to be gradients.
        phase: a name that the caller sets.
        peaks: the most bytes that lived in each phase.
        others: the most bytes besides gradients.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now, self.gradients, self.phase = 0, 0, ""
        self.peaks: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._count(result)
        elif isinstance(result, list | tuple):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._freed, size).atexit = False
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        self.others[self.phase] = max(self.others[self.phase], self.now - self.gradients)

    def _freed(self, size: int) -> None:
        self.now -= size
