"""Score and evaluate the answers of base, stage 1, the control and stage 2 on val."""

from __future__ import annotations

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.run import RunConfig
from coordexp.evaluation.parse import faults_of
from coordexp.evaluation.suite import evaluate_run
from coordexp.infra.artefacts import sealing
from coordexp.matching.summary import ratio_text
from coordexp.rollout.scoring import score_folder
from coordexp.stage import LOG, stage_main


def run(context: RunConfig) -> None:
    """Write the predictions of each checkpoint, and the metrics of all of them."""
    with sealing(context.paths.run("eval")):
        for name in CHECKPOINTS:
            score_folder(context.paths.decoded(name), context.params.decode, context.paths.evaluation(name))
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
            LOG.warning("%s: not evaluated: %s", name, fault)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
