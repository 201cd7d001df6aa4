"""The averaged student as a diffusers folder, when training ends."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from distill.codecs import DiffusersCodec
from distill.denoiser import NetworkDenoiser, ScheduleView
from distill.edm_checkpoints import is_edm, save_edm
from distill.export.pipelines import pipeline_name, write_pipeline
from distill.export.schedulers import Scheduling
from distill.export.sources import find_sources
from distill.export.weights import reads_guidance
from distill.few_step import FewStepSampler
from distill.pretrained import check_exportable, save_denoiser, save_scalars
from distill.schedulers import make_scheduler


class ExportDenoiser(Callback):
    """Writes ``RUN/export``: the EMA student's network and scheduler, as diffusers and `PretrainedDenoiser` read them; with the
    parts of ``model.space`` a whole pipeline. EDM's networks are written as `PretrainedEDM` reads them.

    For methods whose student is sampled as it is, or seen under another schedule: it is the teacher of a next stage. One that
    is wrapped otherwise needs more than a folder of weights. The folder is complete or not there: it is written beside its
    place and renamed.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before training, a student that could not be written.

        Raises:
            ValueError: naming what has no counterpart in diffusers.
        """
        method: Any = pl_module
        if not is_edm(method.student):
            check_exportable(method.student)
        generated = method.generator(method.student)
        if (generated.base if isinstance(generated, ScheduleView) else generated) is not method.student:
            raise ValueError(f"ExportDenoiser: {type(method).__name__} wraps its student; leave the callback out.")
        if isinstance(method.student_sampler, FewStepSampler):
            raise ValueError(
                "ExportDenoiser writes no trained times, and this student has some: leave it out, and run tools/export.py."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder on rank zero; also when a finished run is started again, which may have been cut before it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        method: Any = pl_module
        student = method.ema.whole(trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "export"
        partial = folder.with_name("export.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_teacher(student, method, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def write_teacher(denoiser: NetworkDenoiser, method: Any, folder: Path) -> None:
    """Writes the average of a method's student into a new folder, with the autoencoder and text encoder of its space."""
    if is_edm(denoiser):
        save_edm(denoiser, folder)
        return
    if not isinstance(method.space.codec, DiffusersCodec):
        save_denoiser(denoiser, folder)
        return
    folder.mkdir(parents=True)
    network: Any = denoiser.network
    plain = network
    if network.scalars and not reads_guidance(network):
        plain = copy.deepcopy(network)
        plain.detach_adapters()
        save_scalars(network, folder)
    write_pipeline(folder, pipeline_name(plain), plain, Scheduling(make_scheduler(denoiser)), find_sources(method))
