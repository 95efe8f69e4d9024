"""The reference pages docs/parameters.md and docs/metrics.md, written from the code that checks and computes.

    python -m coordexp.reporting.reference        # from the repository root

rewrites both, the tables of memory and hours in docs/production.md and docs/scaling.md, the list of questions in
reports/answers, and the results in README. The results come from the run in the working tree; without its outputs
README stays as it is. No page contains a value of params.yaml, so that an experiment that changes one does not make the
documents wrong.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordexp.config.block import Block, FieldSpec, block_kinds, field_specs, nested_block
from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.question import UNASKED
from coordexp.config.removed import REMOVED
from coordexp.config.schema import Params
from coordexp.errors import DataError
from coordexp.evaluation.protocol import STANDARD
from coordexp.evaluation.registry import MetricSpec, metric_specs, view
from coordexp.evaluation.table import BAD_INPUT
from coordexp.infra.files import write_text
from coordexp.inputs import (
    PARAMS_FILE,
    PROFILE_FILE,
    Declaration,
    StagePlan,
    declarations,
    declared_as,
    following,
    stage_plans,
)
from coordexp.reporting.gpu_tables import hours_table, measured, one_device_table, sharded_table
from coordexp.reporting.inputs import Metrics, bounds_of, metric, metrics_frame, read_json
from coordexp.reporting.markdown import number, table, with_interval
from coordexp.reporting.questions import INDEX, index_markdown
from coordexp.reporting.training import MEANINGS, SHAPES

PARAMETERS_PAGE, METRICS_PAGE, README = Path("docs/parameters.md"), Path("docs/metrics.md"), Path("README.md")
PRODUCTION_PAGE, SCALING_PAGE = Path("docs/production.md"), Path("docs/scaling.md")
BEGIN_MEMORY = "<!-- memory: written by `python -m coordexp.reporting.reference` -->"
END_MEMORY = "<!-- end of memory -->"
BEGIN_HOURS = "<!-- hours: written by `python -m coordexp.reporting.reference` -->"
END_HOURS = "<!-- end of hours -->"
SHOWN_PROFILE = "tiny"
BEGIN = "<!-- results: written by `python -m coordexp.reporting.reference` -->"
END = "<!-- end of results -->"
GENERATED = "<!-- Written by `python -m coordexp.reporting.reference`; a test fails when it is stale. -->"

_TIERS = {
    "seen": "categories seen in training",
    "phrase": "unseen in text",
    "strict": "unseen in text and images",
}

_PARAMETERS_INTRO = """\
Experiments vary `params.yaml`. A profile, `configs/<profile>.yaml`, sets data, model, and sizes. Every key must be
present, except a few keys of a profile that have a default, so the two files describe a run completely. The first
stage, `check`, stops at an unknown key, a value of another type, or a value out of range, before anything runs or is
removed. The message names the full key.

`dvc exp run -S softce_weight=0.2` sets a key of `params.yaml` for one run, and
`-S configs/tiny.yaml:stage1.steps=600` a key of a profile. Both files have blocks `stage1` and `stage2`, with
different keys. `make preset PRESET=mixture` runs a preset of `configs/presets/` (`mixture`, `note_a_only`, `pure_ce`,
`raw_digits`, `seed`). [concepts.md](concepts.md) defines what the terms compute.

A profile may set only what differs from another profile: `extends: coco-qwen3vl-4b`, or `extends: base/qwen3vl` for
`configs/base/qwen3vl.yaml`, which may be incomplete. Blocks merge, key by key. Lists, `source.sets`, `model.files`, and
a `source` of another `kind` are not merged: the last file that sets them wins.

