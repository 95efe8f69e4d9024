"""The report: read all inputs, draw the figures, write the text.

    build_report(ReportInputs.of(run), Path("reports/tiny"))

progress.md is the decision note; git holds it with the few small files of pictures/. The numbers and figures behind it
are in details/ (a page per subject), figures/ and gallery/, which DVC stores. No file contains a time or place, so that
the same inputs give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from coordexp.config.paths import CHECKPOINTS, COMPARISONS
from coordexp.evaluation.protocol import iou_key
from coordexp.infra.files import write_text
from coordexp.reporting import provenance, tables
from coordexp.reporting.answers import (
    answers_table,
    improved_and_flat,
    readings_table,
    shapes_table,
    standing_answers,
    suggestions,
    suggestions_table,
)
from coordexp.reporting.asked import ASKED, Asked, choose_asked, write_asked
from coordexp.reporting.checklist import checklist_table, run_checks
from coordexp.reporting.decision import (
    EXAMPLES,
    checks_line,
    decision,
    error_budget,
    examples,
    main_table,
    standing_lines,
    write_pictures,
)
from coordexp.reporting.figures_coordinates import Strip, choose_strips, write_coordinate_figures
from coordexp.reporting.figures_evaluation import write_evaluation_figures
from coordexp.reporting.figures_training import write_training_figures
from coordexp.reporting.gallery import (
    BEFORE,
    RULES,
    SHOWN,
    GalleryPick,
    choose_images,
    image_names,
    n_errors,
    write_gallery,
)
from coordexp.reporting.inputs import Baseline, ReportData, ReportInputs, load_report_data, metric, required
from coordexp.reporting.markdown import counted, escape, number, percent, table
from coordexp.reporting.method import METHOD, Method, choose_method, write_method
from coordexp.reporting.monitor import (
    checkpoint_counts_table,
    monitor_sentence,
    monitor_table,
    write_monitor_figure,
)
from coordexp.reporting.outcomes import Outcomes, judge
from coordexp.reporting.training import (
    channels,
    correlations_sentence,
    counters_table,
    of_channel,
    training_sentence,
    training_table,
    w1_sentence,
)
from coordexp.reporting.verdicts import (
    RULE,
    comparison_table,
    explain,
    explanation_table,
)

PAGE, DETAILS = "progress.md", "details"
FOLDERS = ("pictures", DETAILS, "figures", "gallery")
SUBJECTS = ("answers", "boxes", "checks", "comparisons", "decoding", "gallery", "run", "sets", "training", "vocabulary")
SUGGESTED = 3  # experiments on page one


def build_report(inputs: ReportInputs, out_dir: Path) -> Path:
    """Write progress.md with pictures/, details/ with figures/ and gallery/; returns the path of progress.md.

    Raises:
        DataError: a file, a checkpoint or a metric is missing; nothing is written then.
    """
    content = Content.of(inputs)
    texts = content.texts()
    for folder in FOLDERS:  # remove the figures of an older report
        shutil.rmtree(out_dir / folder, ignore_errors=True)
    content.draw(out_dir)
    for name, text in texts.items():  # after their figures: whatever a page shows exists
        write_text(out_dir / name, text)
    return out_dir / PAGE


@dataclass(frozen=True, slots=True)
class Content:
    """What a report says and shows, before anything is written."""

    inputs: ReportInputs
    data: ReportData
    outcomes: Mapping[str, Outcomes]  # by checkpoint
    dup_key: str  # the column of duplicate pairs
    picks: list[GalleryPick]
    strips: list[Strip]
    asked: list[Asked]
    method: Method | None

    @classmethod
    def of(cls, inputs: ReportInputs) -> Content:
        """Read the inputs and choose the images.

        Raises:
            DataError: a file, a checkpoint or a metric is missing.
        """
        data = load_report_data(inputs)
        params, settings = inputs.run.params, data.settings
        outcomes = {name: judge(results, data.categories, settings) for name, results in data.results.items()}
        dup_key = f"dup_pairs_{iou_key(min(settings.duplicate_ious))}"
        picks = choose_images(data.per_image, dup_key, inputs.run.profile.report.gallery_images, params.seed)
        image_names(picks, outcomes, inputs.image_root)  # fails before anything is written
        return cls(
            inputs=inputs,
            data=data,
            outcomes=outcomes,
            dup_key=dup_key,
            picks=picks,
            strips=choose_strips(outcomes[SHOWN]),
            asked=choose_asked(data.probes, data.categories, params.seed),
            method=choose_method(outcomes[SHOWN], data.distributions, params.matching, params.seed),
        )

    def texts(self) -> dict[str, str]:
        """All pages, by file name."""
        context = _context(self)
        return {name: _render(name, context) for name in (*(f"{DETAILS}/{subject}.md" for subject in SUBJECTS), PAGE)}

    def draw(self, out_dir: Path) -> None:
        """All figures and pictures that the pages show."""
        data, outcomes, params, root = self.data, self.outcomes, self.inputs.run.params, self.inputs.image_root
        write_training_figures(data.logs, params, out_dir / "figures")
        write_monitor_figure(data, out_dir / "figures" / "monitor.png")
        write_evaluation_figures(data, outcomes, out_dir / "figures")
        write_coordinate_figures(outcomes, self.strips, data.distributions, root, out_dir / "figures")
        write_gallery(self.picks, outcomes, root, out_dir / "gallery")
        write_pictures(data, outcomes, self.picks, root, out_dir / "pictures")
        write_asked(self.asked, root, out_dir / "pictures" / ASKED)
        if self.method:
            write_method(self.method, data.distributions, params.matching, root, out_dir / "pictures" / METHOD)


def _render(name: str, context: Mapping[str, Any]) -> str:
    # Markdown, not HTML: escaping is done cell by cell, where text from data enters.
    loader = PackageLoader("coordexp.reporting", "templates")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(f"{name}.jinja").render(context)


def _context(content: Content) -> dict[str, Any]:
    data, outcomes, picks, dup_key = content.data, content.outcomes, content.picks, content.dup_key
    checks, answers, suggested = run_checks(data, outcomes), standing_answers(data), suggestions(data)
    return {
        **_summary(data, content.inputs.baseline),
        **_scores(data, outcomes),
        **_behind_the_scores(data),
        "has_strips": bool(content.strips),
        "method_file": METHOD if content.method else "",
        "asked": [kind.caption for kind in content.asked],
        "asked_file": ASKED if any(kind.shown for kind in content.asked) else "",
        "gallery": _gallery(data, picks, dup_key),
        "n_gallery": len(picks),
        "examples": _examples(data, picks, dup_key),
        "checks_line": checks_line(checks),
        "checklist": checklist_table(checks),
        "standing_lines": standing_lines(answers),
        "answers": answers_table(answers),
        "suggestions": suggestions_table(suggested[:SUGGESTED]),
        "all_suggestions": suggestions_table(suggested, rules=True),
    }


def _summary(data: ReportData, baseline: Baseline | None) -> dict[str, Any]:
    """The first page."""
    return {
        "profile": data.run.params.profile,
        "decision": decision(data),
        "rule": RULE,
        "main_table": main_table(data),
        "error_budget": error_budget(data),
        "what_ran": provenance.what_ran(data),
        "experiment": provenance.experiment_line(baseline, data.run.params.model_dump()) if baseline else "",
        "improved": improved_and_flat(data),
    }


def _scores(data: ReportData, outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """The results, and what explains F1 and mAP."""
    metrics, settings, shown = data.metrics, data.settings, outcomes[SHOWN]
    composed = data.run.profile.source.kind == "scenes"  # no published number covers these
    return {
        "checkpoint_table": tables.metrics_table(data, "checkpoints"),
        "comparison_table": comparison_table(data),
        "checkpoint_counts": checkpoint_counts_table(metrics, settings),
        "monitor_sentence": monitor_sentence(data.dev_rows),
        "monitor_table": monitor_table(data.dev_rows),
        "readings_table": readings_table(data),
        "shapes_table": shapes_table(data),
        "resamples": settings.bootstrap_resamples,
        "goals_table": tables.goals_table(data),
        "vocabulary_table": tables.metrics_table(data, "vocabulary") if tables.tier_table(data) else "",
        "tier_table": tables.tier_table(data),
        "names_table": tables.metrics_table(data, "names"),
        "protocol_table": tables.protocol_table(data),
        "absent_table": tables.metrics_table(data, "absent names"),
        "area_table": tables.metrics_table(data, "sizes"),
        "size_table": tables.size_table(data.details, "by_side_px", "side_px"),
        "category_table": tables.category_table(data.details[SHOWN]),
        "mapping": settings.mapping,
        "mapping_table": tables.mapping_table(data),
        "n_known": sum(category.split == "train" for category in data.categories),
        "n_held_out": sum(category.split != "train" for category in data.categories),
        "confusion_table": tables.confusion_table(shown),
        "n_confused": shown.confusions().total(),
        "set_table": tables.metrics_table(data, "set"),
        "set_measures": tables.measures_table(data, outcomes, "set"),
        "geometry_measures": tables.measures_table(data, outcomes, "geometry"),
        "nms_table": tables.nms_table(data),
        "omission_table": tables.omission_table(data.details),
        "worst_duplicates": tables.worst_duplicates_table(data.details[SHOWN]),
        "scores_table": tables.scores_table(data.details),
        "published": "" if composed else tables.published_markdown(metrics),
        "count_table": tables.metrics_table(data, "counts"),
        "errors_table": tables.metrics_table(data, "errors"),
        "blind_table": tables.metrics_table(data, "blind"),
        "explanation_table": explanation_table(metrics),
        "explanations": [explain(data, name) for name in COMPARISONS],
    }


def _behind_the_scores(data: ReportData) -> dict[str, Any]:
    """Training, rollouts, upper bound, provenance."""
    params = data.run.params
    return {
        "training": _training(data),
        "w1": w1_sentence(data.logs["stage2"]),
        "rollout_table": tables.leaves_table(data.rollout, ["rollouts of stage 1", "value"]),
        "counters_table": counters_table(data.logs["stage2"]),
        "matching": params.matching,
        "upper_bound_headline": _upper_bound(data),
        "upper_bound_table": tables.upper_bound_table(data.upper_bound),
        "runs_table": provenance.runs_table(data.metadata),
        "decode_table": provenance.decode_table(data.decodes),
        "weights_table": provenance.weights_table(params),
        "params_table": provenance.params_table(params),
        "packing_table": tables.leaves_table(data.packing, ["packing", "value"]),
        "drops_table": tables.leaves_table(data.drops, ["annotations dropped by `convert`", "number"]),
    }


def _training(data: ReportData) -> list[dict[str, str]]:
    """Title, sentence and table of each training stage; stage 2 by channel."""
    parts = [
        ("Stage 1", "stage1", data.logs["stage1"]),
        ("Control: stage 1 continued", "stage1-control", data.logs["stage1-control"]),
    ]
    params, stage2 = data.run.params, data.logs["stage2"]
    context = "ground-truth context"
    if (n_forwards := params.stage2.n_softctx_iter) > 1:
        context = f"text in the ground-truth context, coordinates in the soft self-context of forward {n_forwards}"
    whose = {"A": context, "B": "own rollouts"}
    by_channel = [(f"Stage 2, channel {c} ({whose[c]})", "stage2", of_channel(stage2, c)) for c in channels(stage2)]
    parts += by_channel or [("Stage 2", "stage2", stage2)]
    return [
        {
            "title": title,
            "sentence": f"{len(log)} steps. {training_sentence(log, params)}".rstrip(),
            "table": training_table(log, params, stage),
            "slots": correlations_sentence(log),
        }
        for title, stage, log in parts
    ]


def _upper_bound(data: ReportData) -> str:
    upper_bound = required(data.upper_bound, "mAP", "upper_bound.json")
    if not upper_bound:
        return "nothing: the data have no annotated object."
    reached = {name: (metric(data.metrics, name, "coco.mAP") or 0.0) / upper_bound for name in CHECKPOINTS}
    f1_95 = required(data.upper_bound, "f1_95", "upper_bound.json")
    score = f"mAP {number(upper_bound)} and F1 at IoU .95 of {number(f1_95)}"
    shown = ", ".join(f"{name} {percent(fraction)}" for name, fraction in reached.items())
    return f"{score}. The checkpoints reach these fractions of that mAP: {shown}."


def _gallery(data: ReportData, picks: list[GalleryPick], dup_key: str) -> list[dict[str, Any]]:
    """The selected panels under their rule."""
    return [
        {
            "rule": rule,
            "pictures": [
                {
                    "path": f"../gallery/{pick.file_name}",
                    "id": pick.image_id,
                    "caption": _caption(data, pick, dup_key),
                }
                for pick in picks
                if pick.rule == rule
            ],
        }
        for rule in RULES
    ]


def _examples(data: ReportData, picks: list[GalleryPick], dup_key: str) -> str:
    """The panels of page one, one below the other; a rule that selected no image is reported as such."""
    chosen = examples(picks)
    rows = []
    for rule, file in EXAMPLES.items():
        caption = "no image of this kind"
        if pick := chosen.get(rule):
            caption = f"{_caption(data, pick, dup_key)}<br>![image {pick.image_id}](pictures/{file})"
        rows.append([f"**{rule.capitalize()}**: {caption}"])
    return table(["rule, image, counts of stage 2"], rows)


def _caption(data: ReportData, pick: GalleryPick, dup_key: str) -> str:
    """Counts of stage 2 and, if the image was selected for it, the change from stage 1."""
    row = data.per_image[SHOWN].loc[pick.image_id]
    caption = (
        f"{escape(row['image'])} (id {pick.image_id}): {counted(row['n_gt'], 'object')}, "
        f"{counted(row['n_pred'], 'prediction')}; {row['tp_50']} correct, {counted(row['fp_50'], 'false positive')}, "
        f"{counted(row['fn_50'], 'false negative')}, {counted(row[dup_key], 'duplicate pair')}"
    )
    if pick.rule == "biggest change":
        before, after = (n_errors(data.per_image[name])[pick.image_id] for name in (BEFORE, SHOWN))
        caption += f"; {before} errors in stage 1, {after} in stage 2"
    return caption
