"""Distance against steps: what each validation measured at each number of steps, as JSON, as a picture, and in TensorBoard."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torchmetrics import Metric

from distill.callbacks.sample_grid import log_image, save_sheet
from distill.checkpoints import atomic_writer
from distill.methods.sampled import SampledModule
from distill.types import Batch

FOLDER, NAME = "curves", "distance_against_steps"
NAMED = 5
"""Validations that the picture names; of more, the first and the last."""


class StepsCurve(Callback):
    """At each end of validation in training, adds the figures of ``evaluation.metrics`` to the run's curve.

    Writes ``RUN/curves/distance_against_steps.json``::

        {"metrics": {"frechet_pixels": {"higher_is_better": false, "protocol": "..."}},
         "validations": [{"step": 300, "values": {"frechet_pixels": {"1": 0.31, "2": 0.2, "4": 0.18}}}, ...],
         "teacher": {"steps": 32, "values": {"frechet_pixels": 0.1}}}

    and the picture of it beside. Validations lie in the order of their steps, each once: those of a later step than the present
    one, which a run that was killed has left, will be made again, and are dropped. A figure that is not finite is null.

    Args:
        teacher: whether the teacher is measured too, at ``evaluation.teacher_steps``, in the first validation of each start:
            as many samples as for one of ``evaluation.steps``, each of many evaluations.

    Raises:
        ValueError: when a run starts: ``teacher`` of a method that has none; a JSON file that cannot be read.
    """

    def __init__(self, teacher: bool = False):
        self.teacher = teacher
        self.record: dict[str, Any] = {}
        self.measuring: dict[str, Metric] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads what the run has measured before."""
        if stage != "fit" or not isinstance(pl_module, SampledModule):
            return
        if self.teacher and not pl_module.has_teacher:
            raise ValueError(f"steps_curve.teacher=true: {type(pl_module).__name__} has no teacher; set it to false.")
        self.record = read_curve(self.file(trainer))
        if self.teacher:
            steps = str(pl_module.evaluation.steps[0])
            self.measuring = {name: metric.clone() for name, metric in pl_module.metrics[steps].items()}

    def file(self, trainer: Trainer) -> Path:
        """The JSON file of the run."""
        return Path(trainer.default_root_dir) / FOLDER / f"{NAME}.json"

    def applies(self, trainer: Trainer) -> bool:
        """Whether this is a validation of training whose figures are kept."""
        checking = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        return trainer.state.fn == "fit" and not checking

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draws the teacher for the conditions, and with the seeds, that the student was drawn with."""
        if not self.measuring or not self.applies(trainer):
            return
        method: Any = pl_module
        indices, ready = method.numbers(batch, batch_idx), method.prepare(replace(batch, x0=None))
        pixels = method.draw_pixels(method.evaluation.teacher_steps, indices, ready, "teacher")
        for metric in self.measuring.values():
            metric.to(method.device).update(pixels, method.real_pixels(batch), batch.cond)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds, writes and logs."""
        if not isinstance(pl_module, SampledModule) or not self.applies(trainer):
            return
        method: Any = pl_module
        if self.measuring:  # on all ranks: their sums are added
            level = {name: finite(metric.compute()) for name, metric in self.measuring.items()}
            self.record["teacher"] = {"steps": method.evaluation.teacher_steps, "values": level}
            self.measuring = {}
        values, step = measured(trainer, method), trainer.global_step
        if not values or not trainer.is_global_zero:
            return
        for name, metric in method.metrics[str(method.evaluation.steps[0])].items():
            described = {"higher_is_better": metric.higher_is_better, "protocol": getattr(metric, "protocol", None)}
            self.record["metrics"][name] = described
        kept = [entry for entry in self.record["validations"] if entry["step"] < step]
        self.record["validations"] = [*kept, {"step": step, "values": values}]
        path, picture = self.file(trainer), draw_curves(self.record)
        with atomic_writer(path) as file:
            file.write((json.dumps(self.record, indent=2) + "\n").encode())
        save_sheet(picture, path.with_suffix(".png"))
        log_image(trainer, NAME, picture, step)


def finite(value: Any) -> float | None:
    """A figure as a number that JSON has."""
    return float(value) if math.isfinite(float(value)) else None


def measured(trainer: Trainer, method: Any) -> dict[str, dict[str, float | None]]:
    """The figures of this validation, by metric and number of steps; empty where none were logged."""
    logged, found = trainer.callback_metrics, {}
    for name in method.metrics[str(method.evaluation.steps[0])]:
        figures = {str(steps): logged.get(f"val/{name}/{steps}") for steps in sorted(method.evaluation.steps)}
        found[name] = {steps: finite(value) for steps, value in figures.items() if value is not None}
    return {name: figures for name, figures in found.items() if figures}


def read_curve(path: Path) -> dict[str, Any]:
    """What an earlier start of the run has written; empty without. Raises ValueError if it is something else."""
    if not path.exists():
        return {"metrics": {}, "validations": []}
    try:
        record = json.loads(path.read_text())
        if not all(entry["step"] >= 0 and entry["values"] for entry in record["validations"]) or "metrics" not in record:
            raise ValueError("no figures by step in it")
        return record
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: is no curve of this run ({error}); remove it, and it is begun anew.") from error


def draw_curves(record: dict[str, Any]) -> Any:
    """A PIL image of the figures against steps: a panel a metric, a line a validation, the last in black.

    Distances have a logarithmic axis where all are positive.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    names = list(record["metrics"])
    figure = Figure(figsize=(5.5 * len(names), 4.2), dpi=100)
    figure.subplots_adjust(0.72 / (5.5 * len(names)), 0.12, 1 - 0.1 / (5.5 * len(names)), 0.97, wspace=0.2)
    canvas = FigureCanvasAgg(figure)  # drawn without pyplot, which keeps figures and looks for a screen
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        draw_panel(axes, name, record)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba().tobytes()).convert("RGB")


def draw_panel(axes: Any, name: str, record: dict[str, Any]) -> None:
    """The lines of one metric."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    entries = [entry for entry in record["validations"] if name in entry["values"]]
    lines = [{int(steps): value for steps, value in entry["values"][name].items() if value is not None} for entry in entries]
    level = record.get("teacher", {"values": {}})["values"].get(name)
    for number, (entry, line) in enumerate(zip(entries, lines)):
        last, first = number == len(entries) - 1, number == 0
        colour = "black" if last else colormaps["viridis"](0.9 - 0.8 * number / len(entries))
        label = f"training step {entry['step']}" if first or last or len(entries) <= NAMED else None
        style = {"linewidth": 2.4, "zorder": 3} if last else {"linewidth": 1.0, "alpha": 0.6}
        axes.plot(list(line), list(line.values()), "o-", color=colour, label=label, **style)
    if level is not None:
        axes.axhline(level, linestyle="--", color="tab:red", label=f"teacher, {record['teacher']['steps']} steps")
    axes.set(xlabel="sampler steps", ylabel=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({steps for line in lines for steps in line}), [str(steps) for steps in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    values = [value for line in lines for value in line.values()] + ([] if level is None else [level])
    if not record["metrics"][name]["higher_is_better"] and values and min(values) > 0:
        axes.set_yscale("log")
        # within one power of ten there would be no labels
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)
    if lines:
        axes.legend(fontsize="small")
