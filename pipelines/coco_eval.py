"""Decode base, stage 1, the control and stage 2 on val, and evaluate them."""

from __future__ import annotations

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.run import RunConfig
from coordexp.evaluation.parse import faults_of
from coordexp.evaluation.suite import evaluate_run
from coordexp.matching.summary import ratio_text
from coordexp.models.pins import pinned_folder
from coordexp.rollout.stages import decode_val
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write predictions per checkpoint, and the metrics of all of them."""
    for name in CHECKPOINTS:
        is_base = name == "base"
        folder = pinned_folder(context.profile.model, context.params.profile) if is_base else context.paths.run(name)
        decoded = decode_val(context, name, folder)
        LOG.info("%s: %s", name, "decoded" if decoded else "same weights and settings: decode reused")
    metrics = evaluate_run(context.params, context.paths)
    for name in CHECKPOINTS:
        areas = metrics[name]["eval"]
        LOG.info(
            "%s: mAP %s AP50 %s F1@.5 %s parse rate %s",
            name,
            *map(ratio_text, (areas["coco"]["mAP"], areas["coco"]["AP50"], areas["f1"]["full_50"])),
            ratio_text(areas["parse"]["parse_rate"]),
        )
        for fault in faults_of(areas):
            LOG.warning("%s: not judged: %s", name, fault)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
