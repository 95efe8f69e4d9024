"""What `coordexp doctor` prints: findings of the data, and the needs of a run beside what the machine has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from coordexp.config.loading import load_params
from coordexp.config.profile import DatasetsConfig, Profile
from coordexp.config.schema import Params
from coordexp.doctor.memory import Memory
from coordexp.doctor.needs import Needs, needs_of
from coordexp.doctor.records import Examination, examine
from coordexp.errors import CheckpointError
from coordexp.models.pins import pin_fault, write_pins
from coordexp.records.schema import Record, read_records
from coordexp.records.sources.base import Problem

ASSUMED_FLOPS = 4e14  # a second
STOP = "STOP: "  # begins the line of what stops a run


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The text, every fault as a JSON line (what stops a run included), and whether the stages would stop."""

    lines: tuple[str, ...]
    problem_lines: tuple[str, ...]
    stops: bool


def diagnose(profile: Profile, params: Params, data: Path, decode: bool) -> Diagnosis:
    """Examine the data of a profile, estimate its needs, and put both into words.

    Args:
        profile: the profile; composed scenes have nothing to examine, their needs come from the records on file.
        params: the parameters, of which the codec decides the tokens of an answer.
        data: the folder of the data stages' outputs.
        decode: unpack every image.
    """
    source = profile.source
    lines: list[str] = []
    faults: list[Problem] = []
    stops = False
    if isinstance(source, DatasetsConfig):
        found = examine(source.sets, profile.records, decode, workers=os.cpu_count() or 1)
        lines += _data_lines(found)
        faults += _faults(found)
        train, stops = found.records["train"], found.stops
    else:
        lines.append("data: scenes are composed by the raw stage; nothing to examine")
        on_file = data / params.profile / "records" / "train.jsonl"
        train = list(read_records(on_file)) if on_file.is_file() else []
    n_data_lines = len(lines)
    fault = pin_fault(profile.model, params.profile)
    needed, lacks = _need_lines(train, profile, params)
    lines += [f"STOP: model: {fault}", *needed] if fault else needed
    stops = stops or bool(fault) or lacks
    lines.append("a run would stop at what is marked STOP" if stops else "nothing here stops a run")
    needs = [line.removeprefix(STOP) for line in lines[n_data_lines:] if line.startswith(STOP)]
    faults += [Problem("needs", f"configs/{params.profile}.yaml", "", detail) for detail in needs]
    return Diagnosis(tuple(lines), tuple(json.dumps(asdict(p), ensure_ascii=False) for p in faults), stops)


def _faults(found: Examination) -> list[Problem]:
    """The problems of single annotations and images, and what was found of a split or a set as a whole."""
    listed = {p.reason for p in found.problems}
    whole = [f for f in found.findings if f.reason not in listed]
    return found.problems + [
        Problem(f.reason, f"{f.set_name}/{f.split}", f"count {f.count}", detail)
        for f in whole
        for detail in (f.examples or ("",))
    ]


def pin_model(params: Path, profile: str | None) -> str:
    """Write the pins of the model into the wanted profile, or the one that the parameter file names; says so."""
    file = params.parent / "configs" / f"{profile or load_params(params).profile}.yaml"
    return f"pinned {len(write_pins(file))} files of the model in {file}; commit it"


def _data_lines(found: Examination) -> Iterator[str]:
    for split, records in found.records.items():
        objects = sum(len(r.objects) for r in records)
        yield f"{split}: {len(records)} records, {objects} objects"
    yield f"images: {_gigabytes(found.image_bytes)} on disk, read where they are"
    if not found.findings:
        yield "no fault found"
    for finding in found.findings:
        yield f"{finding.fate}: {finding.set_name}/{finding.split}: {finding.reason}: {finding.count}"
        yield from (f"    {example}" for example in finding.examples)


def _need_lines(train: list[Record], profile: Profile, params: Params) -> tuple[list[str], bool]:
    if not train:
        return ["needs: no training record to estimate from"], False
    try:
        needs = needs_of(train, profile, params.text.codec)
    except CheckpointError as error:
        return [f"STOP: model: {error}"], True
    free = shutil.disk_usage(Path()).free
    lines = [
        f"model: {needs.parameters:,} parameters",
        f"tokens: {needs.image_tokens:,} of images, about {needs.text_tokens:,} of text; longest record about "
        f"{needs.longest_tokens:,}",
        f"packs: about {needs.packs:,} of {profile.packing.pack_tokens:,} tokens; stage 1 passes over them "
        f"{needs.stage1_passes:.2f} times",
        f"disk: about {_gigabytes(needs.disk_bytes)} for checkpoints and samples, twice that if the cache cannot link "
        f"files; {_gigabytes(free)} free",
        _memory_line(needs.memory),
        _training_line(profile, needs.training_flops),
    ]
    too_long, too_full = _shortages(needs, free)
    return [*lines, *too_long, *too_full], bool(too_long or too_full)


def _memory_line(memory: Memory) -> str:
    states = memory.weights + memory.gradients + memory.moments
    return (
        f"memory of a step on one device: about {_gigabytes(memory.total)}: {_gigabytes(states)} of weights, gradients "
        f"and moments ({memory.trained:,} parameters train), {_gigabytes(memory.activations)} of activations, "
        f"{_gigabytes(memory.logits)} of logits"
    )


def _training_line(profile: Profile, flops: float) -> str:
    return (
        f"training: {profile.stage1.steps} steps of stage 1, {profile.stage2.steps} of stage 2 and of the control; "
        f"{flops:.2g} floating-point operations, {flops / ASSUMED_FLOPS / 3600:.2g} hours on one device at "
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s (an assumption: 40 % of an H100's bf16); decoding comes on top"
    )


def _shortages(needs: Needs, free_bytes: int) -> tuple[list[str], list[str]]:
    too_long = f"STOP: {needs.over_pack} records are longer than a pack; raise packing.pack_tokens or lower max_pixels"
    too_full = f"STOP: the disk lacks {_gigabytes(needs.disk_bytes - free_bytes)}"
    return [too_long] if needs.over_pack else [], [too_full] if needs.disk_bytes > free_bytes else []


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
