"""The reference pages docs/parameters.md and docs/metrics.md, written from the code that checks and computes.

    python -m coordexp.reporting.reference        # from the repository root

rewrites both, the tables of memory in docs/production.md and docs/scaling.md, and README's results and picture, which
are those of the committed report. No page holds a value of params.yaml: an experiment that changes one must not make
the documents wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.block import Block, FieldSpec, field_specs, nested_block
from coordexp.config.loading import read_yaml
from coordexp.config.profile import DatasetsConfig, Profile
from coordexp.config.removed import REMOVED
from coordexp.config.schema import Params
from coordexp.evaluation.comparison import COMPARED
from coordexp.evaluation.headline import headline_keys
from coordexp.evaluation.input_checks import BAD_INPUT
from coordexp.evaluation.registry import MetricSpec, metric_specs
from coordexp.evaluation.settings import EvalSettings
from coordexp.infra.files import write_bytes, write_text
from coordexp.reporting.markdown import table
from coordexp.reporting.readme import SHOWN_PROFILE, results_table, shown_picture, with_block, with_results
from coordexp.reporting.training_tables import MEANINGS

Stages = Mapping[str, Mapping[str, Any]]  # the `stages` of dvc.yaml

PARAMETERS_PAGE, METRICS_PAGE, README = Path("docs/parameters.md"), Path("docs/metrics.md"), Path("README.md")
PRODUCTION_PAGE, SCALING_PAGE, PICTURE = (
    Path("docs/production.md"),
    Path("docs/scaling.md"),
    Path("docs/detections.png"),
)
BEGIN_MEMORY = "<!-- memory: written by `python -m coordexp.reporting.reference` -->"
END_MEMORY = "<!-- end of memory -->"
PARAMS_FILE = "params.yaml"
PROFILE_FILE = "configs/${profile}.yaml"  # the name under which dvc.yaml tracks the keys of a profile
GENERATED = "<!-- Written by `python -m coordexp.reporting.reference`; a test fails when it is stale. -->"

_PARAMETERS_INTRO = """\
Experiments vary `params.yaml`; `configs/<profile>.yaml` says where and how big. Every key must be present and none has
a default in the code, so the two files are the whole truth about a run. An unknown key, a value of another type and a
value out of range stop whatever stage runs, with exit code 2 and a message that names the key in full. (A key that no
stage tracks makes none run: DVC refuses to set one that is not there, unless it is written with a `+`.)
`dvc exp run -S softce_weight=0.2` sets a key of `params.yaml` for one run, `-S configs/tiny.yaml:stage1.steps=600` one
of a profile: both files have blocks `stage1` and `stage2`, of different keys. `make preset PRESET=mixture` runs a named
recipe of `configs/presets/` (`mixture`, `pure_ce`, `raw_digits`, `seed`). What the terms compute:
[concepts.md](concepts.md).

The last column names the stages that track the key in `dvc.yaml`. A changed value runs those again, and after them
every stage whose inputs came out different. `profile` is tracked by none: it is part of every command and path."""

_TERMS = """\
In the order of the loss: the sum of weight * (sum over slots or boxes) / (their count in the whole step). A term whose
weight is 0 is not computed, but for box terms, which are always logged. Stage 1 takes `text_ce` at weight 1 and has no
term without a key in its block."""

_DATASETS = """\
In place of the keys of the scenes. `<name>` is chosen by the user, for one or more sets; formats and layouts are in
[data.md](data.md)."""

_METRICS_INTRO = """\
`reports/<profile>/metrics.json` holds `<checkpoint>.eval.<area>.<metric>` for the checkpoints `base`, `stage1`,
`stage1-control` and `stage2`, rounded to four digits when written. A metric that the data leave undefined (no object of
that kind, no prediction) is `null`, never an invented 0. Two digits at the end of a name are an IoU threshold:
`full_50` is taken at IoU .50. How predictions are matched: [concepts.md](concepts.md).

