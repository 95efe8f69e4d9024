"""The result of an experiment: its changes, its baseline, the paired difference, a verdict, and the cost.

The predictions of the baseline are not an input of the stage graph. The comparison therefore runs outside the graph,
on files that it takes from DVC's cache by revision.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coordexp.config.question import METRICS, PRIMARY, TRAINED
from coordexp.errors import CoordExpError, DataError
from coordexp.evaluation.effect import Verdict
from coordexp.evaluation.evaluator import rounded
from coordexp.experiments.dependencies import Change, changes
from coordexp.experiments.plan import seed_keys
from coordexp.experiments.progress import duration
from coordexp.experiments.report import measured, verdict_sentence
from coordexp.experiments.runs import KEPT, WORKSPACE, Experiment, Repository
from coordexp.experiments.sides import effect_row, evaluate_revision, has, tokens_trained
from coordexp.infra.code_hash import code_hash
from coordexp.infra.files import write_text
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import write_json
from coordexp.inputs import CODE
from coordexp.reporting.markdown import escape, number, table

KEPT_ANSWER = Gate("a stored comparison of two runs", DataError, "Delete it, and compare again.")
REPORTS = Path("reports/experiments")
NEXT_STEPS = (
    "`dvc exp apply {name}` puts its parameters and results into the workspace, ready to commit; `git restore --staged "
    "--worktree . && dvc checkout --force` undoes this. `dvc exp branch {name} BRANCH` keeps the experiment as a "
    "branch; `dvc exp remove {name}` deletes it. `coordexp compare {baseline} {name}` writes this page again."
)
Answer = Mapping[str, Any]  # the JSON of one comparison


def answer(repository: Repository, new: Experiment, old: Experiment, checkpoint: str) -> Answer:
    """The comparison of two revisions; a stored one is reused.

    Raises:
        ConfigError: the parameters of a revision are not valid in this version.
        DataError: files of a revision are not available.
    """
    if WORKSPACE in (new.revision, old.revision):
        return _answer(repository, new, old, checkpoint)
    name = f"{checkpoint}-against-{old.revision}-{code_hash(__name__)}.json"
    file = repository.root / KEPT / new.revision / name
    if not file.is_file():
        repository.say(f"{new.name}: comparing with {old.name}")
        write_json(file, _answer(repository, new, old, checkpoint))
    kept = KEPT_ANSWER.read_object(file)
    names = {"name": new.name, "baseline": old.name}
    return kept | names | {"effect": kept["effect"] | {"arm": new.name, "baseline": old.name}}


def _answer(repository: Repository, new: Experiment, old: Experiment, checkpoint: str) -> Answer:
    draws, params = repository.params(old.revision), repository.params(new.revision)
    found = differences(repository, new, old)
    ours, theirs = (
        evaluate_revision(repository, one.revision, checkpoint, judged, draws)
        for one, judged in ((new, params), (old, draws))
    )
    note = ""
    try:
        effect = effect_row(new.name, old.name, {new.name: ours}, {old.name: theirs})
    except DataError as error:  # the images or their annotations differ
        note = str(error)
        undefined = {key: {"verdict": Verdict.UNDEFINED.value} for key in METRICS}
        effect = {"arm": new.name, "baseline": old.name, "faults": {}, "metrics": undefined}
    return {
        "name": new.name,
        "revision": new.revision,
        "is_experiment": repository.is_taken(new.name),
        "baseline": old.name,
        "baseline_revision": old.revision,
        "profile": params.profile,
        "checkpoint": checkpoint,
        "seeds": 1,
        "seed_keys": seed_keys({stage for change in found for stage in change.stages}),
        "n_images": ours.table.n_images,
        "changes": [asdict(change) for change in found],
        "effect": rounded(effect),
        "note": note,
        "values": rounded(
            {key: [side.value(key) if has(side, key) else None for side in (ours, theirs)] for key in METRICS}
        ),
        "runs": [
            {"arm": one.name, "tokens": tokens_trained(repository, one.revision, params.profile, checkpoint)}
            for one in ((new, old) if checkpoint in TRAINED else ())
        ],
        "cost": {"stages": repository.seconds(new.revision)},
    }


def differences(repository: Repository, new: Experiment, old: Experiment) -> list[Change]:
    """The parameters and code in which two runs differ."""
    return changes(repository.past(old.revision), repository.past(new.revision))


def what_changed(found: Answer) -> str:
    """The changes on one line."""
    return ", ".join(str(Change(**row)) for row in found["changes"]) or "no parameter or code of a stage"


def sentence(found: Answer) -> str:
    """The verdict in words."""
    text = verdict_sentence(found["effect"], found)
    return f"{text[:-1]}: {found['note']}" if found["note"] else text


def recommendation(found: Answer) -> str:
    """What to do with the experiment; with one seed, a decision that depends on training noise needs a repetition."""
    again = _repetition(found)
    apply, remove = (
        f" (`dvc exp {verb} {found['name']}`{then})" if found["is_experiment"] else ""
        for verb, then in (("apply", ", then commit"), ("remove", ""))
    )
    match Verdict(found["effect"]["metrics"][PRIMARY]["verdict"]):
        case Verdict.BETTER:
            return f"Keep the change{apply}{f' if {again} confirms it' if again else ''}."
        case Verdict.WORSE:
            return f"Discard the change{remove}."
        case Verdict.NO_DIFFERENCE:
            return f"Keep the present parameters{f'; {again} can detect smaller differences' if again else ''}."
        case Verdict.IDENTICAL:
            return f"Discard the change{remove}: it has no effect on val."
        case Verdict.NOT_JUDGED:
            return "Fix the answers first: if answers are truncated or loop, scores do not measure detection quality."
        case Verdict.UNDEFINED:
            return "Compare two runs that were evaluated on the same images and annotations."


def _repetition(found: Answer) -> str:
    """The command that repeats the comparison with other training seeds; empty if the change affects no training."""
    if not found["seed_keys"]:
        return ""
    values = [f"{row['key']}={_text(row['new'])}" for row in found["changes"] if row["key"] != CODE]
    if not values or any("," in value for value in values):  # a comma separates the arms of `coordexp ab`
        return "a repetition with other seeds"
    return f"`coordexp ab {' '.join(f'-S {shlex.quote(value)}' for value in values)} --seeds 3`"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def cost_words(found: Answer) -> str:
    """The time of the stages that ran for the experiment."""
    stages = found["cost"]["stages"]
    shown = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in stages.items())
    return f"{duration(sum(stages.values()))} ({shown})" if stages else "not measured here"


def summary(found: Answer) -> list[str]:
    """The lines for a terminal, verdict first."""
    return [
        sentence(found),
        f"changed: {what_changed(found)}",
        f"recommendation: {recommendation(found)}",
        f"cost: {cost_words(found)}",
    ]


def write_answer(found: Answer, root: Path) -> Path:
    """Write `reports/experiments/<name>.md`; returns its path."""
    path = root / REPORTS / f"{found['name']}.md"
    write_text(path, answer_markdown(found))
    return path


def answer_markdown(found: Answer) -> str:
    """The whole page; all of its numbers are from `found`."""
    parts = [
        f"# {escape(what_changed(found))}",
        sentence(found),
        f"**Recommendation.** {recommendation(found)}",
        f"**Cost.** {cost_words(found)}.{_tokens(found)}",
        f"Profile `{found['profile']}`, checkpoint `{found['checkpoint']}` on val, `{found['revision'][:12]}` against "
        f"`{found['baseline_revision'][:12]}`. The verdict depends only on `{PRIMARY}` and its 95 % interval over "
        "images (paired bootstrap); the other metrics are context.",
        "## What changed",
        _changes_table(found),
        "## Metrics",
        _metrics_table(found),
    ]
    if found["is_experiment"]:
        parts += ["## Keep or undo", NEXT_STEPS.format(name=found["name"], baseline=found["baseline"])]
    return "\n\n".join(parts) + "\n"


def _tokens(found: Answer) -> str:
    runs = [f"`{run['arm']}` {run['tokens']:,}" for run in found["runs"]]
    return f" Training tokens of `{found['checkpoint']}`: {', '.join(runs)}." if runs else ""


def _changes_table(found: Answer) -> str:
    rows = [
        [
            f"`{row['key']}`",
            *("other" if row["key"] == CODE else escape(_text(row[side])) for side in ("old", "new")),
            ", ".join(row["stages"]),
        ]
        for row in found["changes"]
    ]
    return table(["parameter or code", f"`{found['baseline']}`", f"`{found['name']}`", "stages"], rows, "lrrl")


def _metrics_table(found: Answer) -> str:
    rows = []
    for key in METRICS:
        effect = found["effect"]["metrics"][key]
        rows.append([f"`{key}`", *map(number, found["values"][key]), measured(effect)])
    return table(["metric", f"`{found['name']}`", f"`{found['baseline']}`", "difference, 95 % interval"], rows)


COLUMNS = {"experiment": 19, "changed": 17, "mAP, 95% interval": 22, "verdict": 9, "cost": 5, "age": 3}  # 80 together
_SHORT = {
    Verdict.NO_DIFFERENCE.value: "no diff.",
    Verdict.IDENTICAL.value: "identical",
    Verdict.UNDEFINED.value: "undefined",
    Verdict.NOT_JUDGED.value: "unsound",
}


def experiment_row(repository: Repository, one: Experiment, checkpoint: str, now: float) -> list[str]:
    """An experiment compared with the commit that it started from, as a row of `COLUMNS`."""
    seconds, age = repository.seconds(one.revision), _age(now - one.unix_seconds)
    cost = duration(sum(seconds.values())) if seconds else "?"
    start = Experiment(repository.short_name(one.start), one.start)
    try:
        found = answer(repository, one, start, checkpoint)
    except CoordExpError:  # its files are not in the local cache, or its parameters are from another version
        return [one.name, ", ".join(map(_short_change, differences(repository, one, start))), "", "no files", cost, age]
    changed = ", ".join(_short_change(Change(**row)) for row in found["changes"])
    effect = found["effect"]["metrics"][PRIMARY]
    shown = ""
    if "delta" in effect:
        shown = f"{_short(effect['delta'])} [{_short(effect['lo'])},{_short(effect['hi'])}]"
    return [one.name, changed, shown, _SHORT.get(effect["verdict"], effect["verdict"]), cost, age]


def experiments_table(rows: Sequence[Sequence[str]], width: int) -> str:
    """The rows with their header; names and changes are shortened to a terminal of `width` columns."""
    extra = max(0, width - 80) // 2
    widths = [given + extra if name in ("experiment", "changed") else given for name, given in COLUMNS.items()]
    lines = [
        " ".join(_cut(cell, given).ljust(given) for cell, given in zip(line, widths, strict=True))
        for line in [[*COLUMNS], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _short_change(change: Change) -> str:
    """A change with only the last part of its key."""
    if change.key == CODE:
        return str(change)
    return f"{change.key.rpartition('.')[2]}={_text(change.new)}"


def _cut(text: str, width: int) -> str:
    """Shorten a text in the middle, because names and changes often differ at their ends."""
    half = (width - 2) // 2
    return text if len(text) <= width else f"{text[:half]}..{text[len(text) - (width - 2 - half) :]}"


def _short(value: float) -> str:
    return f"{value:+.4f}".replace("0.", ".", 1)


def _age(seconds: float) -> str:
    minutes = max(0, seconds) / 60
    for unit, length in (("w", 7 * 24 * 60), ("d", 24 * 60), ("h", 60)):
        if minutes >= (100 * 24 * 60 if unit == "w" else length):
            return f"{int(minutes // length)}{unit}"
    return f"{int(minutes)}m"
