"""Validation of checkpoint folders: their files are foreign, and every problem becomes a CheckpointError.

JSON is checked by key and type where it is read. The exceptions of transformers and tokenizers have no common base
class, so `faults_of` converts all of them. Before a model is built, its configuration is compared with the headers of
the weights: a folder of 6 MB whose configuration needs 500 GB is refused in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import Qwen3VLConfig

from coordexp.errors import CheckpointError, CoordExpError
from coordexp.infra.foreign import Gate, first_fault, open_regular, shown
from coordexp.infra.provenance import weight_files

CHECKPOINT = Gate(
    "a file of a Qwen3-VL checkpoint",
    CheckpointError,
    "Take it from the folder that the weights come from.",
    max_bytes=1 << 28,
)
INDEX, GENERATION = "model.safetensors.index.json", "generation_config.json"
_PANIC = "PanicException"  # raised by libraries in Rust; not a subclass of Exception
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Rate = Annotated[float, Field(ge=0, le=1)]
_Token = str | dict[str, Any] | None


class _Checked(BaseModel):
    """Some keys of a JSON file; transformers checks the others."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


CheckedT = TypeVar("CheckedT", bound=_Checked)


class _AddedToken(_Checked):
    id: _Id
    content: str


class _TokenizerModel(_Checked):
    vocab: dict[str, _Id]


class _TextConfig(_Checked):
    vocab_size: _Size | None = None
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    num_hidden_layers: _Size | None = None
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    max_position_embeddings: _Size | None = None
    hidden_act: str | None = None
    rms_norm_eps: _Rate | None = None
    initializer_range: _Rate | None = None
    attention_dropout: _Rate | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool | None = None


class _VisionConfig(_Checked):
    depth: _Size | None = None
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    num_heads: _Size | None = None
    num_position_embeddings: _Size | None = None
    out_hidden_size: _Size | None = None
    in_channels: _Size | None = None
    patch_size: _Size | None = None
    spatial_merge_size: _Size | None = None
    temporal_patch_size: _Size | None = None
    deepstack_visual_indexes: list[_Id] | None = None
    hidden_act: str | None = None
    initializer_range: _Rate | None = None


class ConfigFile(_Checked):
    """The checked keys of config.json; transformers has a default for each."""

    model_type: str | None = None
    text_config: _TextConfig
    vision_config: _VisionConfig
    image_token_id: _Id | None = None
    video_token_id: _Id | None = None
    vision_start_token_id: _Id | None = None
    vision_end_token_id: _Id | None = None
    tie_word_embeddings: bool | None = None


class TokenizerConfigFile(_Checked):
    """The checked keys of tokenizer_config.json."""

    tokenizer_class: str | None = None
    backend: str | None = None
    clean_up_tokenization_spaces: bool | None = None
    model_max_length: Annotated[float, Field(gt=0)] | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    pad_token: _Token = None
    unk_token: _Token = None


class TokenizerFile(_Checked):
    """The checked keys of tokenizer.json."""

    added_tokens: list[_AddedToken]
    model: _TokenizerModel


class GenerationFile(_Checked):
    """The checked keys of generation_config.json; no others are used."""

    bos_token_id: _Id | list[_Id] | None = None
    eos_token_id: _Id | list[_Id] | None = None
    pad_token_id: _Id | None = None


