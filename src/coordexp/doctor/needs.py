"""Estimate the needs of a run from its records: tokens, packs, passes over the data, disk, memory.

Image tokens are exact (the same resizing as in training). Prompt, descriptions, scaffold and coordinates are counted
with the model's tokenizer; the chat template around them is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import Qwen3VLConfig

from coordexp.config.paths import model_folder
from coordexp.config.profile import Profile
from coordexp.config.run import RunConfig
from coordexp.doctor.memory import WEIGHT, Memory, sharded_memory, step_memory
from coordexp.errors import CheckpointError
from coordexp.models.folder import weight_shapes
from coordexp.models.loading import check_config
from coordexp.models.processor import pixel_spec
from coordexp.packing.pixels import resized_size
from coordexp.records.schema import Record
from coordexp.text.codecs import Role, TextObject, get_codec
from coordexp.text.prompts import asked_names, question

FRAME_TOKENS = 15  # role headers, image markers and end of turn
CHECKPOINTS_WRITTEN = 4  # init, stage1, stage1-control, stage2, in float32; a resume state is added


@dataclass(frozen=True, slots=True)
class Needs:
    """The estimated needs of a run; sizes in bytes."""

    train_records: int
    image_tokens: int
    text_tokens: int
    longest_tokens: int
    over_pack: int  # records longer than a pack: they cannot be trained on
    longest_answer: int  # tokens
    over_budget: int  # records whose answer is longer than decode.max_new_tokens
    packs: int
    stage1_passes: float  # passes of stage 1 over the training records
    parameters: int
    disk_bytes: int
    memory: Memory  # of one step of stage 1 on one device
    training_flops: Mapping[str, float]  # of stage1, stage2 and stage1-control


def needs_of(run: RunConfig, records: Iterable[Record]) -> Needs:
    """Estimate the needs of training on these records.

    Raises:
        CheckpointError: the model folder of the profile has no weights, no tokenizer, or no Qwen3-VL config.json.
        DataError: the aspect ratio of an image is too large for the model.
    """
    profile, folder = run.profile, model_folder(run.profile.model.path)
    check_config(folder)
    config = Qwen3VLConfig.from_pretrained(folder, local_files_only=True)
    pixels = pixel_spec(config, profile.model.min_pixels, profile.model.max_pixels)
    count = _token_counter(folder)
    per_object = tokens_per_object(count, run.params.text.codec)
    lengths, answers, image_tokens = [], [], 0
    for record in records:
        visual = pixels.tokens(*resized_size(record.width, record.height, pixels))
        image_tokens += visual
        answers.append(_answer_tokens(record, per_object, count))
        lengths.append(visual + _prompt_tokens(record, count) + answers[-1])
    parameters = count_parameters(folder)
    pack_tokens = profile.packing.pack_tokens
    packs = max(1, ceil(sum(lengths) / pack_tokens))
    memory = _step_memory(config.to_dict(), profile, sum(lengths), image_tokens)
    return Needs(
        train_records=len(lengths),
        image_tokens=image_tokens,
        text_tokens=sum(lengths) - image_tokens,
        longest_tokens=max(lengths, default=0),
        over_pack=sum(length > pack_tokens for length in lengths),
        longest_answer=max(answers, default=0),
        over_budget=sum(tokens > run.params.decode.max_new_tokens for tokens in answers),
        packs=packs,
        stage1_passes=profile.stage1.steps * profile.stage1.packs_per_step / packs,
        parameters=parameters,
        disk_bytes=CHECKPOINTS_WRITTEN * WEIGHT * parameters + memory.weights + memory.moments + 8 * sum(lengths),
        memory=memory,
        training_flops=training_flops(profile, parameters, sum(lengths) / max(1, len(lengths))),
    )


def _step_memory(config: Mapping[str, Any], profile: Profile, tokens: int, image_tokens: int) -> Memory:
    """Memory for full packs with the data's ratio of image to text; nearly all text is counted as supervised."""
    in_forward = rows_in_forward(profile) * profile.packing.pack_tokens
    visual = round(in_forward * image_tokens / max(1, tokens))
    optimizer = profile.stage1.optimizer
    memory = step_memory(config, profile.tuning, optimizer, in_forward, visual, in_forward - visual)
    is_sharded = profile.launch.sharding != "none" and _processes(profile) > 1
    return sharded_memory(memory, config, _processes(profile)) if is_sharded else memory


def rows_in_forward(profile: Profile) -> int:
    """Number of packs per forward pass on one device."""
    most = -(-profile.stage1.packs_per_step // _processes(profile))
    return min(profile.launch.rows_per_forward or most, most)


def _processes(profile: Profile) -> int:
    """Number of training processes in the profile. "One per GPU" counts as one process: the worst case per device."""
    return max(1, profile.launch.processes)


def token_flops(profile: Profile, parameters: int) -> float:
    """FLOPs per training token: 6 N (Kaplan et al., arXiv:2001.08361, section 2.1), 8 N with recomputed activations."""
    return (8.0 if profile.tuning.activations == "recompute" else 6.0) * parameters


def training_flops(profile: Profile, parameters: int, tokens_per_sample: float) -> dict[str, float]:
    """FLOPs of each training stage; channel B runs two forward passes."""
    stage1 = profile.stage1.steps * profile.stage1.packs_per_step * profile.packing.pack_tokens
    stage2 = 2 * profile.stage2.steps * profile.stage2.samples_per_step * tokens_per_sample
    per_token = token_flops(profile, parameters)
    # The control gets the same number of tokens as stage 2.
    return {"stage1": per_token * stage1, "stage2": per_token * stage2, "stage1-control": per_token * stage2}


def _prompt_tokens(record: Record, count: Callable[[str], int]) -> int:
    return FRAME_TOKENS + count(question(record.metadata.get("prompt") or {"kind": "open"}))


def _answer_tokens(record: Record, per_object: int, count: Callable[[str], int]) -> int:
    asked = asked_names(record.metadata.get("prompt"))
    objects = [o for o in record.objects if not o.metadata.get("iscrowd") and (asked is None or o.desc in asked)]
    return sum(count(o.desc) for o in objects) + per_object * len(objects)


def _token_counter(folder: Path) -> Callable[[str], int]:
    """A function that counts the tokens of a text with the checkpoint's tokenizer; raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; model.path must be a checkpoint folder with its tokenizer.")
    tokenizer = Tokenizer.from_file(str(path))
    return lru_cache(maxsize=65_536)(lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))


def tokens_per_object(count: Callable[[str], int], codec: str) -> int:
    """Number of scaffold and coordinate tokens of one object, without its description; `count` counts tokens."""
    pair = get_codec(codec).segments([TextObject("a", (1, 2, 3, 4))] * 2)
    second = [segment for segment in pair if segment.object_index == 1 and segment.role != Role.DESC]
    # After norm1000, a coordinate is one token.
    return sum(1 if s.role is Role.COORD else count(s.text) for s in second)


def count_parameters(folder: Path) -> int:
    """Number of parameters of a checkpoint, from its safetensors headers; raises CheckpointError without such files."""
    return sum(prod(shape) for shape in weight_shapes(folder).values())
