"""What a run was: ``RUN/config.yaml`` (resolved; ``--config`` takes it) and ``RUN/environment.json`` (one entry a start)."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback

from distill.checkpoints import atomic_writer

PACKAGES = (
    "distill torch torchvision pytorch-lightning torchmetrics diffusers safetensors "
    "jsonargparse omegaconf numpy scipy scikit-learn"
).split()
NOT_OF_A_RUN = ("config", "ckpt_path", "weights_only")
"""Arguments of one start, not of the run: left out, so that ``validate`` takes the file as well as ``fit``."""


def git_revision(folder: Path) -> dict[str, Any]:
    """The commit of the working tree that ``folder`` is in and whether it has changes; None for both if there is no git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}


def environment() -> dict[str, Any]:
    """When, where and with what this process was started."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "git": git_revision(Path(__file__).parent),
        "versions": versions,
    }


def write_unless_same(path: Path, text: str) -> None:
    """Writes ``text``; another text that is there already is kept beside it as ``NAME_1.ext``, ``NAME_2.ext`` ..."""
    if path.is_file():
        if path.read_text() == text:
            return
        number = 1
        while (kept := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
            number += 1
        os.link(path, kept)
    with atomic_writer(path) as file:
        file.write(text.encode())


class RunRecord(SaveConfigCallback):
    """Writes both files when training starts, on rank zero. On resume, starts are added, and a config that differed is kept."""

    def __init__(self, parser: Any, config: Any, **kwargs: Any):
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only training makes a run; ``validate`` and ``test`` leave its record alone."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the record into ``trainer.default_root_dir``."""
        run = Path(trainer.default_root_dir)
        write_unless_same(run / "config.yaml", self.resolved_config())
        path = run / "environment.json"
        starts = json.loads(path.read_text()) if path.is_file() else []
        with atomic_writer(path) as file:
            file.write(json.dumps([*starts, environment()], indent=2).encode())

    def resolved_config(self) -> str:
        """The whole config as YAML, defaults included.

        Raises:
            ValueError: a default is an object that YAML cannot hold, so that the file would not give the run back.
        """
        config = self.config.clone()
        for key in NOT_OF_A_RUN:
            config.pop(key, None)
        text = self.parser.dump(config, skip_unset=False, skip_validation=True)
        if lost := re.search(r"(\w+): Unable to serialize instance <(\S+) ", text):
            raise ValueError(
                f"{lost[1]}: its default is a {lost[2]}, which config.yaml cannot hold; "
                f"state {lost[1]} in the config, or make the default None or a lazy_instance"
            )
        return text