"Read by" lists the stages that a changed value reruns, as `pipelines/inputs.yaml` declares. Of the stages under "then",
each reruns whose inputs changed. `decode` stands for `decode@base` to `decode@stage2`; `check` always runs.
`profile` is part of every command and path. `model.path` is only the place of the model files; pins identify them."""

_UNASKED = """\
Every other key of `params.yaml`, and every choice of a key with choices, is in an arm of a question of
`configs/questions/` (`coordexp answer --list`). The start of a schedule (`anneal.temperature_from`,
`stage2.gate_from`, `stage2.lambda_sem_from`) acts only while its fraction is above 0: the arm that sets the fraction
tries it at its value."""

_TERMS = """\
In the order of the loss, which is the sum of weight * (sum over slots or boxes) / (their count in the whole step). A
term with weight 0 is not computed, except box terms, which are always logged. Stage 1 uses `text_ce` with weight 1 and
only the terms that have a key in its block."""

_METRICS_INTRO = """\
`runs/<profile>/eval/metrics.json` holds `<checkpoint>.eval.<area>.<metric>` for the checkpoints `base`, `stage1`,
`stage1-control`, and `stage2`, rounded to four digits. A metric that is undefined on the data (no object of that kind,
no prediction) is `null`, never 0. Two digits at the end of a name are an IoU threshold: `full_50` is at IoU .50.
[concepts.md](concepts.md) defines how predictions are matched.

`dvc metrics show` and `dvc metrics diff` read `reports/<profile>/headline.json`, a subset under the same keys:
{headline} of each trained checkpoint, and `comparison.stage2_vs_control.coco.mAP` with its interval. To compare all of
metrics.json between two revisions, run `dvc metrics diff HEAD --targets runs/<profile>/eval/metrics.json`; with
intervals, `coordexp compare`."""

_COMPARISON = """\
At the top level of `metrics.json`: `comparison.<pair>.<metric>` for {metrics}. Each holds `delta` (first minus second),
`lo` and `hi` (95 % interval of the paired bootstrap), and `p_superior` (fraction of resamples in which the first is
better; ties count half)."""

_LOGS = """\
`train_log.jsonl`, next to each trained checkpoint, holds one JSON object per step:

- `step`, `tokens`, `samples`, `lr` (the peak rate times the schedule), `grad_norm` (before clipping);
- `loss/total`, `loss/<term>` (weighted), `raw/<term>` (unweighted), and `loss/coord_reg` (the sum of the weighted
  coordinate terms). A term is named like its weight: `loss/w1` has `w1_weight`. Box terms are logged as `raw/bbox_*`
  even if their weight is 0;
- with several forwards in channel A, `loss/a1_*` for the terms of the first forward;
- in stage 2, `channel`; in steps of channel B also `stage2_ab/*_total`, counts of what matching found, and
  `rollout/*_tokens`, what fresh rollouts read and wrote;
- with `grad_monitor_every`, `grad/<term>_norm`, the gradient norm of a weighted term over all trained parameters, and
  `grad/<term>_cos_text`, its cosine with the gradient of `text_ce`;
- `coord_diag/*`, the diagnostics below, over the supervised coordinate slots of all micro-batches and processes of the
  step, 90th percentiles included. With several forwards in channel A, `coord_diag/*` is for the last one and
  `coord_diag_a1/*` for the first.

While a stage runs, its log in `.resume/` also has `time/step_s` and, in stage 1, `time/wait_s`, the time that processes
waited for their batches (a sum over processes). Their sums are in `runs/<profile>/<stage>.run.json`.

`monitor.jsonl`, in the same folder, holds one object per call of the eval callback (`monitor.every_steps`), always on
the same few dev images: `step`, `images`, `objects`, `predictions`, `right` (true positives: box at IoU .50 and name),
`false` (false positives), `missed` (false negatives), `precision`, `recall`, `f1`, `f1_boxes` (class-agnostic),
`matched_iou_mean`, `dup_pairs_90`, `parse_rate`, `truncated`, `tokens_mean`. Its matching is that of training, not that
of the evaluation.

