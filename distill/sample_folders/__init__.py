"""Folders of samples: what is drawn from, how a set is drawn by many processes, and how it is stored."""

from distill.sample_folders.drawing import conditions, counted, draw_all, draw_batch, requests, rows
from distill.sample_folders.formats import FORMATS
from distill.sample_folders.job import SampleJob
from distill.sample_folders.sources import SOLVERS, RunSource, TeacherSource

__all__ = [
    "FORMATS",
    "SOLVERS",
    "RunSource",
    "SampleJob",
    "TeacherSource",
    "conditions",
    "counted",
    "draw_all",
    "draw_batch",
    "requests",
    "rows",
]
