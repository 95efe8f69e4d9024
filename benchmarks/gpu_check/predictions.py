"""The predicted value of each figure on an H100 80GB, written before the measurement.

`derived` predictions follow by arithmetic from the hardware limits below or from doctor/memory.py, `guess` ones from
experience with other programs. A figure without an entry has no prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.gpu_check.shapes import FIRST_COORD, config_of, pack_of, profile_of

from coordexp.doctor.memory import step_memory
from coordexp.losses.vocabulary_terms import GPU_CHUNK_SLOTS
from coordexp.models.sizes import DENSE_SIZES
from coordexp.reporting.gpu_tables import LAUNCH_SECONDS_A_LAYER

Basis = Literal["derived", "guess"]

# Of an H100: operations and bytes a second.
BF16, TF32, FLOAT32 = 798e12, 400e12, 50e12
COPY, PAGEABLE, PINNED, DISK = 3.0e12, 4e9, 50e9, 1.5e9
PEAK_FLOPS = 989e12  # that MFU is a fraction of: dense bf16, of H100 and H200 alike

VOCABULARY = FIRST_COORD + 1267  # the rows that a head of Qwen's vocabulary has with the coordinates
LOGIT_BYTES = 48  # that elementwise passes of torch move for each logit
STEP_TOKENS = {"8k": 8192, "12k": 12_288}
LAUNCH_SECONDS = LAUNCH_SECONDS_A_LAYER * DENSE_SIZES["2b"].layers


@dataclass(frozen=True, slots=True)
class Prediction:
    """A number in the unit of its figure, and where it comes from."""

    value: float
    basis: Basis


Table = dict[tuple[str, str], Prediction]


def predictions() -> Table:
    """All of them, by section and name of the figure."""
    return {**_ceilings(), **_attention(), **_head(), **_steps(), **_decoding(), **_state()}


def _ceilings() -> Table:
    numbers = {"bf16 product": BF16 / 1e12, "TF32 product": TF32 / 1e12, "float32 product": FLOAT32 / 1e12}
    numbers |= {"copy": COPY / 1e12, "to device, pageable": PAGEABLE / 1e9, "to device, pinned": PINNED / 1e9}
    found = {("ceilings", name): Prediction(value, "guess") for name, value in numbers.items()}
    found["ceilings", "bf16 product"] = Prediction(BF16 / 1e12, "derived")
    found["patch-embedding", "convolution"] = Prediction(2e-3, "guess")
    found["patch-embedding", "product"] = Prediction(1e-3, "guess")
    return found


def _attention() -> Table:
    found: Table = {}
    for label, tokens in STEP_TOKENS.items():
        for heads in (16, 32):
            dense = 35e-3 * (tokens / 8192) ** 2 * heads / 32
            varlen = 1e-3 * (tokens / 8192) * heads / 32
            found["attention", f"{label}, {heads} heads: dense"] = Prediction(dense, "guess")
            found["attention", f"{label}, {heads} heads: segments"] = Prediction(varlen, "guess")
    found["packed-alone", "segments, float32: hidden states"] = Prediction(1e-6, "guess")
    found["packed-alone", "segments, bf16: hidden states"] = Prediction(5e-3, "guess")
    return found


def head_seconds(slots: int, hidden: int, chunk: int, flops: float, weight_bytes: int) -> float:
    """Three products; for each chunk the head read twice, its float32 gradient read and written; passes over logits."""
    products = 3 * 2 * slots * VOCABULARY * hidden / flops
    traffic = -(-slots // chunk) * VOCABULARY * hidden * (2 * weight_bytes + 2 * 4) / COPY
    return products + traffic + LOGIT_BYTES * slots * VOCABULARY / COPY


def _head() -> Table:
    found: Table = {
        ("head-exact", "float32 head: gradients"): Prediction(1e-5, "guess"),
        ("head-exact", "bf16 head: gradients"): Prediction(2e-3, "guess"),
    }
    for hidden in (2048, 2560):
        for slots in (3072, 8192):
            numbers = {"bare bf16 products": 3 * 2 * slots * VOCABULARY * hidden / BF16}
            numbers |= {f"bf16, {chunk} rows": head_seconds(slots, hidden, chunk, BF16, 2) for chunk in CHUNKS}
            numbers["bf16, as committed"] = head_seconds(slots, hidden, GPU_CHUNK_SLOTS, BF16, 2)
            numbers["float32, 256 rows"] = head_seconds(slots, hidden, 256, FLOAT32, 4)
            numbers["TF32, 256 rows"] = head_seconds(slots, hidden, 256, TF32, 4)
            for name, value in numbers.items():
                found["head-speed", f"D {hidden}, N {slots}: {name}"] = Prediction(value, "derived")
    return found


CHUNKS = (256, 1024, 2048, 4096)


def memory_gigabytes(size: str, tokens: int) -> float:
    """Of a step over one such pack under the committed profile, by doctor/memory.py."""
    config, profile = config_of(size, small=False), profile_of(size)
    batch = pack_of(config, tokens, small=False).batch
    patches = len(batch.pixel_values)
    visual = patches // config.vision_config.spatial_merge_size**2
    slots = len(batch.text_slots) + len(batch.coord_slots)
    optimizer = profile.stage1.optimizer
    return step_memory(config.to_dict(), profile.tuning, optimizer, batch.n_tokens, visual, slots).total / 1e9


def _steps() -> Table:
    found: Table = {
        ("step-2b", "8k, none: step"): Prediction(1.3, "derived"),
        ("step-2b", "8k, as committed: step"): Prediction(0.38, "derived"),
        ("step-lora", "4b, none: step"): Prediction(2.5, "derived"),
        ("step-lora", "4b, as committed: step"): Prediction(0.65, "derived"),
        ("step-lora", "8b, as committed: step"): Prediction(1.0, "derived"),
    }
    for label, tokens in STEP_TOKENS.items():
        found["step-2b", f"{label}, as committed: peak"] = Prediction(memory_gigabytes("2b", tokens), "derived")
    for size in ("4b", "8b"):
        found["step-lora", f"{size}, as committed: peak"] = Prediction(memory_gigabytes(size, 8192), "derived")
    return found


def _decoding() -> Table:
    return {
        ("decoding", f"{kind}, batch {batch}"): Prediction(batch / LAUNCH_SECONDS, "guess")
        for kind in ("bf16", "float32 weights")
        for batch in (16, 64)
    }


def _state() -> Table:
    return {
        ("state", "a step waits for a save"): Prediction(5.0e9 / DISK, "derived"),
        ("state", "to pinned memory"): Prediction(5.0e9 / PINNED, "derived"),
        ("base", "text, 64 scenes a step"): Prediction(64 / LAUNCH_SECONDS, "guess"),
        ("base", "text, 1024 scenes a step"): Prediction(25_000, "guess"),
        ("base", "tower, 64 scenes a step"): Prediction(2 * 64 / LAUNCH_SECONDS, "guess"),
        ("base", "tower, 1024 scenes a step"): Prediction(25_000, "guess"),  # pictures must be read here as there
    }