`context_errors.jsonl` holds one object per image and call. The weights of that step read each image in a forward of its
own (`training/context_errors.py`). The object has `step`, `image_id`, `text_ce` (nats, a sum) and `text_tokens` of the
annotated answer, and for each annotated object the mean of |E[k] - y| over the four coordinates, in bins. The contexts
are: `A1`, the annotated answer; `A2` and higher, the soft self-context, if channel A has several forwards (stage 1 and
the control do not have it); and `own`, the model's own greedy answer, null where no prediction locates the object. Its
`coord_diag` holds, for `A1`, `A2`, and higher, means of the diagnostics below over the image's coordinate slots. The
readings `coord.*` of questions are their means over dev in the context `A1`."""

_AREAS = {
    "coco": "COCO average precision and recall (`evaluation/coco.py`).",
    "lvis": "Only with LVIS labels: a run on one `lvis` set, `coordexp evaluate --annotations` (`evaluation/lvis.py`).",
    "known": "COCO AP over the categories seen in training.",
    "held_out": "COCO AP over the categories that are in no training split.",
    "vocabulary": (
        "Only with probes (prompt `mixed`): COCO AP by tier (how a category is held out, `records/categories.py`) and "
        "by prompt, names chosen over rivals, and refusals (`evaluation/vocabulary.py`)."
    ),
    "vocabulary_blind": "The blind control of `vocabulary`: the same metrics for predictions shuffled across images.",
    "f1": "One-to-one matching by decreasing IoU; names are ignored when pairing (`evaluation/f1.py`).",
    "protocol": (
        "Oracle classes (only predictions of classes that are annotated in the image), and the gap to the full "
        "vocabulary (`evaluation/matched.py`)."
    ),
    "rollout": "The matching rule of training, reported separately (`evaluation/training_matching.py`).",
    "parse": "What the strict parser kept and dropped (`evaluation/parse.py`; `text/parser.py` lists the reasons).",
    "input": "How predicted names were mapped, and unusual input that is still evaluated (`evaluation/table.py`).",
    "set": "How the answer behaves as a set (`evaluation/set_behaviour.py`).",
    "guarded": (
        "Headline metrics and set behavior after NMS: of boxes with the same name that overlap by the lowest duplicate "
        "IoU, the first is kept (`evaluation/matched.py`)."
    ),
    "confidence": "How informative the scores are (`evaluation/confidence.py`).",
    "errors": "Why predictions are incorrect, and the cost of each error, after TIDE (`evaluation/error_causes.py`).",
    "blind": "Answers that do not depend on the image (`evaluation/blind.py`). A checkpoint must exceed them.",
    "interval": "Bootstrap over images (`evaluation/bootstrap.py`).",
}
_BETTER = {"higher": "higher", "lower": "lower", "neither": ""}


@dataclass(frozen=True, slots=True)
class Graph:
    """Which parameters each stage reads, and the order of the stages."""

    declarations: Sequence[Declaration]
    plans: Mapping[str, StagePlan]

    def touched(self, file: str, key: str) -> tuple[list[str], list[str]]:
        """The stages that read a key, and those that come after them."""
        readers = {stage.stage for stage in self.declarations if stage.reads(file, key)}
        direct = [name for name in self.plans if declared_as(name) in readers]
        return direct, following(self.plans, direct)


def parameters_markdown(graph: Graph) -> str:
    """The page of all parameters: what each means and accepts, and which stages rerun when it changes."""
    removed = [[f"`{key}`", _cell(remedy)] for key, remedy in REMOVED.items()]
    parts = [
        "# Parameters",
        GENERATED,
        _PARAMETERS_INTRO,
        *_blocks(Params, PARAMS_FILE, graph),
        *_blocks(Profile, PROFILE_FILE, graph),
        "## Keys that no question varies",
        _UNASKED,
        table(["key", "reason"], [[f"`{key}`", _cell(why)] for key, why in UNASKED.items()], "ll"),
        "## Terms of the loss",
        _TERMS,
        terms_table(),
        "## Removed keys",
        "Keys of earlier designs are refused, with a remedy.",
        table(["key", "remedy"], removed, "ll"),
    ]
    return "\n\n".join(parts) + "\n"


def terms_table() -> str:
    """Every registered term: its weight, where it is computed, its function, and its meaning."""
    from coordexp.losses.terms import TERMS  # loads torch, which the commands that import this module do without

    specs = {spec.key.split(".")[-1]: spec for spec in field_specs(Params) if not spec.key.startswith("stage1.")}
    rows = []
    for name, term in TERMS.items():
        spec = specs[f"{name}_weight"]
        file = term.function.__module__.removeprefix("coordexp.").replace(".", "/")
        place = f"`{file}.py:{term.function.__name__}`"
        rows.append([f"`{name}`", f"`{spec.key}`", term.place.replace("_", " "), place, _cell(spec.description)])
    return table(["term", "weight", "computed at", "function", "meaning"], rows, "lllll")


def _blocks(root: type[Block], file: str, graph: Graph) -> Iterator[str]:
    """The section of one file: a table of its top level, if that holds values, and one for each block."""
    yield f"## `{file.replace('${profile}', '<profile>')}`"
    if top := [spec for spec in field_specs(root) if "." not in spec.key]:
        yield _parameter_table(top, file, graph)
    for name, field in root.model_fields.items():
        inner = nested_block(field)
        titled = {f"`{name}`": inner} if inner else {}
        titled |= {f"`{name}` with `{field.discriminator}: {kind}`": b for kind, b in block_kinds(field).items()}
        for title, block in titled.items():
            yield f"### {title}"
            yield inspect.getdoc(block) or ""
            yield _parameter_table(field_specs(block, f"{name}."), file, graph)


def _parameter_table(specs: Iterable[FieldSpec], file: str, graph: Graph) -> str:
    rows = []
    for spec in specs:
        readers, after = (", ".join(_families(stages, graph.plans)) for stages in graph.touched(file, spec.key))
        rows.append([f"`{spec.key}`", _cell(spec.description), _cell(spec.expected), readers, after])
    return table(["key", "meaning", "accepts", "read by", "then"], rows, "lllll")


def _families(stages: Sequence[str], plans: Iterable[str]) -> list[str]:
    """Names of stages, those of a whole `foreach` as one."""
    whole = {declared_as(name) for name in plans} - {declared_as(name) for name in plans if name not in stages}
    return list(dict.fromkeys(declared_as(name) if declared_as(name) in whole else name for name in stages))


def metrics_markdown() -> str:
    """The page of all metrics and logged diagnostics; thresholds in names are those of params.yaml."""
    by_area: dict[str, list[MetricSpec]] = {area: [] for area in _AREAS}
    for spec in metric_specs(STANDARD, lvis=True, vocabulary=True).values():
        by_area[spec.key.split(".")[0]].append(spec)
    logged = {**MEANINGS, "coord_tokens": "number of these slots"}
    diagnostics = [[f"`coord_diag/{name}`", _cell(words)] for name, words in logged.items()]
    parts = [
        "# Metrics",
        GENERATED,
        _METRICS_INTRO.format(headline=", ".join(f"`{key}`" for key in view("headline", STANDARD))),
        *(part for area, area_specs in by_area.items() for part in _area(area, area_specs)),
        "## `comparison`",
        _COMPARISON.format(metrics=", ".join(f"`{key}`" for key in view("compared", STANDARD))),
        "## Bad input",
        "`evaluation/table.py` decides: input that would make a number wrong is an error, with exit code 2 and a "
        "message that names the place; input that a model may well generate is counted.",
        table(["input", "outcome", "why"], [[_cell(b.what), _cell(b.outcome), _cell(b.why)] for b in BAD_INPUT], "lll"),
        "## Training logs",
        _LOGS,
        table(["diagnostic", "meaning"], diagnostics, "ll"),
        "Only in `context_errors.jsonl`, on dev images (`losses/coord_terms.py:distribution_shape`):",
        table(["diagnostic", "meaning"], [[f"`{name}`", _cell(words)] for name, words in SHAPES.items()], "ll"),
    ]
    return "\n\n".join(parts) + "\n"


def _area(area: str, specs: Iterable[MetricSpec]) -> Iterator[str]:
    yield f"## `{area}`"
    yield _AREAS[area]
    rows = [[f"`{spec.key}`", _cell(spec.meaning), _cell(spec.unit), _BETTER[spec.better]] for spec in specs]
    yield table(["metric", "meaning", "unit", "better"], rows, "llll")


def _cell(words: str) -> str:
    """Text of the repository, which may contain Markdown, as one cell; readable in the source too."""
    return words.replace("|", "\\|").replace("<", "&lt;")


def results(profile: str, root: Path) -> str | None:
    """Tables of a run: metrics by checkpoint, and AP by how categories are held out. None without its outputs."""
    path = ProfilePaths(profile, root).metrics
    if not path.is_file():
        return None
    found = read_json(path, "coco-eval")
    metrics = metrics_frame({name: found[name]["eval"] for name in CHECKPOINTS})
    return f"{_results_table(metrics)}\n\n{_names_table(metrics)}"


def _results_table(metrics: Metrics) -> str:
    """A row for each checkpoint; mAP with its 95 % interval."""
    keys, specs = view("readme", STANDARD), metric_specs(STANDARD)
    rows = []
    for name in CHECKPOINTS:
        first, *others = (metric(metrics, name, key) for key in keys)
        rows.append([name, with_interval(first, bounds_of(metrics, name, keys[0])), *map(number, others)])
    return table(["val", *(specs[key].name for key in keys)], rows)


def _names_table(metrics: Metrics) -> str:
    """AP at IoU .50 of the last checkpoint with its 95 % interval: a row per tier, a column per prompt."""
    name, rows = CHECKPOINTS[-1], []
    for tier, meaning in _TIERS.items():
        keys = [f"vocabulary{area}_{tier}_AP50" for area in (".everything", ".list", "_blind.list")]
        rows.append([meaning, *(with_interval(metric(metrics, name, k), bounds_of(metrics, name, k)) for k in keys)])
    head = [
        f"AP50 of {name}",
        "prompted for all objects",
        "prompted with a list",
        "with a list, blind control (predictions shuffled across images)",
    ]
    return table(head, rows)


def with_block(page: str, begin: str, end: str, block: str, name: str) -> str:
    """A page with the text between two markers replaced; raises DataError unless each marker is there once."""
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise DataError(f"{name}: expected one block between {begin!r} and {end!r}.")
    return pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", page)


def pages(root: Path) -> dict[Path, str]:
    """The pages by their path under the repository root."""
    readme, shown = (root / README).read_text(encoding="utf-8"), results(SHOWN_PROFILE, root)
    written = {
        PARAMETERS_PAGE: parameters_markdown(Graph(declarations(root), stage_plans(root, SHOWN_PROFILE))),
        METRICS_PAGE: metrics_markdown(),
        README: with_block(readme, BEGIN, END, shown, str(README)) if shown else readme,
    }
    figures = measured(root)
    production, scaling = ((root / page).read_text(encoding="utf-8") for page in (PRODUCTION_PAGE, SCALING_PAGE))
    production = with_block(production, BEGIN_MEMORY, END_MEMORY, one_device_table(figures), str(PRODUCTION_PAGE))
    hours = hours_table(root, figures)
    written[PRODUCTION_PAGE] = with_block(production, BEGIN_HOURS, END_HOURS, hours, str(PRODUCTION_PAGE))
    written[SCALING_PAGE] = with_block(scaling, BEGIN_MEMORY, END_MEMORY, sharded_table(), str(SCALING_PAGE))
    return written | {INDEX: index_markdown(root)}


def main() -> None:
    """Rewrite the pages in the working directory."""
    for path, text in pages(Path()).items():
        write_text(path, text)
        print(path)


if __name__ == "__main__":
    main()
