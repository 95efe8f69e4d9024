"""`coordexp init`: write a profile for a folder of annotated images, and estimate the training time.

The profile extends an existing one and contains only the differences: the location of the data, the model, and the
sizes that follow from the data by the rules in `_sizes`. No other file is written.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from coordexp.config.loading import EXTENDS, load_params, load_profile, parse_profile, profile_names, profile_tree
from coordexp.config.paths import ProfilePaths, model_folder
from coordexp.config.profile import RecordsConfig
from coordexp.config.run import RunConfig
from coordexp.doctor.needs import count_parameters
from coordexp.doctor.records import Examination, examine
from coordexp.doctor.shown import Preview
from coordexp.doctor.timing import timed_step, training_seconds
from coordexp.errors import ConfigError, DataError
from coordexp.infra.files import write_text
from coordexp.models.pins import write_pins
from coordexp.packing.samples import Sample
from coordexp.records.recognize import Candidate, recognize_folder

SMALL_PARAMETERS = 50_000_000  # up to this size a model can train on a CPU: its profile extends `tiny`
SMALL, LARGE = "tiny", "base/qwen3vl"
EMBEDDED_MODEL = "models/tiny-base"
PASSES = 20  # passes of stage 1 over the training images, unless the extended profile has fewer steps
MIN_STEPS = 100
TIMED_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class _Plan:
    """The folder, the profile to extend, and the model."""

    name: str
    root: Path  # root of the repository
    candidate: Candidate
    extends: str
    model: str

    @property
    def path(self) -> Path:
        """The file to write."""
        return self.root / "configs" / f"{self.name}.yaml"

    @property
    def base(self) -> dict[str, Any]:
        """All keys of the extended profile."""
        return profile_tree(self.root / "configs" / f"{self.extends}.yaml")


def init(folder: Path, name: str | None, base: str | None, params: Path) -> Iterator[str]:
    """Write `configs/<name>.yaml` for a folder; yields one line per finding, decision and measurement.

    Args:
        folder: annotated images, in any format of docs/data.md.
        name: name of the profile; None: derived from the name of the folder.
        base: folder of the pretrained model, or the name of a profile to extend; None: the embedded model.
        params: the parameter file of the repository.

    Raises:
        DataError: no annotations were recognized, or too much would be lost; the message lists what was found.
        ConfigError: the profile exists already, or the name is invalid.
        CheckpointError: `base` is not a Qwen3-VL model.
    """
    root = params.parent
    name = _profile_name(folder, name, root)
    candidate, others = _chosen(folder)
    yield f"{folder}: {candidate.format}: {candidate.why}; {candidate.images:,} images"
    yield from (f"  note: {problem}" for problem in candidate.problems)
    yield from (f"  not used: {other.format}: {other.why}" for other in others)
    extends, model = _extended(base, root)
    plan = _Plan(name, root, candidate, extends, model)
    found = _examined(plan)
    yield from _found_lines(found)
    run = _run(plan, params, _first_keys(plan, found))
    preview = Preview(run)
    train, val = (preview.samples(found.records[split]) for split in ("train", "val"))
    sizes = _sizes(plan.base, len(found.records["train"]), train + val)
    keys = _merged(_first_keys(plan, found), sizes)
    run = _run(plan, params, keys)
    _write(plan, keys)
    yield f"{plan.path}: extends {plan.extends}; {_rule(run, train, len(found.records['train']))}"
    yield from _time_lines(run, train)
    answer = max(len(s.answer_ids) for s in train + val)
    yield from _next_lines(run, answer)


def _profile_name(folder: Path, name: str | None, root: Path) -> str:
    made = (
        name if name is not None else re.sub(r"[^a-z0-9_-]+", "-", folder.resolve().name.lower()).strip("-_") or "mine"
    )
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", made):
        raise ConfigError(f"--name {made!r}: expected lowercase letters, digits, '-' and '_'.")
    if (root / "configs" / f"{made}.yaml").exists():
        raise ConfigError(
            f"{root / 'configs' / made}.yaml: this profile exists already and is not replaced. Choose another --name, "
            f"or remove the file. Existing profiles: {', '.join(profile_names(root / 'configs'))}."
        )
    return made


def _chosen(folder: Path) -> tuple[Candidate, list[Candidate]]:
    found = recognize_folder(folder)
    usable = [candidate for candidate in found if candidate.objects]
    if usable:
        return usable[0], [candidate for candidate in found if candidate is not usable[0]]
    files = Counter(path.suffix.lower() or path.name for path in folder.rglob("*") if path.is_file())
    listed = ", ".join(f"{count} {suffix}" for suffix, count in files.most_common(12)) or "nothing"
    tried = "".join(f"\n  {c.format}: {c.why}: {'; '.join(c.problems)}" for c in found)
    raise DataError(
        f"{folder}: no annotations were recognized. Found {listed}.{tried}\nExpected images with annotations in "
        "a format of docs/data.md: COCO, YOLO, Pascal VOC, labelme, CVAT, CSV, and others."
    )


def _extended(base: str | None, root: Path) -> tuple[str, str]:
    """The profile to extend and the folder of the model, from `--base`."""
    if base is not None and not (root / base).is_dir():
        name = base.removeprefix("configs/").removesuffix(".yaml")
        if not (root / "configs" / f"{name}.yaml").is_file():
            raise ConfigError(
                f"--base {base}: neither the folder of a model nor a profile. Existing profiles: "
                f"{', '.join(profile_names(root / 'configs'))}."
            )
        return name, str(profile_tree(root / "configs" / f"{name}.yaml").get("model", {}).get("path", EMBEDDED_MODEL))
    model = base or EMBEDDED_MODEL
    return SMALL if count_parameters(root / model) <= SMALL_PARAMETERS else LARGE, model


def _examined(plan: _Plan) -> Examination:
    records = RecordsConfig.model_validate(plan.base["records"] | {"dev_images": 1})
    found = examine({plan.name: plan.candidate.dataset()}, records, decode=False, workers=4)
    if found.stops:
        stops = "".join(
            f"\n  {f.set_name}/{f.split}: {f.reason}: {f.count}" + "".join(f"\n    {e}" for e in f.examples)
            for f in found.findings
            if f.stops
        )
        raise DataError(f"{plan.candidate.keys['root']}: read as {plan.candidate.format}, but a run would stop:{stops}")
    return found


def _found_lines(found: Examination) -> Iterator[str]:
    for split, records in found.records.items():
        objects = [o for r in records for o in r.objects]
        yield f"{split}: {len(records):,} images, {len(objects):,} objects, {len({o.desc for o in objects}):,} labels"
    for finding in found.findings:
        yield f"  {finding.fate}: {finding.split}: {finding.reason}: {finding.count}"


def _first_keys(plan: _Plan, found: Examination) -> dict[str, Any]:
    """The keys for the locations of data and model."""
    keys = dict(plan.candidate.keys)
    inside, outside = Path(keys["root"]), plan.root.resolve()
    keys["root"] = str(inside.relative_to(outside)) if inside.is_relative_to(outside) else str(inside)
    source = {"kind": "datasets", "verify": "decode", "sets": {plan.name: keys}}
    dev = _dev_images(plan.base, len(found.records["train"]))
    model = {} if plan.base.get("model", {}).get("path") == plan.model else {"path": plan.model, "files": None}
    return {"source": source, "records": {"dev_images": dev}} | ({"model": model} if model else {})


def _dev_images(base: Mapping[str, Any], n_train: int) -> int:
    """A tenth of the training images, but not more than in the extended profile."""
    return max(1, min(int(base["records"]["dev_images"]), round(n_train / 10)))


def _sizes(base: Mapping[str, Any], n_train: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """The sizes that follow from the data: packs that fit the longest record, and steps from the number of packs.

    Stage 1 makes PASSES passes over the data, but not more steps than in the extended profile. Stage 2 and the control
    keep their ratio to the steps of stage 1.
    """
    dev = _dev_images(base, n_train)
    longest = max(sample.length for sample in samples)
    pack_tokens = max(int(base["packing"]["pack_tokens"]), 32 * ceil(longest / 32))
    packs = max(1, ceil((n_train - dev) * sum(s.length for s in samples) / len(samples) / pack_tokens))
    stage1, stage2, monitor = base["stage1"], base["stage2"], base["monitor"]
    steps = min(int(stage1["steps"]), max(MIN_STEPS, ceil(PASSES * packs / stage1["packs_per_step"])))
    steps2 = max(1, round(steps * stage2["steps"] / stage1["steps"]))
    return {
        "packing": {"pack_tokens": pack_tokens},
        "stage1": {"steps": steps, "warmup_steps": min(stage1["warmup_steps"], steps // 10)},
        "rollout": {"images": max(1, min(base["rollout"]["images"], n_train - dev))},
        "stage2": {"steps": steps2, "warmup_steps": min(stage2["warmup_steps"], steps2 // 10)},
        "monitor": {
            "every_steps": min(monitor["every_steps"], max(1, steps // 4)),
            "images": min(monitor["images"], dev),
        },
    }


def _merged(keys: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {block: {**keys.get(block, {}), **sizes.get(block, {})} for block in dict.fromkeys([*keys, *sizes])}


def _run(plan: _Plan, params: Path, keys: Mapping[str, Any]) -> RunConfig:
    tree = {name: dict(block) for name, block in plan.base.items()}
    for block, values in keys.items():
        tree[block] = dict(values) if block == "source" else tree.get(block, {}) | values
    values = load_params(params).model_copy(update={"profile": plan.name})
    return RunConfig(params=values, profile=parse_profile(plan.path, tree), paths=ProfilePaths(plan.name, plan.root))


def _write(plan: _Plan, keys: Mapping[str, Any]) -> None:
    differing: dict[str, Any] = {EXTENDS: plan.extends}
    for block, values in keys.items():
        kept = {k: v for k, v in values.items() if block == "source" or v != plan.base.get(block, {}).get(k, ...)}
        if kept:
            differing[block] = kept
    yaml, text = YAML(), io.StringIO()
    yaml.width = 1 << 16
    yaml.dump(differing, text)
    head = f"# {plan.candidate.images:,} images, read as {plan.candidate.format}; differences from {plan.extends}."
    write_text(plan.path, f"{head} Written by `coordexp init`.\n\n{text.getvalue()}")
    if keys.get("model"):
        write_pins(plan.path)
    load_profile(plan.path)


def _rule(run: RunConfig, train: Sequence[Sample], n_train: int) -> str:
    """The chosen sizes in words."""
    stage1, pack_tokens = run.profile.stage1, run.profile.packing.pack_tokens
    mean = sum(s.length for s in train) / len(train)
    passes = stage1.steps * stage1.packs_per_step * pack_tokens / (mean * n_train)
    return (
        f"{run.profile.records.dev_images} training images become dev, packs hold {pack_tokens} tokens, stage 1 takes "
        f"{stage1.steps} steps, which is about {passes:.2g} passes over the data"
    )


def _time_lines(run: RunConfig, train: Sequence[Sample]) -> Iterator[str]:
    if count_parameters(model_folder(run.profile.model.path)) > SMALL_PARAMETERS and not torch.cuda.is_available():
        yield "time: not measured: a model of this size needs a GPU; `coordexp doctor` estimates memory and hours"
        return
    step = timed_step(run, train[:TIMED_SAMPLES])
    seconds = training_seconds(run, step, sum(s.length for s in train) / len(train))
    yield (
        f"time: a step of stage 1 takes {step.seconds:.2f} s here, so training (stage 1, stage 2, the control) takes "
        f"about {max(1, round(seconds / 60)):,} minutes; decoding and evaluation are not included"
    )


def _next_lines(run: RunConfig, answer: int) -> Iterator[str]:
    name, budget = run.params.profile, run.params.decode.max_new_tokens
    needed = 64 * ceil(1.25 * answer / 64)
    room = f" -S decode.max_new_tokens={needed}" if needed > budget else ""
    if room:
        yield f"the longest answer has {answer} tokens, but decode.max_new_tokens is {budget}: increase it, as below"
    yield f"next: coordexp doctor --profile {name} --page doctor-{name}.html   (inspect the images)"
    yield f"then: dvc exp run -S profile={name}{room}   (report: reports/{name}/progress.md)"
