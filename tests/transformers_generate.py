"""`generate` of transformers in left-padded batches: the reference for the in-memory engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from coordexp.models.loading import Checkpoint
from coordexp.packing.pixels import load_sample_rgb, patchify
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Generation
from coordexp.text.codecs import END_OF_TURN
from coordexp.text.grammar import AnswerGrammar
from coordexp.text.grammar_walk import AnswerWalk
from coordexp.text.vocabulary import token_id


class GrammarProcessor(LogitsProcessor):
    """Masks tokens that the rows' walks do not allow; one per call of `generate`, with prompts of `prompt_length`."""

    def __init__(self, grammar: AnswerGrammar, n_rows: int, prompt_length: int) -> None:
        self._walks = [AnswerWalk(grammar) for _ in range(n_rows)]
        self._taken = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with the logits of forbidden tokens at -inf; rows that ended may only end."""
        for column in input_ids[:, self._taken :].T.tolist():
            for walk, token in zip(self._walks, column, strict=True):
                walk.advance(token)
        self._taken = input_ids.shape[1]
        mask = torch.from_numpy(np.stack([walk.allowed() for walk in self._walks]))
        masked = torch.full_like(scores, -torch.inf)
        masked[:, : mask.shape[1]] = scores[:, : mask.shape[1]].masked_fill(~mask, -torch.inf)
        return masked


def model_inputs(checkpoint: Checkpoint, image_root: Path, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The prompts with their images, padded on the left."""
    image_id, pixels = checkpoint.model.config.image_token_id, checkpoint.pixels
    prompts = [s.expanded_prompt_ids(image_id) for s in samples]
    width = max(len(p) for p in prompts)
    ids = np.full((len(prompts), width), checkpoint.tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    images = [load_sample_rgb(image_root, s.image, s.resized_width, s.resized_height) for s in samples]
    grids = [(1, image.shape[0] // pixels.patch_size, image.shape[1] // pixels.patch_size) for image in images]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": torch.from_numpy((ids == image_id).astype(np.int64)),
        "pixel_values": torch.from_numpy(np.concatenate([patchify(image, pixels) for image in images])),
        "image_grid_thw": torch.tensor(grids, dtype=torch.int64),
    }


def options_of(checkpoint: Checkpoint, request: DecodeRequest) -> dict[str, Any]:
    """The arguments of `generate` for a request, except for its grammar."""
    decode, config = request.params, checkpoint.model.config
    options: dict[str, Any] = {
        "max_new_tokens": decode.max_new_tokens,
        "do_sample": decode.temperature > 0,
        "num_beams": decode.beams,
        "repetition_penalty": decode.repetition_penalty,
        "eos_token_id": token_id(checkpoint.tokenizer, END_OF_TURN),
        "pad_token_id": checkpoint.tokenizer.pad_token_id,
        "suppress_tokens": [config.image_token_id, config.video_token_id],
        "top_k": 0 if decode.temperature > 0 else None,
    }
    if decode.temperature > 0:
        options |= {"temperature": decode.temperature, "top_p": decode.top_p}
    return options


@torch.inference_mode()
def generate(
    checkpoint: Checkpoint, image_root: Path, samples: Sequence[Sample], request: DecodeRequest, batch: int
) -> list[Generation]:
    """One generation per sample, in batches of similar prompt length."""
    order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt_length, i))
    grammar, found = request.grammar(checkpoint.tokenizer), {}
    options = options_of(checkpoint, request)
    checkpoint.model.eval()
    for first in range(0, len(order), batch):
        chunk = order[first : first + batch]
        inputs = model_inputs(checkpoint, image_root, [samples[i] for i in chunk])
        width = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList([GrammarProcessor(grammar, len(chunk), width)] if grammar else [])
        output = checkpoint.model.generate(**inputs, **options, logits_processor=processors)
        found |= zip(chunk, output[:, width:].numpy(), strict=True)
    return [_trim(found[i], options["eos_token_id"]) for i in range(len(samples))]


def _trim(row: np.ndarray, end_id: int) -> Generation:
    ends = np.flatnonzero(row == end_id)
    if len(ends):
        return Generation(row[: ends[0] + 1].astype(np.int32), "stop")
    return Generation(row.astype(np.int32), "length")
