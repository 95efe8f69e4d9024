"""The origin of the numbers: parameters, data, inputs; and what an experiment changed.

The content of a report does not depend on where or when it is made. Commit, time, machine and cost of the last run of a
stage are in its run record, which only the browsing page shows.

Inside `dvc exp run`, DVC sets DVC_EXP_BASELINE_REV to the commit that the experiment started from; outside of an
experiment there is no baseline.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordexp.config.loading import parse_yaml, read_yaml
from coordexp.config.paths import CHECKPOINTS, DECODE_SUMMARY, ProfilePaths
from coordexp.config.schema import Params
from coordexp.infra import BASELINE_VARIABLE, EXPERIMENT_VARIABLE
from coordexp.infra.provenance import git
from coordexp.reporting.inputs import TRAINED, Baseline, Json, ReportData, metric, read_json, required
from coordexp.reporting.markdown import MISSING, escape, flatten, number, table

RUN_RECORD = ".run.json"
_OF_A_RUN = ("steps", "samples", "tokens", "refresh_prompt_tokens", "refresh_generated_tokens", "final_loss")
_HASHES = ("inputs", "files")


def what_ran(data: ReportData) -> str:
    """One line: profile, seed, data, and the amount of training."""
    params = data.run.params
    n_images, n_objects = (metric(data.metrics, "stage2", key) for key in ("coco.n_images", "coco.n_gt"))
    trained = ", ".join(
        "{} {:,} steps with {:,} tokens".format(
            name, *(required(data.metadata[name], key, f"{name}/run_metadata.json") for key in ("steps", "tokens"))
        )
        for name in TRAINED
    )
    return (
        f"Profile `{params.profile}`, seed {params.seed}, codec `{params.text.codec}`; {n_images} images with "
        f"{n_objects} objects evaluated. Training: {trained}."
    )


def runs_table(metadata: Mapping[str, Json]) -> str:
    """The steps, samples and tokens of each training stage, and the hashes of its inputs and outputs."""
    leaves = {name: dict(flatten({k: metadata[name].get(k, {}) for k in (*_OF_A_RUN, *_HASHES)})) for name in TRAINED}
    fields = dict.fromkeys(key for name in TRAINED for key in leaves[name])
    rows = [[f"`{key}`", *(_leaf(leaves[name].get(key)) for name in TRAINED)] for key in fields]
    return table(["field", *TRAINED], rows, "l" * (1 + len(TRAINED)))


def run_records(paths: ProfilePaths) -> list[Json]:
    """The run records of a profile's stages that are on this machine, oldest first."""
    files = paths.run_record("any").parent.glob(f"*{RUN_RECORD}")
    records = [read_json(file, file.name.removesuffix(RUN_RECORD)) for file in files]
    return sorted(records, key=lambda record: (str(record.get("finished", "")), str(record.get("stage", ""))))


def _leaf(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else escape(number(value))


def decode_table(decodes: Mapping[str, Json]) -> str:
    """Codec, images and tokens of the answers of each checkpoint."""
    fields = ("codec", "images", "tokens")
    rows = [
        [name, *(_leaf(required(decodes[name], field, f"{name}/{DECODE_SUMMARY}")) for field in fields)]
        for name in CHECKPOINTS
    ]
    return table(["decoding of", *fields], rows)


def weights_table(params: Params) -> str:
    """Weights of the objective, every key that ends in `_weight`: stage 1 (and the control) next to stage 2."""
    leaves = [(key.split("."), value) for key, value in flatten(params.model_dump()) if key.endswith("_weight")]
    stage1 = {key[-1]: f"{value:g}" for key, value in leaves if key[0] == "stage1"}
    stage2 = {key[-1]: f"{value:g}" for key, value in leaves if key[0] != "stage1"}
    rows = [[f"`{key}`", stage1.get(key, MISSING), value] for key, value in stage2.items()]
    return table(["weight", "stage1, stage1-control", "stage2"], rows)


def params_table(params: Params) -> str:
    """All parameters of the run."""
    rows = [[f"`{key}`", _leaf(value)] for key, value in flatten(params.model_dump())]
    return table(["parameter", "value"], rows, "ll")


_UNSEEN = object()


def experiment_baseline(profile: str) -> Baseline | None:
    """The baseline of the experiment that this process runs in; None outside of an experiment."""
    revision = os.environ.get(BASELINE_VARIABLE, "")
    if not revision or (params := git("show", f"{revision}:params.yaml")) is None:
        return None
    config = f"configs/{profile}.yaml"
    then = parse_yaml(git("show", f"{revision}:{config}") or "{}", f"{config} of {revision[:12]}")
    settings = parse_yaml(params, f"params.yaml of {revision[:12]}") | {config: then}
    now = {config: read_yaml(Path(config))}
    return Baseline(revision, os.environ.get(EXPERIMENT_VARIABLE, ""), settings, now)


def settings_delta(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, baseline value, present value of every leaf that differs; a missing side is None."""
    new, old = dict(flatten(dict(now))), dict(flatten(dict(then)))
    keys = dict.fromkeys([*new, *old])
    return [(k, old.get(k), new.get(k)) for k in keys if new.get(k, _UNSEEN) != old.get(k, _UNSEEN)]


def experiment_line(baseline: Baseline, settings: Mapping[str, Any]) -> str:
    """What an experiment changed compared with its starting commit, and the command that shows the effect."""
    delta = settings_delta({**settings, **baseline.profile}, baseline.settings)
    changed = [f"`{key}` {_value(old)} -> {_value(new)}" for key, old, new in delta if key != "profile"]
    revision, name = baseline.revision[:7], baseline.experiment or "EXPERIMENT"
    return (
        f"**Experiment{f' {escape(name)}' if baseline.experiment else ''} on {revision}**: "
        f"{', '.join(changed) or 'no parameter differs'}. For the effect, with intervals, run "
        f"`coordexp compare {revision} {name}`. Everything below covers this run alone."
    )


def _value(value: Any) -> str:
    return MISSING if value is None else escape(f"{value:g}" if isinstance(value, float) else str(value))
