"""A part of a pipeline (an autoencoder, a text tower) as a diffusers folder, when its training ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class ExportPart(Callback):
    """Writes ``RUN/export`` by the module's ``export(folder, data)``; the folder is complete or not there."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module without ``export``. Raises ValueError."""
        if not hasattr(pl_module, "export"):
            raise ValueError(f"ExportPart: {type(pl_module).__name__} is no part of a pipeline; use ExportDenoiser.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes on rank zero; also when a finished run is started again, which may have been cut before it."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        folder = Path(trainer.default_root_dir) / "export"
        partial = folder.with_name("export.partial")
        shutil.rmtree(partial, ignore_errors=True)
        module.export(partial, trainer.datamodule)  # type: ignore[attr-defined]
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
