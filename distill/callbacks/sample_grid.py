"""Sample grids: the EMA student at several step counts beside its teacher, from the same seeds, as PNG and in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from distill.checkpoints import atomic_writer
from distill.methods.sampled import SampledModule
from distill.sharding import is_sharded

SHORTEST_SIDE = 32
"""Samples smaller than this many pixels are enlarged by whole factors, so that a person can see them."""


def draw_grid(rows: dict[str, Tensor], columns: int) -> Any:
    """A PIL image of labelled blocks, one above the other, ``columns`` samples a line.

    Args:
        rows: samples ``(n, c, h, w)`` in [-1, 1] by the text above their block; ``c`` is 1 or 3, of others the first is shown.
        columns: samples a line.
    """
    from PIL import Image, ImageDraw
    from torchvision.utils import make_grid

    margin, tiles = 14, []
    for samples in rows.values():
        pixels = samples.detach().float().cpu().clamp(-1, 1)
        pixels = pixels if pixels.shape[1] in (1, 3) else pixels[:, :1]
        factor = -(-SHORTEST_SIDE // min(pixels.shape[-2:]))
        pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        grid = make_grid((pixels + 1) / 2, nrow=columns, padding=2, pad_value=0.5)
        tiles.append(Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()))
    sheet = Image.new("RGB", (max(tile.width for tile in tiles), sum(tile.height + margin for tile in tiles)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for text, tile in zip(rows, tiles):
        pen.text((3, top + 1), text, fill="black")
        sheet.paste(tile, (0, top + margin))
        top += margin + tile.height
    return sheet


def save_sheet(sheet: Any, path: str | Path) -> None:
    """Writes a PIL image to ``path`` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    with atomic_writer(path) as file:
        file.write(buffer.getvalue())


def save_grid(rows: dict[str, Tensor], path: str | Path, columns: int = 10) -> None:
    """Writes the picture of `draw_grid` to ``path`` as PNG."""
    save_sheet(draw_grid(rows, columns), path)


class SampleGrid(Callback):
    """At each end of validation, rank zero draws the same seeds from the EMA student, and the teacher once for comparison.

    Writes ``RUN/samples/step_00001000.png``: a block for each of ``evaluation.steps`` and of ``comparison_steps``, one for the
    teacher at ``evaluation.teacher_steps``, and a column a class.

    Args:
        lines: lines of samples a block.
        columns: samples a line where there are no classes; with classes, a line has one sample of each, at most this many.
            Conditions are those of the data module's ``examples``.
        comparison_steps: numbers of steps at which the student is drawn beside those of the evaluation, so that the grids of
            all recipes compare; those that a student's sampler does not take are left out.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, lines: int = 4, columns: int = 10, comparison_steps: tuple[int, ...] = (1, 2, 4, 8)):
        for name, value in {"lines": lines, "columns": columns, "comparison_steps": min(comparison_steps, default=1)}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: give a positive number.")
        self.lines, self.columns, self.comparison_steps = lines, columns, comparison_steps
        self.teacher_block: dict[str, Tensor] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws, writes and logs the grid."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not trainer.is_global_zero and not is_sharded(pl_module):
            return  # the ranks of a sharded network draw together
        if not isinstance(pl_module, SampledModule):
            return  # an autoencoder or a text tower: no student to draw from
        classes = trainer.datamodule.spec.num_classes  # type: ignore[attr-defined]
        columns = min(self.columns, classes or self.columns)
        blocks = self.blocks(trainer, pl_module, columns)
        if not trainer.is_global_zero:
            return
        sheet = draw_grid(blocks, columns)
        step = trainer.global_step
        save_sheet(sheet, Path(trainer.default_root_dir) / "samples" / f"step_{step:08d}.png")
        log_image(trainer, "samples", sheet, step)

    def blocks(self, trainer: Trainer, method: Any, columns: int) -> dict[str, Tensor]:
        """Samples ``(lines * columns, c, h, w)`` by label: the student at each number of steps, then the teacher."""
        count, evaluation = self.lines * columns, method.evaluation
        examples = trainer.datamodule.examples(count)  # type: ignore[attr-defined]
        ready = method.prepare(move_data_to_device(examples, method.device))

        def draw(steps: int, source: str) -> Tensor:
            return method.draw_pixels(steps, range(count), ready, source).cpu()

        compared = (steps for steps in self.comparison_steps if method.student_sampler.takes(steps))
        rows = {f"student, steps: {n}": draw(n, "ema") for n in sorted({*evaluation.steps, *compared})}
        if self.teacher_block is None:
            steps = evaluation.teacher_steps
            self.teacher_block = {f"teacher, steps: {steps}": draw(steps, "teacher")} if method.has_teacher else {}
        return rows | self.teacher_block


def log_image(trainer: Trainer, name: str, sheet: Any, step: int) -> None:
    """Adds an RGB PIL image to every logger that writes TensorBoard events."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
