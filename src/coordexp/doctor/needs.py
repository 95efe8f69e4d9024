"""What a run will need, estimated from the records alone: tokens, packs, passes over the data, disk, memory.

Image tokens are exact (the same resize as in training). Instruction, names, scaffold and coordinates are counted
with the model's tokenizer; the frame around them is a constant.
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

FRAME_TOKENS = 15  # role headers, image markers and the end of the answer
CHECKPOINTS_WRITTEN = 4  # init, stage1, stage1-control, stage2, in float32; a resume state comes beside them


@dataclass(frozen=True, slots=True)
class Needs:
    """The plan of a run; sizes in bytes."""

    train_records: int
    image_tokens: int
    text_tokens: int
    longest_tokens: int
    over_pack: int  # records longer than a pack: they cannot be trained on
    longest_answer: int  # tokens
    over_budget: int  # records with a longer answer than decode.max_new_tokens
    packs: int
    stage1_passes: float  # how often stage 1 sees the training records
    parameters: int
    disk_bytes: int
    memory: Memory  # of one step of stage 1 on one device
    training_flops: Mapping[str, float]  # of stage1, stage2 and stage1-control


def needs_of(run: RunConfig, records: Iterable[Record]) -> Needs:
    """Estimate the needs of training on these records.

    Raises:
        CheckpointError: the model folder of the profile has no weights, no tokenizer, or no Qwen3-VL's config.json.
        DataError: an image is too long and thin to be given to the model.
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
    """Of full packs with the mixture of the data; answers are nearly all of the text."""
    in_forward = rows_in_forward(profile) * profile.packing.pack_tokens
    visual = round(in_forward * image_tokens / max(1, tokens))
    optimizer = profile.stage1.optimizer
    memory = step_memory(config, profile.tuning, optimizer, in_forward, visual, in_forward - visual)
    is_sharded = profile.launch.sharding != "none" and _processes(profile) > 1
    return sharded_memory(memory, config, _processes(profile)) if is_sharded else memory


def rows_in_forward(profile: Profile) -> int:
    """Packs that one device takes through the model at a time."""
    most = -(-profile.stage1.packs_per_step // _processes(profile))
    return min(profile.launch.rows_per_forward or most, most)


def _processes(profile: Profile) -> int:
    """Training processes as far as the profile says; one for each GPU counts as one, which is the most for a device."""
    return max(1, profile.launch.processes)


def token_flops(profile: Profile, parameters: int) -> float:
    """Of training on one token: 6 N (Kaplan et al., 2001.08361), 8 N if activations are recomputed."""
    return (8.0 if profile.tuning.activations == "recompute" else 6.0) * parameters


def training_flops(profile: Profile, parameters: int, tokens_per_sample: float) -> dict[str, float]:
    """Of each stage that trains; channel B runs two forwards."""
    stage1 = profile.stage1.steps * profile.stage1.packs_per_step * profile.packing.pack_tokens
    stage2 = 2 * profile.stage2.steps * profile.stage2.samples_per_step * tokens_per_sample
    per_token = token_flops(profile, parameters)
    # The control gets the tokens of stage 2.
    return {"stage1": per_token * stage1, "stage2": per_token * stage2, "stage1-control": per_token * stage2}


def _prompt_tokens(record: Record, count: Callable[[str], int]) -> int:
    return FRAME_TOKENS + count(question(record.metadata.get("prompt") or {"kind": "open"}))


def _answer_tokens(record: Record, per_object: int, count: Callable[[str], int]) -> int:
    asked = asked_names(record.metadata.get("prompt"))
    objects = [o for o in record.objects if not o.metadata.get("iscrowd") and (asked is None or o.desc in asked)]
    return sum(count(o.desc) for o in objects) + per_object * len(objects)


def _token_counter(folder: Path) -> Callable[[str], int]:
    """Number of tokens of a text in the checkpoint's tokenizer; CheckpointError without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; model.path must be a checkpoint folder with its tokenizer.")
    tokenizer = Tokenizer.from_file(str(path))
    return lru_cache(maxsize=65_536)(lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))


def tokens_per_object(count: Callable[[str], int], codec: str) -> int:
    """Scaffold and coordinate tokens of one object without its name, by the tokens that `count` finds in a text."""
    pair = get_codec(codec).segments([TextObject("a", (1, 2, 3, 4))] * 2)
    second = [segment for segment in pair if segment.object_index == 1 and segment.role != Role.DESC]
    # A coordinate is one token once norm1000 has added them to the tokenizer.
    return sum(1 if s.role is Role.COORD else count(s.text) for s in second)


def count_parameters(folder: Path) -> int:
    """Parameters of a checkpoint, from the headers of its safetensors files; raises CheckpointError without any."""
    return sum(prod(shape) for shape in weight_shapes(folder).values())
