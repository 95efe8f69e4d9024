"""Loading and saving plain Hugging Face checkpoints; nothing is fetched and no code of a model folder is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from coordexp.errors import CheckpointError
from coordexp.models.pixel_format import pixel_spec
from coordexp.packing.pixels import PixelSpec
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with all that is needed to feed it and read it. `coord` is None before norm1000 added the tokens."""

    model: Qwen3VLForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    pixels: PixelSpec
    coord: CoordVocabulary | None

    @property
    def codec_name(self) -> str | None:
        """ "digits" for a model without coordinate tokens; otherwise the parameters decide (None)."""
        return "digits" if self.coord is None else None


def load_checkpoint(folder: Path, min_pixels: int, max_pixels: int, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load a checkpoint folder.

    Raises:
        CheckpointError: the folder is no checkpoint, has no safetensors weights, or broken coordinate tokens.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name}; expected a Hugging Face checkpoint folder. Run the stage that writes it."
            )
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no *.safetensors weights; other formats can execute code and are refused.")
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True
    )
    coord = CoordVocabulary.from_tokenizer(tokenizer) if has_coord_tokens(tokenizer) else None
    return Checkpoint(model, tokenizer, pixel_spec(model.config, min_pixels, max_pixels), coord)


def save_checkpoint(folder: Path, model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a plain checkpoint that Hugging Face and vLLM load without code of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