`dvc metrics show` and `dvc metrics diff` read `reports/<profile>/headline.json`, a subset under the same keys:
{headline} of each trained checkpoint, and
`comparison.stage2_vs_control.coco.mAP` with its interval. All of metrics.json between two revisions:
`dvc metrics diff HEAD --targets reports/<profile>/metrics.json`; with intervals: `coordexp compare`."""

_COMPARISON = """\
At the top level of `metrics.json`, `comparison.<pair>.<metric>` for {metrics}: `delta` (first minus second), `lo` and
`hi` (95 % interval of the paired bootstrap), `p_superior` (share of resamples in which the first is better, ties
counted half)."""

_LOGS = """\
`train_log.jsonl` beside each trained checkpoint holds one JSON object for every step: `step`, `loss/total`,
`loss/<term>` after weighting and `raw/<term>` before (terms are named as their weights: `loss/w1` has `w1_weight`),
`lr` (the peak rate times the schedule), `grad_norm` (before clipping), `tokens`, `samples`, `time/step_s`; in stage 1
`time/wait_s`, the part of it in which processes waited for their batches (a sum over processes); in stage 2 also
`channel` and, in steps of channel B, what it met, `stage2_ab/*_total`, and what fresh rollouts read and wrote,
`rollout/*_tokens`. With several forwards in channel A, terms of the first one are `loss/a1_*`. With
`grad_monitor_every`, `grad/<term>_norm` is the gradient norm of a weighted term over all trained parameters, and
`grad/<term>_cos_text` its cosine with that of `text_ce`. The diagnostics below are taken at the supervised coordinate
slots of the step, of all its forwards and processes, 90th percentiles too; those of a first forward beside the last are
`coord_diag_a1/*`. Terms on boxes are logged as `raw/bbox_*` also where their weight is 0.

`monitor.jsonl` beside it holds one object for every look at the model in training (`monitor.every_steps`), over the
same few dev images: `step`, `images`, `objects`, `predictions`, `right` (box at IoU .50 and name), `false`, `missed`,
`precision`, `recall`, `f1`, `f1_boxes` (names ignored), `matched_iou_mean`, `dup_pairs_90`, `parse_rate`, `truncated`,
`tokens_mean`, `seconds`. The pairing is that of training, not the evaluator's."""

_AREAS = {
    "coco": "COCO average precision and recall (`evaluation/coco.py`).",
    "lvis": "Only with LVIS labels: a run on one `lvis` set, `coordexp evaluate --annotations` (`evaluation/lvis.py`).",
    "known": "The part of COCO AP that belongs to names seen in training.",
    "held_out": "The part of COCO AP that belongs to names that no training split holds.",
    "f1": "One-to-one matching by falling IoU, names ignored when pairing (`evaluation/f1.py`).",
    "protocol": "GT-positive classes (P1) beside the full vocabulary (P2) and the gap (`evaluation/matched.py`).",
    "rollout": "The matching of training, under its own name (`evaluation/training_matching.py`).",
    "parse": "What the strict parser kept and dropped (`evaluation/parse.py`, reasons in `text/parser.py`).",
    "input": "How predicted names were mapped, and input that is odd but judged (`evaluation/input_checks.py`).",
    "set": "How the answer behaves as a set (`evaluation/set_behaviour.py`).",
    "guarded": (
        "Headline and set behaviour after a duplicate guard: of boxes of one name that overlap by the lowest duplicate "
        "IoU, the first stays (`evaluation/matched.py`)."
    ),
    "confidence": "What the scores know (`evaluation/confidence.py`).",
    "interval": "Bootstrap over images (`evaluation/bootstrap.py`).",
}
_BETTER = {"higher": "higher", "lower": "lower", "neither": ""}


def parameters_markdown(stages: Stages) -> str:
    """The page of all parameters: what each means and accepts, and which stages run again when it changes."""
    removed = [[f"`{key}`", _cell(remedy)] for key, remedy in REMOVED.items()]
    parts = [
        "# Parameters",
        GENERATED,
        _PARAMETERS_INTRO,
        *_blocks(Params, PARAMS_FILE, stages),
        *_blocks(Profile, PROFILE_FILE, stages),
        "### `source` with `kind: datasets`",
        _DATASETS,
        _parameter_table(field_specs(DatasetsConfig, "source."), PROFILE_FILE, stages),
        "## Terms of the loss",
        _TERMS,
        terms_table(),
        "## Removed keys",
        "Keys of earlier designs are refused with their remedy.",
        table(["key", "remedy"], removed, "ll"),
    ]
    return "\n\n".join(parts) + "\n"


def terms_table() -> str:
    """Every registered term: its weight, where it is taken, its function and what it is."""
    from coordexp.losses.terms import TERMS  # loads torch, which the commands that import this module do without

    specs = {spec.key.split(".")[-1]: spec for spec in field_specs(Params) if not spec.key.startswith("stage1.")}
    rows = []
    for name, term in TERMS.items():
        spec = specs[f"{name}_weight"]
        file = term.function.__module__.removeprefix("coordexp.").replace(".", "/")
        place = f"`{file}.py:{term.function.__name__}`"
        rows.append([f"`{name}`", f"`{spec.key}`", term.place.replace("_", " "), place, _cell(spec.description)])
    return table(["term", "weight", "taken at", "function", "meaning"], rows, "lllll")


