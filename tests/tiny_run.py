"""Recipes for tests: a run of the tiny network through the real command line, in this process or another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPE = """
model:
  class_path: DenoisingTraining
  init_args:
    student:
      class_path: NetworkDenoiser
      init_args:
        network: tiny.TinyNetwork
        schedule: RectifiedFlow
    times: UniformTimes
    optimization:
      averaging: DecayAveraging
    evaluation:
      steps: [1, 2]
      sampler: {class_path: RenoiseSampler, init_args: {grid: UniformGrid}}
      teacher_sampler: {class_path: OdeSampler, init_args: {solver: Euler, grid: UniformGrid}}
data: tiny.TinyData
trainer:
  max_steps: 12
  accelerator: cpu
  val_check_interval: 5
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
checkpoint:
  every_n_steps: 4
"""


def write_recipe(folder: Path, name: str = "cd.yaml") -> Path:
    """The tiny recipe as ``folder/configs/tiny/NAME``."""
    path = folder / "configs" / "tiny" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE)
    return path


def process(*words: str, folder: Path, program: tuple[str, ...] = ("-m", "distill")) -> subprocess.Popen:
    """Starts ``python -m distill WORDS`` in ``folder``, with the tests on the path."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
