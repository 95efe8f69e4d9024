"""What an experiment changed: its parameters and headline numbers beside those of the commit it started from.

Inside `dvc exp run`, DVC names that commit in DVC_EXP_BASELINE_REV; outside of an experiment there is no baseline.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from coordexp.reporting.markdown import MISSING, escape, flatten, number, signed, table

REVISION_VARIABLE = "DVC_EXP_BASELINE_REV"
_UNSEEN = object()


@dataclass(frozen=True, slots=True)
class Baseline:
    """The commit that an experiment started from, as far as it holds the files."""

    revision: str
    settings: Mapping[str, Any]  # params.yaml and, under its file name, the profile
    headline: Mapping[str, Any]  # reports/<profile>/headline.json; empty if it was not made then
    profile: Mapping[str, Any] = field(default_factory=dict)  # the profile as it is now, under its file name


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
