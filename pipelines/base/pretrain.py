"""Pretrain the embedded base model: `python -m pipelines.base.pretrain` (resumes when run again)."""

from __future__ import annotations

import logging
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.stage import tune_allocator
from toyworld.pretrain import pretrain

HOME = Path("pipelines/base")

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tune_allocator(logging.getLogger())
    pretrain(HOME, Path(".resume/base"), YAML(typ="safe").load(HOME / "params.yaml"))
