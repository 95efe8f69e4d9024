"""Where the numbers come from: commits, parameters, data, hardware, time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.schema import CoordWeights, Params
from coordexp.reporting.inputs import TRAINED, Json
from coordexp.reporting.markdown import MISSING, escape, flatten, number, table
from coordexp.reporting.tables import required

SHARED_WEIGHTS = tuple(CoordWeights.model_fields)
STAGE2_WEIGHTS = tuple(key for key in Params.model_fields if key.endswith("_weight") and key not in SHARED_WEIGHTS)


def what_ran(
    profile: str, metadata: Mapping[str, Json], params: Mapping[str, Any], n_images: int, n_objects: int
) -> str:
    """One line: profile, commit, seed, data, time."""
    git = required(metadata["stage2"], "git", "stage2/run_metadata.json")
    commit = str(git["commit"])[:12] if git["commit"] else "unknown"
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[git["dirty"]]
    seconds = ", ".join(f"{name} {wall_seconds(metadata[name]):.0f} s" for name in TRAINED)
    return (
        f"Profile `{profile}`, commit `{commit}` ({state}), seed {params['seed']}, codec `{params['text']['codec']}`; "
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


def weights_table(params: Mapping[str, Any]) -> str:
    """Weights of the objective: stage 1 (and the control) beside stage 2."""
    rows = [[f"`{key}`", f"{params['stage1'][key]:g}", f"{params[key]:g}"] for key in SHARED_WEIGHTS]
    rows += [[f"`{key}`", MISSING, f"{params[key]:g}"] for key in STAGE2_WEIGHTS]
    return table(["weight", "stage1, stage1-control", "stage2"], rows)


def params_table(params: Mapping[str, Any]) -> str:
    """All parameters of the run."""
    return table(["parameter", "value"], [[f"`{key}`", _leaf(value)] for key, value in flatten(dict(params))], "ll")
