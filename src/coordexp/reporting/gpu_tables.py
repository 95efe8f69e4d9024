"""GPU memory and hours for the documents: predicted, and measured where `make gpu-check` left results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordexp.config.loading import load_profile
from coordexp.config.paths import CHECKPOINTS
from coordexp.config.profile import Profile, TuningConfig
from coordexp.errors import DataError
from coordexp.infra.foreign import Gate
from coordexp.reporting.markdown import table

if TYPE_CHECKING:
    from coordexp.doctor.memory import Memory

RESULTS = Path("benchmarks/results/gpu/results.jsonl")
MEASURED = Gate("a figure that `make gpu-check` measured", DataError, "Restore the file: git checkout.")
PREDICTED = "predicted"

# The step in the memory tables: the tokens of one pack and the visual tokens among them; all others are supervised.
PACK_TOKENS, IMAGE_TOKENS = 8192, 5120
PROCESSES = 8
_FULL = TuningConfig(
    method="full",
    vision="train",
    projector="train",
    language="train",
    rank=64,
    alpha=128.0,
    dropout=0.0,
    activations="recompute",
    vision_activations="recompute",
)
_LORA = _FULL.model_copy(update={"method": "lora"})
_KEEP = _FULL.model_copy(update={"activations": "keep", "vision_activations": "keep"})
_CHECKED_2B = ("step-2b", "8k, as committed")
_ONE_DEVICE = (
    ("2b", _FULL, "adamw", "all, AdamW", _CHECKED_2B),
    ("4b", _FULL, "adamw", "all, AdamW", None),
    ("4b", _KEEP, "adamw", "all, AdamW, `activations: keep`", None),
    ("4b", _FULL, "adamw_8bit", "all, `adamw_8bit`", None),
    ("4b", _LORA, "adamw", "LoRA of rank 64", ("step-lora", "4b, as committed")),
    ("8b", _FULL, "adamw", "all, AdamW", None),
    ("8b", _LORA, "adamw", "LoRA of rank 64", ("step-lora", "8b, as committed")),
)
_MEMORY_COLUMNS = ("weights, gradients, moments", "whole step")


@dataclass(frozen=True, slots=True)
class _Plan:
    """A profile of the table of hours, with tokens per sample and per answer, and the number of val images."""

    profile: str
    size: str
    sample_tokens: int
    answer_tokens: int
    val_images: int
    step: tuple[str, str]


_PLANS = (
    _Plan("coco-qwen3vl-2b", "2b", 490, 190, 5000, _CHECKED_2B),
    _Plan("coco-qwen3vl-4b", "4b", 490, 190, 5000, ("step-lora", "4b, as committed")),
    _Plan("coco-qwen3vl-8b", "8b", 490, 190, 5000, ("step-lora", "8b, as committed")),
    _Plan("lvis-qwen3vl-4b", "4b", 650, 340, 19_809, ("step-lora", "4b, as committed")),
    _Plan("coco-val2017", "2b", 490, 190, 500, _CHECKED_2B),
)
# Of one decoding forward, launch-bound up to a batch of 64; an assumption.
LAUNCH_SECONDS_A_LAYER = 0.035 / 28
_DECODED = ("decoding", "bf16, batch 64")  # of 2B


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement on a GPU: its value, the GPU and the date."""

    value: float
    where: str


def measured(root: Path) -> dict[tuple[str, str], Measured]:
    """The measurements by section and name, the last one of each. Empty if there are none."""
    path = root / RESULTS
    lines = MEASURED.json_lines(path) if path.is_file() else ()
    rows = [row for _, row in lines if row["status"] == "measured" and not row["card"].startswith("CPU")]
    return {(r["section"], r["name"]): Measured(r["value"], f"{r['card']}, {r['date']}") for r in rows}


Figures = Mapping[tuple[str, str], Measured]


