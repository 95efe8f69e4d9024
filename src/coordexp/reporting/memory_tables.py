"""The tables of memory in docs/production.md and docs/scaling.md: the published sizes through `doctor/memory.py`."""

from __future__ import annotations

from coordexp.config.profile import TuningConfig
from coordexp.doctor.memory import Memory, sharded_memory, step_memory
from coordexp.models.sizes import qwen3_vl_config
from coordexp.reporting.markdown import table

# The step that both pages describe: one pack, of it the visual tokens; all others are supervised.
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
)
_LORA = _FULL.model_copy(update={"method": "lora"})
_KEEP = _FULL.model_copy(update={"activations": "keep"})
_ONE_DEVICE = (
    ("2b", _FULL, "adamw", "all, AdamW"),
    ("4b", _FULL, "adamw", "all, AdamW"),
    ("4b", _KEEP, "adamw", "all, AdamW, `activations: keep`"),
    ("4b", _FULL, "adamw_8bit", "all, `adamw_8bit`"),
    ("4b", _LORA, "adamw", "LoRA of rank 64"),
    ("8b", _FULL, "adamw", "all, AdamW"),
    ("8b", _LORA, "adamw", "LoRA of rank 64"),
)
_COLUMNS = ("weights, gradients, moments", "whole step")


def one_device_table() -> str:
    """What one device holds, by size of the model and by what trains."""
    rows = [
        [size.upper(), trains, *_cells(_step(size, tuning, optimizer))]
        for size, tuning, optimizer, trains in _ONE_DEVICE
    ]
    return table(["model", "trains", *_COLUMNS], rows, "llrr")


def sharded_table() -> str:
    """What each of several processes holds with sharded states, beside one process without."""
    rows = []
    for size in ("4b", "8b"):
        whole = _step(size, _FULL, "adamw")
        spread = sharded_memory(whole, qwen3_vl_config(size).to_dict(), PROCESSES)
        rows.append([f"{size.upper()}, one process", *_cells(whole)])
        rows.append([f"{size.upper()}, {PROCESSES} processes", *_cells(spread)])
    return table(["model, all weights, AdamW", *_COLUMNS], rows, "lrr")


def _step(size: str, tuning: TuningConfig, optimizer: str) -> Memory:
    config = qwen3_vl_config(size).to_dict()
    return step_memory(config, tuning, optimizer, PACK_TOKENS, IMAGE_TOKENS, PACK_TOKENS - IMAGE_TOKENS)


def _cells(memory: Memory) -> list[str]:
    states = memory.weights + memory.gradients + memory.moments
    return [f"{n_bytes / 1e9:.0f} GB" for n_bytes in (states, memory.total)]
