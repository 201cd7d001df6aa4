"""The loggers of a run: TensorBoard in ``RUN/tensorboard`` and ``RUN/csv/metrics.csv``, both continued when a run is.

Lightning's CSV logger deletes the file that it finds, numbers folders by how often a run was started, and holds up to a hundred
steps in memory, which a kill loses.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from distill.checkpoints import atomic_writer


def run_loggers(run: str | Path) -> list[Logger]:
    """TensorBoard and CSV in the run folder."""
    return [TensorBoardLogger(run, name="", version="tensorboard"), ContinuedCSVLogger(run)]


class ContinuedCSVLogger(CSVLogger):
    """``RUN/csv/metrics.csv``, to which a resumed run adds its rows; each row is written at once."""

    def __init__(self, run: str | Path):
        super().__init__(run, name="", version="csv", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        """The writer of the rows; on ranks other than zero, nothing is written."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment


class _Rows(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Takes up the rows that are there, where Lightning removes them; a row that a kill cut short is dropped."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        text = path.read_text()
        if not text.endswith("\n"):
            _replace(path, text[: text.rfind("\n") + 1])
        self.metrics_keys = next(csv.reader(io.StringIO(text)), [])

    def _rewrite_with_new_header(self, fieldnames: Any) -> None:  # a list; checked as one in tests, beartype would draw an item
        """As Lightning's, but whole or not at all."""
        path = Path(self.metrics_file_path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, fieldnames=fieldnames, lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(rows)
        _replace(path, buffer.getvalue())


def _replace(path: Path, text: str) -> None:
    with atomic_writer(path) as file:
        file.write(text.encode())
