"""Every test runs with the annotations of `distill` checked at each call, on one thread and from the same random state."""

from __future__ import annotations

import pytest
from jaxtyping import install_import_hook

install_import_hook("distill", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def random_state() -> None:
    """The same draws whatever ran before."""
    torch.manual_seed(0)