class IndexFile(_Checked):
    """The checked keys of model.safetensors.index.json: the file of each weight."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\\x00]+\.safetensors$")]]


class faults_of:
    """Within the block, every exception becomes a CheckpointError that names the folder and the operation.

    CoordExpErrors and out-of-memory errors pass unchanged.
    """

    def __init__(self, folder: Path, what: str, remedy: str = CHECKPOINT.remedy) -> None:
        self._folder, self._what, self._remedy = folder, what, remedy

    def __enter__(self) -> None:
        """Enter the block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Convert the exception, if there is one."""
        is_fault = isinstance(error, Exception) or type(error).__name__ == _PANIC
        if not is_fault or isinstance(error, CoordExpError | MemoryError | torch.OutOfMemoryError):
            return
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason if len(reason) <= 400 else reason[:400] + "..."
        raise CheckpointError(f"{self._folder}: {self._what} ({reason}). {self._remedy}") from error


def checked(path: Path, kind: type[CheckedT]) -> CheckedT:
    """Read a JSON file of a checkpoint and check its keys; raises CheckpointError with file and key."""
    value = CHECKPOINT.read_object(path)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        CHECKPOINT.refuse(str(path), first_fault(error.errors()), error)


def read_config(folder: Path) -> Qwen3VLConfig:
    """Read config.json with transformers; raises CheckpointError."""
    checked(folder / "config.json", ConfigFile)
    with faults_of(folder, "config.json is not a readable Qwen3-VL configuration"):
        return Qwen3VLConfig.from_pretrained(folder, local_files_only=True)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight, from the headers of the safetensors files.

    Raises:
        CheckpointError: there are no such files, a file is damaged, or the index does not match them.
    """
    in_file: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in weight_files(folder):
        try:
            with open_regular(path, None):
                pass
            with safe_open(path, "pt") as weights:
                names = weights.keys()
                in_file[path.name] = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: the safetensors weights are incomplete or damaged: {path.name}: {error}. Copy the "
                "checkpoint again, or run the stage that writes it."
            ) from error
    if not in_file:
        raise CheckpointError(f"{folder}: no *.safetensors weights; other formats can execute code and are not loaded.")
    if (folder / INDEX).exists():
        named = checked(folder / INDEX, IndexFile).weight_map
        if lost := sorted(set(named.values()) - in_file.keys()):
            CHECKPOINT.refuse(str(folder / INDEX), f"lists {shown(lost[0])}, which is not in the folder")
        if absent := sorted(name for name, file in named.items() if name not in in_file[file]):
            CHECKPOINT.refuse(str(folder / INDEX), f"lists {shown(absent[0])}, which {shown(named[absent[0]])} lacks")
    return {name: shape for shapes in in_file.values() for name, shape in shapes.items()}


def check_fits(folder: Path, config: Qwen3VLConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if config.json describes a larger model than the weights contain."""
    total = sum(prod(shape) for shape in shapes.values())
    bounds = [((key,), len(shapes)) for key in _LAYERS] + [(keys, total) for keys in _IN_WEIGHTS]
    for keys, most in bounds:
        if (wanted := prod(_whole(folder, config, key) for key in keys)) > most:
            CHECKPOINT.refuse(
                str(folder / "config.json"),
                f"{' x '.join(dict.fromkeys(keys))} is {wanted:,}, but the weights are {len(shapes):,} tensors of "
                f"{total:,} numbers",
            )


_LAYERS = ("text_config.num_hidden_layers", "vision_config.depth")
# Sizes of weight matrices: each product must not exceed the total number of weights. A squared factor is listed twice.
_IN_WEIGHTS = tuple(
    tuple(f"{part}.{name}" for name in names.split())
    for part, names in (
        ("text_config", "vocab_size hidden_size"),
        ("text_config", "num_hidden_layers hidden_size intermediate_size"),
        ("text_config", "num_hidden_layers num_attention_heads head_dim hidden_size"),
        ("text_config", "num_hidden_layers num_key_value_heads head_dim hidden_size"),
        ("vision_config", "depth hidden_size intermediate_size"),
        ("vision_config", "num_position_embeddings hidden_size"),
        ("vision_config", "in_channels temporal_patch_size patch_size patch_size hidden_size"),
        ("vision_config", "hidden_size spatial_merge_size spatial_merge_size out_hidden_size"),
        ("vision_config", "num_heads"),
    )
)


def _whole(folder: Path, config: Qwen3VLConfig, key: str) -> int:
    part, name = key.split(".")
    value = getattr(getattr(config, part), name, None)
    if type(value) is not int or not 0 < value < 2**31:
        CHECKPOINT.refuse(str(folder / "config.json"), f"{key} is {shown(value)}, not a positive integer")
    return value
