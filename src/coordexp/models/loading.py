"""Loading and saving plain Hugging Face checkpoints; nothing is fetched and no code of a model folder is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from coordexp.errors import CheckpointError
from coordexp.infra.artefacts import verify_files
from coordexp.infra.device import AUTO, choose_device, inference_plan
from coordexp.infra.files import os_error
from coordexp.infra.foreign import shown
from coordexp.infra.provenance import decides_answer
from coordexp.models.attention import use_segment_attention
from coordexp.models.detection_config import DetectionConfig, read_detection_config, write_detection_config
from coordexp.models.folder import (
    CHECKPOINT,
    GENERATION,
    GenerationFile,
    TokenizerConfigFile,
    TokenizerFile,
    check_fits,
    checked,
    faults_of,
    read_config,
    weight_shapes,
)
from coordexp.models.processor import read_pixel_spec, write_processor_files
from coordexp.packing.collator import Collator
from coordexp.packing.pixels import PixelSpec
from coordexp.text.prompts import IMAGE_TOKEN, question_ids
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens

MODEL_TYPE = Qwen3VLConfig.model_type
# Beside tokenizer.json, what a tokenizer may be made from.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFormat:
    """What is needed to ask a model and to read its answers."""

    tokenizer: PreTrainedTokenizerBase
    pixels: PixelSpec
    detection: DetectionConfig

    @property
    def coord(self) -> CoordVocabulary | None:
        """Its coordinate tokens; None before norm1000 added them."""
        return self.detection.coordinates

    @property
    def codec(self) -> str:
        """In which of text.codecs.CODECS it answers."""
        return self.detection.codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(ModelFormat):
    """A model with its format."""

    model: Qwen3VLForConditionalGeneration

    def collator(self, image_root: Path, pack_tokens: int = 0) -> Collator:
        """What lays out its batches, in rows of so many tokens where it chooses them."""
        image_id, pad_id = self.model.config.image_token_id, self.tokenizer.pad_token_id
        return Collator(image_root, self.pixels, image_id, pad_id, pack_tokens)


def load_checkpoint(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Checkpoint:
    """Load a checkpoint folder in float32 onto the CPU, to change or to train it; `load_for_inference` is for answers.

    Args:
        folder: a Hugging Face folder.
        min_pixels: smallest image area that the model is given from now on. None, for all but a profile's base model:
            as its processor files say.
        max_pixels: largest image area. None: likewise.

    Raises:
        CheckpointError: the folder is no checkpoint or one of another model, its safetensors weights are missing,
            damaged or not those of its config, its coordinate tokens are broken, its tokenizer wants to run code, its
            processor files or coordexp.json do not say how it is used.
        DamagedArtefactError: a file is not the one that training wrote.
    """
    return _with_model(folder, load_format(folder, min_pixels, max_pixels), torch.float32)


def load_for_inference(folder: Path, device: str = AUTO) -> Checkpoint:
    """Load a checkpoint that only answers: on the device that `choose_device` gives, in the precision for it."""
    return place_for_inference(folder, load_format(folder), device)


def place_for_inference(folder: Path, form: ModelFormat, device: str = AUTO) -> Checkpoint:
    """As `load_for_inference`, where the format is known already."""
    plan = inference_plan(choose_device(device)).adopt()
    checkpoint = _with_model(folder, form, plan.frozen)
    checkpoint.model.to(plan.device)  # type: ignore[arg-type]  # an untyped decorator
    return checkpoint


def load_format(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ModelFormat:
    """Everything of a checkpoint but the weights; arguments and errors as of `load_checkpoint`."""
    check_config(folder)
    verify_files(folder, decides_answer)
    form = read_format(folder)
    check_fits(folder, read_config(folder), weight_shapes(folder))
    low = form.pixels.min_pixels if min_pixels is None else min_pixels
    high = form.pixels.max_pixels if max_pixels is None else max_pixels
    return replace(form, pixels=replace(form.pixels, min_pixels=low, max_pixels=high))


def read_format(folder: Path) -> ModelFormat:
    """As `load_format`, of a folder whose weights may be missing or others than training wrote."""
    check_config(folder)
    transformers_logging.disable_progress_bar()
    config, tokenizer = read_config(folder), _load_tokenizer(folder)
    coord = CoordVocabulary.from_tokenizer(tokenizer) if has_coord_tokens(tokenizer) else None
    if (last := max(tokenizer.get_vocab().values())) >= config.to_dict()["text_config"]["vocab_size"]:
        CHECKPOINT.refuse(str(folder), f"its tokenizer has the id {last}, beyond the vocabulary of config.json")
    if (folder / GENERATION).exists():
        checked(folder / GENERATION, GenerationFile)
    _check_template(folder, tokenizer)
    pixels, detection = read_pixel_spec(folder, config), read_detection_config(folder, coord)
    return ModelFormat(tokenizer=tokenizer, pixels=pixels, detection=detection)


def vocabulary_size(folder: Path) -> int:
    """How many token ids the model of a checkpoint can emit: its tables may have more rows than there are tokens."""
    return int(read_config(folder).to_dict()["text_config"]["vocab_size"])


def _with_model(folder: Path, form: ModelFormat, dtype: torch.dtype) -> Checkpoint:
    model = _load_model(folder, dtype)
    return Checkpoint(model=model, tokenizer=form.tokenizer, pixels=form.pixels, detection=form.detection)


def check_config(folder: Path) -> None:
    """Raise CheckpointError unless the folder has a tokenizer and the configuration of a Qwen3-VL."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name}; expected a Hugging Face checkpoint folder. Run the stage that writes it."
            )
    path = folder / "config.json"
    config = CHECKPOINT.read_object(path)
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise CheckpointError(
            f"{path}: model_type is {found!r:.60}, expected {MODEL_TYPE!r}. Only Qwen3-VL checkpoints can be loaded."
        )
    if quantised := config.get("quantization_config"):
        raise CheckpointError(
            f"{path}: quantization_config is {quantised!r:.60}, expected plain weights. Take the checkpoint that was "
            "quantised."
        )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            CHECKPOINT.read_json(folder / name)
    checked(folder / "tokenizer_config.json", TokenizerConfigFile)
    has_file = (folder / "tokenizer.json").exists()
    file = checked(folder / "tokenizer.json", TokenizerFile) if has_file else None
    if file:
        _check_added_tokens(folder / "tokenizer.json", file)
    remedy = "Expected tokenizer files of Qwen3-VL that need no code of their own. " + CHECKPOINT.remedy
    with faults_of(folder, "the tokenizer cannot be loaded", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    _check_special_tokens(folder / "tokenizer_config.json", tokenizer, file)
    return tokenizer


def _check_added_tokens(path: Path, file: TokenizerFile) -> None:
    """Refuse a token with two ids: which one a library takes is its own affair, and no two agree."""
    tokens = [token.content for token in file.added_tokens]
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
    if twice:
        raise CheckpointError(
            f"{path}: {len(twice)} added tokens stand there twice (first: {twice[0]}). Expected one id for each; "
            "rebuild it from a tokenizer without them."
        )


def _check_special_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, file: TokenizerFile | None) -> None:
    """Refuse a role for a token that the vocabulary lacks: transformers would give it a new id, of no embedding."""
    if tokenizer.pad_token is None:
        CHECKPOINT.refuse(str(path), "names no pad_token")
    known = {token.content for token in file.added_tokens} | set(file.model.vocab) if file else tokenizer.get_vocab()
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if (token := getattr(tokenizer, role)) is not None and token not in known:
            CHECKPOINT.refuse(str(path), f"{role} is {shown(token)}, which tokenizer.json lacks")


