"""The output of `coordexp doctor`: problems in the data, and the needs of a run compared with the machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from coordexp.config.profile import DatasetsConfig
from coordexp.config.run import RunConfig
from coordexp.doctor.hours import hour_lines
from coordexp.doctor.memory import Memory
from coordexp.doctor.needs import needs_of
from coordexp.doctor.records import Examination, examine
from coordexp.errors import CheckpointError
from coordexp.infra.device import measured_rates, training_plan
from coordexp.infra.workers import worker_count
from coordexp.models.pins import pin_fault
from coordexp.records.manifest import SPLITS
from coordexp.records.schema import Record, read_records
from coordexp.records.sources.base import Problem
from coordexp.rollout.opening import START

STOP = "STOP: "  # starts the line of a problem that stops a run


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The text, every problem as a JSON line, whether the stages would stop, and the remaining records by split."""

    lines: tuple[str, ...]
    problem_lines: tuple[str, ...]
    stops: bool
    records: dict[str, list[Record]]


def diagnose(run: RunConfig, decode: bool) -> Diagnosis:
    """Check the data of a profile and estimate the needs of a run, in words; `decode` decodes all images.

    Composed scenes need no check; their needs are estimated from the records on disk.
    """
    source = run.profile.source
    lines, faults, stops = ["data: the raw stage composes the scenes; nothing to check"], list[Problem](), False
    if isinstance(source, DatasetsConfig):
        found = examine(source.sets, run.profile.records, decode, workers=worker_count())
        lines, faults, stops = list(_data_lines(found)), _faults(found), found.stops
        records, n_val = found.records, len(found.records["val"])
    else:
        on_file = {split: run.paths.records / f"{split}.jsonl" for split in SPLITS}
        records = {split: list(read_records(path)) if path.is_file() else [] for split, path in on_file.items()}
        n_val = len(records["val"])
    needs = list(_need_lines(run, records["train"], n_val))
    if fault := pin_fault(run.profile.model, run.paths.profile):
        needs.insert(0, f"{STOP}model: {fault}")
    lacking = [line.removeprefix(STOP) for line in needs if line.startswith(STOP)]
    faults += [Problem("needs", f"configs/{run.paths.profile}.yaml", "", detail) for detail in lacking]
    stops = stops or bool(lacking)
    lines += [*needs, "a run would stop at the lines marked STOP" if stops else "nothing here would stop a run"]
    rows = tuple(json.dumps(asdict(p), ensure_ascii=False) for p in faults)
    return Diagnosis(tuple(lines), rows, stops, records)


def _faults(found: Examination) -> list[Problem]:
    """The problems of single annotations and images, and those of whole splits or sets."""
    listed = {p.reason for p in found.problems}
    whole = [f for f in found.findings if f.reason not in listed]
    return found.problems + [
        Problem(f.reason, f"{f.set_name}/{f.split}", f"count {f.count}", detail)
        for f in whole
        for detail in (f.examples or ("",))
    ]


def _data_lines(found: Examination) -> Iterator[str]:
    for split, records in found.records.items():
        objects = sum(len(r.objects) for r in records)
        yield f"{split}: {len(records)} records, {objects} objects"
    yield f"images: {_gigabytes(found.image_bytes)} on disk, read in place"
    if not found.findings:
        yield "no fault found"
    for finding in found.findings:
        yield f"{finding.fate}: {finding.set_name}/{finding.split}: {finding.reason}: {finding.count}"
        yield from (f"    {example}" for example in finding.examples)


def _need_lines(run: RunConfig, train: list[Record], n_val: int) -> Iterator[str]:
    if not train:
        yield "needs: no estimate without training records"
        return
    try:
        needs = needs_of(run, train)
    except CheckpointError as error:
        yield f"{STOP}model: {error}"
        return
    free = shutil.disk_usage(Path()).free
    yield f"model: {needs.parameters:,} parameters"
    yield (
        f"tokens: {needs.image_tokens:,} of images, about {needs.text_tokens:,} of text; the longest record has about "
        f"{needs.longest_tokens:,}"
    )
    yield (
        f"packs: about {needs.packs:,} of {run.profile.packing.pack_tokens:,} tokens; stage 1 makes "
        f"{needs.stage1_passes:.2f} passes over them"
    )
    yield (
        f"disk: about {_gigabytes(needs.disk_bytes)} for checkpoints and samples, twice as much if DVC's cache cannot "
        f"link files; {_gigabytes(free)} free"
    )
    plan = training_plan(run.profile.stage1.precision)
    yield f"{plan}"
    yield f"{measured_rates(plan)}"
    yield _memory_line(needs.memory)
    if needs.over_budget:
        yield (
            f"answers: the longest has about {needs.longest_answer:,} tokens; {needs.over_budget:,} of "
            f"{needs.train_records:,} exceed decode.max_new_tokens, {run.params.decode.max_new_tokens}, and would be "
            "truncated: increase it"
        )
    yield from hour_lines(run, needs.training_flops, len(train), n_val)
    rollout = run.profile.rollout
    if rollout.engine == "vllm" and rollout.servers == START and not Path(rollout.vllm_python).is_file():
        yield f"{STOP}rollout.vllm_python is {rollout.vllm_python!r}: no such file; run `make vllm`"
    if needs.over_pack:
        yield f"{STOP}{needs.over_pack} records are longer than a pack; raise packing.pack_tokens or lower max_pixels"
    if needs.disk_bytes > free:
        yield f"{STOP}the disk lacks {_gigabytes(needs.disk_bytes - free)}"


def _memory_line(memory: Memory) -> str:
    return (
        f"memory of a step on one GPU: about {_gigabytes(memory.total)}: {_gigabytes(memory.states)} for weights, "
        f"gradients and moments ({memory.trained:,} trained parameters), {_gigabytes(memory.activations)} for "
        f"activations, {_gigabytes(memory.copies)} for bf16 copies, {_gigabytes(memory.logits)} for logits; "
        f"{_gigabytes(memory.update)} in the update"
    )


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
