"""Load and save plain Hugging Face checkpoints, without downloads and without running code from a model folder."""

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
# Files besides tokenizer.json that a tokenizer may be built from.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFormat:
    """What is needed to prompt a model and to read its answers."""

    tokenizer: PreTrainedTokenizerBase
    pixels: PixelSpec
    detection: DetectionConfig

    @property
    def coord(self) -> CoordVocabulary | None:
        """Its coordinate tokens; None before norm1000 adds them."""
        return self.detection.coordinates

    @property
    def codec(self) -> str:
        """The codec of its answers, a key of text.codecs.CODECS."""
        return self.detection.codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(ModelFormat):
    """A model together with its format."""

    model: Qwen3VLForConditionalGeneration

    def collator(self, image_root: Path, pack_tokens: int = 0) -> Collator:
        """A collator for its batches; `pack_tokens` bounds the rows if the collator assigns segments to rows."""
        image_id, pad_id = self.model.config.image_token_id, self.tokenizer.pad_token_id
        return Collator(image_root, self.pixels, image_id, pad_id, pack_tokens)


def load_checkpoint(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Checkpoint:
    """Load a checkpoint folder in float32 on the CPU, to modify or train it; use `load_for_inference` to generate.

    Args:
        folder: a Hugging Face folder.
        min_pixels: minimum image area from now on. None: as its processor files specify (all checkpoints except the
            pretrained model of a profile).
        max_pixels: maximum image area. None: likewise.

    Raises:
        CheckpointError: the folder is not a Qwen3-VL checkpoint; its safetensors weights are missing, damaged, or do
            not match its config; its coordinate tokens are inconsistent; its tokenizer needs code from the folder; or
            its processor files or coordexp.json are missing or invalid.
        DamagedArtefactError: a file differs from what training wrote.
    """
    return _with_model(folder, load_format(folder, min_pixels, max_pixels), torch.float32)


def load_for_inference(folder: Path, device: str = AUTO) -> Checkpoint:
    """Load a checkpoint that only generates, on the device from `choose_device`, in the precision for that device."""
    return place_for_inference(folder, load_format(folder), device)


def place_for_inference(folder: Path, form: ModelFormat, device: str = AUTO) -> Checkpoint:
    """As `load_for_inference`, if the format is loaded already."""
    plan = inference_plan(choose_device(device)).adopt()
    checkpoint = _with_model(folder, form, plan.frozen)
    checkpoint.model.to(plan.device)  # type: ignore[arg-type]  # an untyped decorator
    return checkpoint


def load_format(folder: Path, min_pixels: int | None = None, max_pixels: int | None = None) -> ModelFormat:
    """Everything of a checkpoint except the weights; arguments and errors as for `load_checkpoint`."""
    check_config(folder)
    verify_files(folder, decides_answer)
    config = read_config(folder)
    form = _format(folder, config)
    check_fits(folder, config, weight_shapes(folder))
    low = form.pixels.min_pixels if min_pixels is None else min_pixels
    high = form.pixels.max_pixels if max_pixels is None else max_pixels
    return replace(form, pixels=replace(form.pixels, min_pixels=low, max_pixels=high))


def read_format(folder: Path) -> ModelFormat:
    """As `load_format`, for a folder whose weights may be missing or changed."""
    check_config(folder)
    return _format(folder, read_config(folder))


def _format(folder: Path, config: Qwen3VLConfig) -> ModelFormat:
    transformers_logging.disable_progress_bar()
    tokenizer = _load_tokenizer(folder, config)
    coord = CoordVocabulary.from_tokenizer(tokenizer) if has_coord_tokens(tokenizer) else None
    if (last := max(tokenizer.get_vocab().values())) >= config.to_dict()["text_config"]["vocab_size"]:
        CHECKPOINT.refuse(str(folder), f"its tokenizer has the id {last}, outside the vocabulary of config.json")
    if (folder / GENERATION).exists():
        checked(folder / GENERATION, GenerationFile)
    _check_template(folder, tokenizer)
    pixels, detection = read_pixel_spec(folder, config), read_detection_config(folder, coord)
    return ModelFormat(tokenizer=tokenizer, pixels=pixels, detection=detection)


def vocabulary_size(folder: Path) -> int:
    """Number of token ids that the model of a checkpoint can emit: its tables may have more rows than tokens."""
    return int(read_config(folder).to_dict()["text_config"]["vocab_size"])


def _with_model(folder: Path, form: ModelFormat, dtype: torch.dtype) -> Checkpoint:
    model = _load_model(folder, dtype)
    return Checkpoint(model=model, tokenizer=form.tokenizer, pixels=form.pixels, detection=form.detection)


def check_config(folder: Path) -> None:
    """Raise CheckpointError unless the folder has a tokenizer and a Qwen3-VL configuration."""
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
            f"{path}: quantization_config is {quantised!r:.60}, expected plain weights. Use the checkpoint from before "
            "quantization."
        )


