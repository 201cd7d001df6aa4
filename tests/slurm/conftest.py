"""The two-node cluster, started once for a session; without SLURM's programs its tests are skipped, and say what to install."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, whose jobs find this interpreter as ``python``."""
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # not pytest's: paths of sockets are short
    try:
        with Cluster(folder) as started:
            started.environment["PATH"] = f"{Path(sys.executable).parent}:{started.environment['PATH']}"
            started.environment["OMP_NUM_THREADS"] = "1"
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)
