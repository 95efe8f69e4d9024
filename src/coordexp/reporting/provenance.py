"""Where the numbers come from: commits, parameters, data, hardware, time; and what an experiment changed.

Inside `dvc exp run`, DVC names the commit that it started from in DVC_EXP_BASELINE_REV; outside of an experiment there
is no baseline.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.schema import Params
from coordexp.reporting.inputs import TRAINED, Baseline, Json, ReportData, metric, required
from coordexp.reporting.markdown import MISSING, escape, flatten, number, signed, table


def what_ran(data: ReportData) -> str:
    """One line: profile, commit, seed, data, time."""
    params, metadata = data.run.params, data.metadata
    git = required(metadata["stage2"], "git", "stage2/run_metadata.json")
    n_images, n_objects = (metric(data.metrics, "stage2", key) for key in ("coco.n_images", "coco.n_gt"))
    commit = str(git["commit"])[:12] if git["commit"] else "unknown"
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[git["dirty"]]
    seconds = ", ".join(f"{name} {wall_seconds(metadata[name]):.0f} s" for name in TRAINED)
    return (
        f"Profile `{params.profile}`, commit `{commit}` ({state}), seed {params.seed}, codec `{params.text.codec}`; "
        f"{n_images} images with {n_objects} objects evaluated. Training: {seconds}."
    )


def wall_seconds(metadata: Json) -> float:
    """Wall time of one training stage; raises DataError if it was not written."""
    return float(required(metadata, "wall_seconds", "run_metadata.json"))


def runs_table(metadata: Mapping[str, Json]) -> str:
    """Every leaf of the runs' metadata but their settings, one column per training stage."""
    leaves = {name: {k: v for k, v in flatten(metadata[name]) if not k.startswith("settings.")} for name in TRAINED}
    fields = list(dict.fromkeys(key for name in TRAINED for key in leaves[name]))
    rows = [[f"`{key}`", *(_leaf(leaves[name].get(key)) for name in TRAINED)] for key in fields]
    return table(["field", *TRAINED], rows, "l" * (1 + len(TRAINED)))


def _leaf(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else escape(number(value))


def decode_table(decodes: Mapping[str, Json]) -> str:
    """How each checkpoint was decoded, and what it cost."""
    fields = ("codec", "images", "tokens", "seconds")
    rows = [
        [name, *(_leaf(required(decodes[name], field, f"{name}/decode.json")) for field in fields)]
        for name in CHECKPOINTS
    ]
    return table(["decoding of", *fields], rows)


def weights_table(params: Params) -> str:
    """Weights of the objective, every key that ends in `_weight`: stage 1 (and the control) beside stage 2."""
    leaves = [(key.split("."), value) for key, value in flatten(params.model_dump()) if key.endswith("_weight")]
    stage1 = {key[-1]: f"{value:g}" for key, value in leaves if key[0] == "stage1"}
    stage2 = {key[-1]: f"{value:g}" for key, value in leaves if key[0] != "stage1"}
    rows = [[f"`{key}`", stage1.get(key, MISSING), value] for key, value in stage2.items()]
    return table(["weight", "stage1, stage1-control", "stage2"], rows)


def params_table(params: Params) -> str:
    """All parameters of the run."""
    rows = [[f"`{key}`", _leaf(value)] for key, value in flatten(params.model_dump())]
    return table(["parameter", "value"], rows, "ll")


REVISION_VARIABLE = "DVC_EXP_BASELINE_REV"
_UNSEEN = object()


def experiment_baseline(profile: str) -> Baseline | None:
    """The baseline of the experiment that this process runs in; None outside of an experiment."""
    revision = os.environ.get(REVISION_VARIABLE, "")
    params = _tracked(revision, "params.yaml")
    if not revision or params is None:
        return None
    config, headline = f"configs/{profile}.yaml", _tracked(revision, f"reports/{profile}/headline.json")
    yaml = YAML(typ="safe")
    settings = yaml.load(params) | {config: yaml.load(_tracked(revision, config) or "{}")}
    now = {config: yaml.load(Path(config))}
    return Baseline(revision, settings, json.loads(headline) if headline else {}, now)


def _tracked(revision: str, path: str) -> str | None:
    done = subprocess.run(["git", "show", f"{revision}:{path}"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def settings_delta(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, baseline value, present value of every leaf that differs; a missing side is None."""
    new, old = dict(flatten(dict(now))), dict(flatten(dict(then)))
    keys = dict.fromkeys([*new, *old])
    return [(k, old.get(k), new.get(k)) for k in keys if new.get(k, _UNSEEN) != old.get(k, _UNSEEN)]


def baseline_markdown(baseline: Baseline | None, settings: Mapping[str, Any], headline: Mapping[str, Any]) -> str:
    """What differs from the baseline in parameters and headline numbers; says so where there is no baseline."""
    if baseline is None:
        return (
            "This run is a baseline itself, no experiment (`dvc exp run`), so there is nothing that it changed. "
            "All its parameters are in section 10."
        )
    changed = [
        [f"`{key}`", _value(old), _value(new)]
        for key, old, new in settings_delta({**settings, **baseline.profile}, baseline.settings)
        if key != "profile"
    ]
    moved = []
    for key, old, new in settings_delta(headline, baseline.headline):
        both = isinstance(old, int | float) and isinstance(new, int | float)
        moved.append([f"`{key}`", number(old), number(new), signed(float(new - old)) if both else ""])
    parts = [f"An experiment on commit `{baseline.revision[:12]}`."]
    parts.append(table(["parameter", "baseline", "here"], changed) if changed else "No parameter differs.")
    if moved:
        parts += [table(["headline number", "baseline", "here", "change"], moved)]
        parts += ["Whether a change is more than noise: `coordexp ab`, or `coordexp compare` of the two answer files."]
    elif baseline.headline:
        parts.append("No headline number differs.")
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    return MISSING if value is None else escape(f"{value:g}" if isinstance(value, float) else str(value))
