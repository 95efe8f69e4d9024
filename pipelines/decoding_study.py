"""What decoding choices are worth on val, for stage 1 and stage 2; on demand (`make decoding-study`), not in the graph.

Decodes each checkpoint with and without constraints and K times sampled. Box rules and scores need no decoding of their
own: every prediction carries the alternatives.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from coordexp.config.run import RunConfig
from coordexp.evaluation.best_of_k import oracle_k, vote
from coordexp.evaluation.decoding_study import between_runs, box_table, score_table
from coordexp.evaluation.evaluator import rounded
from coordexp.infra.files import write_text
from coordexp.infra.provenance import write_json
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.reporting.decoding_tables import decoding_markdown
from coordexp.rollout.stages import decode_kept
from coordexp.stage import LOG, stage_main

FREE = {"grammar": "none", "corners": "any", "duplicate_iou": 1.0}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "off": FREE,
    "grammar": FREE | {"grammar": "any"},
    "and corners": FREE | {"grammar": "any", "corners": "valid"},
    "and duplicates": FREE | {"grammar": "any", "corners": "valid", "duplicate_iou": 0.5},
    "and closed names": FREE | {"grammar": "closed", "corners": "valid", "duplicate_iou": 0.5},
}
SAMPLES = 8
SAMPLED = CONSTRAINTS["and corners"] | {"temperature": 0.7}


def run(context: RunConfig) -> None:
    """Write reports/<profile>/decoding.json and decoding.md."""
    study = {name: _study(context, name) for name in ("stage1", "stage2") if context.paths.run(name).is_dir()}
    write_json(context.paths.reports / "decoding.json", rounded(study))
    write_text(context.paths.reports / "decoding.md", decoding_markdown(study))


def _study(context: RunConfig, name: str) -> dict[str, Any]:
    categories = read_categories(context.paths.records / "categories.json")
    runs: dict[str, list[ImageResult]] = {}
    speed: dict[str, dict[str, float]] = {}
    for label, changes in CONSTRAINTS.items():
        (runs[label],), summary = _decode(context, name, changes, 1)
        seconds = summary["generate_seconds"]
        speed[label] = {f"{unit}_per_second": summary[unit] / seconds for unit in ("tokens", "images")}
    sampled, _ = _decode(context, name, SAMPLED, SAMPLES)
    voted = {"greedy": runs["and corners"], "one sample": sampled[0]}
    voted |= {f"vote {n} of {SAMPLES}": vote(sampled, n) for n in (2, SAMPLES // 2)}
    return {
        "model": summary["identity"]["model"],
        "constraints": between_runs(runs, "off", categories, context.params, speed),
        "boxes": box_table(runs["off"], categories, context.params),
        "scores": score_table(runs["off"], categories, context.params),
        "best_of_k": between_runs(voted, "greedy", categories, context.params, {}),
        "oracle_k": asdict(oracle_k(sampled)),
    }


def _decode(
    context: RunConfig, name: str, changes: dict[str, Any], draws: int
) -> tuple[list[list[ImageResult]], dict[str, Any]]:
    """Results of each draw on val under changed decode parameters, and the summary of the decode."""
    decode = context.params.decode.model_copy(update=changes)
    params = context.params.model_copy(update={"decode": decode})
    results, summary = decode_kept(replace(context, params=params), name, draws)
    LOG.info("%s %s, %d draws: %.1f s", name, changes, draws, summary["generate_seconds"])
    return results, summary


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