def one_device_table(found: Figures) -> str:
    """Memory of one device by model size and trained part, and the measured peak."""
    rows = []
    for size, tuning, optimizer, trains, name in _ONE_DEVICE:
        peak = found.get((name[0], f"{name[1]}: peak")) if name else None
        seen = f"{peak.value:.0f} GB ({peak.where})" if peak else PREDICTED
        rows.append([size.upper(), trains, *_cells(_step(size, tuning, optimizer)), seen])
    return table(["model", "trains", *_MEMORY_COLUMNS, "measured"], rows, "llrrl")


def sharded_table() -> str:
    """Memory per process with sharded states, next to one process without; not measured."""
    from coordexp.doctor.memory import sharded_memory
    from coordexp.models.sizes import qwen3_vl_config

    rows = []
    for size in ("4b", "8b"):
        whole = _step(size, _FULL, "adamw")
        spread = sharded_memory(whole, qwen3_vl_config(size).to_dict(), PROCESSES)
        rows.append([f"{size.upper()}, one process", *_cells(whole)])
        rows.append([f"{size.upper()}, {PROCESSES} processes", *_cells(spread)])
    return table(["model, all weights, AdamW; predicted", *_MEMORY_COLUMNS], rows, "lrr")


def hours_table(root: Path, found: Figures) -> str:
    """Hours of one GPU for each profile: training of all stages, rollouts, and the four evaluations."""
    rows = []
    for plan in _PLANS:
        profile = load_profile(root / "configs" / f"{plan.profile}.yaml")
        step = found.get((plan.step[0], f"{plan.step[1]}: step"))
        decoded = found.get(_DECODED) if plan.size == "2b" else None
        training = _training_hours(plan, profile, step.value if step else None)
        per_second = _images_per_second(plan, profile, decoded.value if decoded else None)
        decoding = [n / per_second / 3600 for n in (profile.rollout.images, len(CHECKPOINTS) * plan.val_images)]
        seen = [f"{what}: {figure.where}" for what, figure in (("training", step), ("decoding", decoded)) if figure]
        hours = [f"{value:.1f}" for value in (training, *decoding)]
        rows.append([f"`{plan.profile}`", *hours, "; ".join(seen) or PREDICTED])
    return table(["profile", "training", "rollouts", "evaluation", "measured"], rows, "lrrrl")


def _training_hours(plan: _Plan, profile: Profile, pack_seconds: float | None) -> float:
    """Of stage 1, stage 2 and the control, at the measured time of a pack, or at an assumed speed."""
    from coordexp.doctor.hours import ASSUMED_FLOPS
    from coordexp.doctor.memory import parameters_by_part
    from coordexp.doctor.needs import token_flops, training_flops
    from coordexp.models.sizes import qwen3_vl_config

    parameters = parameters_by_part(qwen3_vl_config(plan.size).to_dict()).total
    flops = sum(training_flops(profile, parameters, plan.sample_tokens).values())
    of_pack = token_flops(profile, parameters) * profile.packing.pack_tokens
    return flops / (of_pack / pack_seconds if pack_seconds else ASSUMED_FLOPS) / 3600


def _images_per_second(plan: _Plan, profile: Profile, tokens_per_second: float | None) -> float:
    """Without drafts: every token of an answer is a forward."""
    from coordexp.models.sizes import DENSE_SIZES

    if tokens_per_second is None:
        tokens_per_second = profile.rollout.batch_images / (LAUNCH_SECONDS_A_LAYER * DENSE_SIZES[plan.size].layers)
    return tokens_per_second / plan.answer_tokens


def _step(size: str, tuning: TuningConfig, optimizer: str) -> Memory:
    from coordexp.doctor.memory import step_memory  # loads transformers
    from coordexp.models.sizes import qwen3_vl_config

    config = qwen3_vl_config(size).to_dict()
    return step_memory(config, tuning, optimizer, PACK_TOKENS, IMAGE_TOKENS, PACK_TOKENS - IMAGE_TOKENS)


def _cells(memory: Memory) -> list[str]:
    return [f"{n_bytes / 1e9:.0f} GB" for n_bytes in (memory.states, memory.total)]