def _check_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Render a question once, as each image's will be."""
    with faults_of(folder, "a question cannot be put by the chat template"):
        ids, pads = question_ids(tokenizer, "a"), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if (count := int((ids == pads).sum())) != 1:
        CHECKPOINT.refuse(str(folder), f"its chat template gives a question {count} places for an image, not one")


def _load_model(folder: Path, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    """The model, every weight of which came from the files: transformers alone would draw missing ones at random."""
    model: Qwen3VLForConditionalGeneration
    info: dict[str, Iterable[Any]]
    remedy = "Copy the checkpoint again, or run the stage that writes it."
    with faults_of(folder, "the model cannot be built from its config.json and safetensors weights", remedy):
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(  # type: ignore[misc]  # untyped: gives a pair here
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",  # whatever the folder names: others need packages or kernels from a hub
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if lost:
        raise CheckpointError(
            f"{folder}: weights that config.json asks for are not in the safetensors files or have another shape "
            f"({len(lost)} in all, first {min(lost)}). Take config and weights from one checkpoint."
        )
    # Beams or a time limit that a folder asks for would change answers; how they are generated is a parameter.
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return use_segment_attention(model)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, weights: dict[str, Tensor] | None = None) -> None:
    """Write a plain checkpoint that Hugging Face and vLLM load without code of ours, and feed with the same pixels.

    `weights` are those of the model by name, where it does not hold them whole itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint.model.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise os_error(error, folder) from error
    checkpoint.tokenizer.save_pretrained(folder)
    write_processor_files(folder, checkpoint.pixels)
    write_detection_config(folder, checkpoint.detection)
