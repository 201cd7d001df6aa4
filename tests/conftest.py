"""Every test runs with the annotations of `distill` checked at each call, on one thread and from the same random state."""

from __future__ import annotations

import os

import pytest
from jaxtyping import install_import_hook

install_import_hook("distill", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def random_state() -> None:
    """The same draws whatever ran before; a run through the command line leaves its seed in the environment."""
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)
