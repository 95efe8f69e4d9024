"""Pretrain the embedded base model: `python -m pipelines.base.pretrain` (run it again to resume)."""

from __future__ import annotations

import logging
from pathlib import Path

from ruamel.yaml import YAML

from coordexp.errors import Interrupted
from coordexp.infra.provenance import add_to_run_record, fingerprint, run_facts
from coordexp.infra.resume import resume_folder
from coordexp.stage import tune_allocator
from toyworld.pretrain import pretrain

HOME = Path("pipelines/base")
RUN_RECORD = HOME / "pretrain.run.json"


def main() -> None:
    """Train, and write cost and recipe to the run record; its seconds include those of interrupted runs."""
    params = YAML(typ="safe").load(HOME / "params.yaml")
    sprites = Path(params["sprites"])
    state = resume_folder("base", fingerprint(params, [sprites / "catalog.json", sprites / "labels.json"]))
    try:
        counted = pretrain(HOME, state, params)
    except Interrupted as stop:
        raise SystemExit(f"{stop} Run the same command again.") from stop
    facts = run_facts("base", counted["step_seconds"] + counted["exam_seconds"], 0.0)
    add_to_run_record(RUN_RECORD, {k: v for k, v in facts.items() if k != "cpu_seconds"} | counted)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    tune_allocator(logging.getLogger())
    main()
