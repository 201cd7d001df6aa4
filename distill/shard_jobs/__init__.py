"""What the tools that draw of a teacher share: their command line, what is asked for, the header, and the writing of shards."""

from __future__ import annotations

from distill.shard_jobs.command import run
from distill.shard_jobs.job import ShardJob
from distill.shard_jobs.requests import Requests
from distill.shard_jobs.writing import ShardWriter

__all__ = ["Requests", "ShardJob", "ShardWriter", "run"]
