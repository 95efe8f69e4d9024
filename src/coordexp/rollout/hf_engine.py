"""The reference engine: Hugging Face `generate` in left-padded batches of similar length.

Shapes: B rows, T tokens so far, V logits.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from coordexp.config.schema import DecodeParams
from coordexp.infra.device import inference_autocast
from coordexp.infra.random_streams import stream_seed
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint
from coordexp.packing.pixels import load_sample_rgb, patchify
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Generation, Journal, request_key
from coordexp.text.codecs import END_OF_TURN
from coordexp.text.grammar import AnswerGrammar
from coordexp.text.grammar_walk import AnswerWalk
from coordexp.text.vocabulary import token_id

log = logging.getLogger(__name__)


def batch_keys(samples: Sequence[Sample], request: DecodeRequest, image_root: Path, first: int) -> list[str]:
    """A journal key for each answer of a batch. The whole batch is in it: padding and draws depend on its company."""
    own = [request_key(sample, request, image_root) for sample in samples]
    company = hashlib.sha256(f"{first}:{own}".encode()).hexdigest()[:16]
    return [f"{company}-{key}" for key in own]


class GrammarProcessor(LogitsProcessor):
    """Masks what the walks of the rows do not allow; one for each `generate`, whose prompts have `prompt_length`."""

    def __init__(self, grammar: AnswerGrammar, n_rows: int, prompt_length: int) -> None:
        self._walks = [AnswerWalk(grammar) for _ in range(n_rows)]
        self._taken = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with the logits of forbidden tokens at -inf; rows that ended may only end."""
        for column in input_ids[:, self._taken :].T.tolist():
            for walk, token in zip(self._walks, column, strict=True):
                walk.advance(token)
        self._taken = input_ids.shape[1]
        allowed = np.stack([walk.allowed() for walk in self._walks])
        masked = torch.full_like(scores, -torch.inf)
        mask = torch.from_numpy(allowed).to(scores.device)
        # The embedding may have more rows than the tokenizer has tokens: those stay forbidden.
        n_tokens = mask.shape[1]
        masked[:, :n_tokens] = scores[:, :n_tokens].masked_fill(~mask, -torch.inf)
        return masked


class HfEngine:
    """Runs `generate` on the model in memory; the weights are used as they are at the time of the call."""

    def __init__(
        self, checkpoint: Checkpoint, image_root: Path, batch_images: int, journal: Journal | None = None
    ) -> None:
        """With a journal, finished batches survive an interruption; without one, nothing is kept."""
        self._checkpoint = checkpoint
        self._image_root = image_root
        self._batch_images = batch_images
        self._journal = journal
        self._end_id = token_id(checkpoint.tokenizer, END_OF_TURN)
        self._pad_id = int(checkpoint.tokenizer.pad_token_id)

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample; batches hold prompts of similar length, results keep the samples' order."""
        order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt_length, i))
        results: dict[int, Generation] = {}
        done = self._journal.read(len(input_table(self._checkpoint.model).weight)) if self._journal else {}
        grammar = request.grammar(self._checkpoint.tokenizer)
        model = self._checkpoint.model
        was_training = model.training
        model.eval()
        started = time.monotonic()
        for first in range(0, len(order), self._batch_images):
            chunk = order[first : first + self._batch_images]
            batch = [samples[i] for i in chunk]
            keys = batch_keys(batch, request, self._image_root, first)
            if not done.keys() >= set(keys):
                torch.manual_seed(stream_seed(request.seed, "decode/batch", first))
                with inference_autocast(model):  # also when asked from within a training step
                    done |= zip(keys, self._run(batch, request.params, grammar), strict=True)
                self._keep(keys, done)
            results |= zip(chunk, (done[key] for key in keys), strict=True)
            tokens = sum(len(g.ids) for g in results.values())
            rate = tokens / (time.monotonic() - started)
            log.info("generated %d of %d images, %.0f tokens/s", len(results), len(samples), rate)
        model.train(was_training)
        return [results[i] for i in range(len(samples))]

    def _keep(self, keys: Sequence[str], done: Mapping[str, Generation]) -> None:
        if self._journal:
            for key in keys:
                self._journal.append(key, done[key])

    @torch.inference_mode()
    def _run(self, samples: Sequence[Sample], params: DecodeParams, grammar: AnswerGrammar | None) -> list[Generation]:
        inputs = self._inputs(samples)
        width = inputs["input_ids"].shape[1]
        processors = [GrammarProcessor(grammar, len(samples), width)] if grammar else []
        config = self._checkpoint.model.config
        options: dict[str, int | float | list[int] | LogitsProcessorList | None] = {
            "max_new_tokens": params.max_new_tokens,
            "do_sample": params.temperature > 0,
            "repetition_penalty": params.repetition_penalty,
            "logits_processor": LogitsProcessorList(processors),
            "eos_token_id": self._end_id,
            "pad_token_id": self._pad_id,
            # They stand for pictures: an answer that holds one could not be read by the model again.
            "suppress_tokens": [config.image_token_id, config.video_token_id],
            "top_k": 0 if params.temperature > 0 else None,
        }
        if params.temperature > 0:
            options |= {"temperature": params.temperature, "top_p": params.top_p}
        # transformers types `self` as a protocol that its own models do not meet, and no keyword of a model's inputs.
        output = self._checkpoint.model.generate(**inputs, **options)  # type: ignore[misc, arg-type]
        new = output[:, width:].cpu().numpy()
        return [self._trim(row) for row in new]

    def _trim(self, row: np.ndarray) -> Generation:
        ends = np.flatnonzero(row == self._end_id)
        if len(ends):
            return Generation(row[: ends[0] + 1].astype(np.int32), "stop")
        return Generation(row.astype(np.int32), "length")

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        image_id = self._checkpoint.model.config.image_token_id
        pixels = self._checkpoint.pixels
        prompts = [s.expanded_prompt_ids(image_id) for s in samples]
        width = max(len(p) for p in prompts)
        ids = np.full((len(prompts), width), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        images = [load_sample_rgb(self._image_root, s.image, s.resized_width, s.resized_height) for s in samples]
        grids = [(1, image.shape[0] // pixels.patch_size, image.shape[1] // pixels.patch_size) for image in images]
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "mm_token_type_ids": torch.from_numpy((ids == image_id).astype(np.int64)),
            "pixel_values": torch.from_numpy(np.concatenate([patchify(image, pixels) for image in images])),
            "image_grid_thw": torch.tensor(grids, dtype=torch.int64),
        }
        device = self._checkpoint.model.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}