def _blocks(root: type[Block], file: str, stages: Stages) -> Iterator[str]:
    """The section of one file: a table of its top level, if that holds values, and one for each block."""
    yield f"## `{file.replace('${profile}', '<profile>')}`"
    if top := [spec for spec in field_specs(root) if "." not in spec.key]:
        yield _parameter_table(top, file, stages)
    for name, field in root.model_fields.items():
        if block := nested_block(field):
            yield f"### `{name}`"
            yield block.__doc__ or ""
            yield _parameter_table(field_specs(block, f"{name}."), file, stages)


def _parameter_table(specs: Iterable[FieldSpec], file: str, stages: Stages) -> str:
    rows = []
    for spec in specs:
        trackers = [name for name, stage in stages.items() if tracks(stage, file, spec.key)]
        rows.append([f"`{spec.key}`", _cell(spec.description), _cell(spec.expected), ", ".join(trackers)])
    return table(["key", "meaning", "accepts", "tracked by"], rows, "llll")


def tracks(stage: Mapping[str, Any], file: str, key: str) -> bool:
    """Whether a stage tracks a key of a file, by its own name or by that of a block that holds it."""
    tracked: list[str] = []
    for item in stage.get("params", []):
        if isinstance(item, dict):
            if file in item and item[file] is None:  # the whole file
                return True
            tracked += item.get(file, [])
        elif file == PARAMS_FILE:
            tracked.append(item)
    return any(key == name or key.startswith(f"{name}.") for name in tracked)


def metrics_markdown() -> str:
    """The page of all metrics and logged diagnostics; thresholds in names are the defaults of the evaluator."""
    by_area: dict[str, list[MetricSpec]] = {area: [] for area in _AREAS}
    for spec in metric_specs(EvalSettings(), lvis=True).values():
        by_area[spec.key.split(".")[0]].append(spec)
    logged = {**MEANINGS, "coord_tokens": "number of those slots"}
    diagnostics = [[f"`coord_diag/{name}`", _cell(words)] for name, words in logged.items()]
    parts = [
        "# Metrics",
        GENERATED,
        _METRICS_INTRO.format(headline=", ".join(f"`{key}`" for key in headline_keys(EvalSettings()))),
        *(part for area, area_specs in by_area.items() for part in _area(area, area_specs)),
        "## `comparison`",
        _COMPARISON.format(metrics=", ".join(f"`{key}`" for key in COMPARED)),
        "## Bad input",
        "Decided in `evaluation/input_checks.py`: an error, by exit code 2 and a message naming the place, for what "
        "would make a number wrong; a counter for what a model may well answer.",
        table(["input", "outcome", "why"], [[_cell(b.what), _cell(b.outcome), _cell(b.why)] for b in BAD_INPUT], "lll"),
        "## Training logs",
        _LOGS,
        table(["diagnostic", "meaning"], diagnostics, "ll"),
    ]
    return "\n\n".join(parts) + "\n"


def _area(area: str, specs: Iterable[MetricSpec]) -> Iterator[str]:
    yield f"## `{area}`"
    yield _AREAS[area]
    rows = [[f"`{spec.key}`", _cell(spec.meaning), _cell(spec.unit), _BETTER[spec.better]] for spec in specs]
    yield table(["metric", "meaning", "unit", "better"], rows, "llll")


def _cell(words: str) -> str:
    """Our own words, which may hold Markdown, as one cell; readable in the source too."""
    return words.replace("|", "\\|").replace("<", "&lt;")


def pages(root: Path) -> dict[Path, str]:
    """The pages by their path under the repository root."""
    from coordexp.reporting.memory_tables import one_device_table, sharded_table  # loads transformers

    stages = read_yaml(root / "dvc.yaml")["stages"]
    readme = with_results((root / README).read_text(encoding="utf-8"), results_table(SHOWN_PROFILE, root))
    written = {PARAMETERS_PAGE: parameters_markdown(stages), METRICS_PAGE: metrics_markdown(), README: readme}
    for page, block in ((PRODUCTION_PAGE, one_device_table()), (SCALING_PAGE, sharded_table())):
        text = (root / page).read_text(encoding="utf-8")
        written[page] = with_block(text, BEGIN_MEMORY, END_MEMORY, block, str(page))
    return written


def main() -> None:
    """Rewrite the pages and the picture in the working directory."""
    for path, text in pages(Path()).items():
        write_text(path, text)
        print(path)
    write_bytes(PICTURE, shown_picture(SHOWN_PROFILE, Path()))
    print(PICTURE)


if __name__ == "__main__":
    main()