def _load_tokenizer(folder: Path, config: Qwen3VLConfig) -> PreTrainedTokenizerBase:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            CHECKPOINT.read_json(folder / name)
    checked(folder / "tokenizer_config.json", TokenizerConfigFile)
    has_file = (folder / "tokenizer.json").exists()
    file = checked(folder / "tokenizer.json", TokenizerFile) if has_file else None
    if file:
        _check_added_tokens(folder / "tokenizer.json", file)
    remedy = "Expected tokenizer files of Qwen3-VL that need no custom code. " + CHECKPOINT.remedy
    with faults_of(folder, "the tokenizer cannot be loaded", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    _check_special_tokens(folder / "tokenizer_config.json", tokenizer, file)
    return tokenizer


def _check_added_tokens(path: Path, file: TokenizerFile) -> None:
    """Refuse a token with two ids: libraries disagree on which one they use."""
    tokens = [token.content for token in file.added_tokens]
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
    if twice:
        raise CheckpointError(
            f"{path}: {len(twice)} added tokens occur twice (first: {twice[0]}). Expected one id per token; rebuild it "
            "from a tokenizer without them."
        )


def _check_special_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, file: TokenizerFile | None) -> None:
    """Refuse a special token that the vocabulary lacks: transformers would give it a new id without an embedding."""
    if tokenizer.pad_token is None:
        CHECKPOINT.refuse(str(path), "has no pad_token")
    known = {token.content for token in file.added_tokens} | set(file.model.vocab) if file else tokenizer.get_vocab()
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if (token := getattr(tokenizer, role)) is not None and token not in known:
            CHECKPOINT.refuse(str(path), f"{role} is {shown(token)}, which tokenizer.json lacks")


def _check_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Render a prompt once, as for every image."""
    with faults_of(folder, "its chat template cannot render a prompt"):
        ids, pads = question_ids(tokenizer, "a"), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if (count := int((ids == pads).sum())) != 1:
        CHECKPOINT.refuse(str(folder), f"its chat template renders {count} image placeholders in a prompt, not one")


def _load_model(folder: Path, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    """The model with all weights from the files: by default, transformers initializes missing weights randomly."""
    model: Qwen3VLForConditionalGeneration
    info: dict[str, Iterable[Any]]
    remedy = "Copy the checkpoint again, or run the stage that writes it."
    with faults_of(folder, "the model cannot be built from its config.json and safetensors weights", remedy):
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(  # type: ignore[misc]  # untyped: gives a pair here
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",  # override the folder: others need more packages or kernels from the Hub
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if lost:
        raise CheckpointError(
            f"{folder}: weights that config.json requires are not in the safetensors files or have another shape "
            f"({len(lost)} in all, first {min(lost)}). Take config and weights from the same checkpoint."
        )
    # Drop the folder's generation settings, such as beams or a time limit: decoding is set by parameters alone.
    ids = {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return use_segment_attention(model)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, weights: dict[str, Tensor] | None = None) -> None:
    """Write a plain checkpoint that transformers and vLLM load without our code, and feed with the same pixels.

    `weights` are the weights by name if the model itself does not hold them complete (sharded, or with adapters).
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        checkpoint.model.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise os_error(error, folder) from error
    checkpoint.tokenizer.save_pretrained(folder)
    write_processor_files(folder, checkpoint.pixels)
    write_detection_config(folder, checkpoint.detection)
