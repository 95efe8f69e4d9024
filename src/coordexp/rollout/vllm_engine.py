"""The vLLM engine: answers over HTTP from servers that hold the checkpoint.

What is asked for is exactly what the Hugging Face engine computes: the same resized pixels (sent losslessly), the same
prompt tokens (compared, and refused if they differ), the same constraints. Order and results do not depend on timing.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerBase

from coordexp.errors import TrainingError
from coordexp.packing.pixels import load_rgb
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeSettings, Generation
from coordexp.rollout.journal import Journal, request_key
from coordexp.rollout.vllm_client import SERVED_NAME, ServerPool
from coordexp.text.codecs import END_OF_TURN
from coordexp.text.grammar import AnswerGrammar
from coordexp.text.prompts import IMAGE_TOKEN, TASKS, expand_image
from coordexp.text.vocabulary import token_id

log = logging.getLogger(__name__)

CONSTRAINTS_KEY = "coordexp_constraints"  # of the extra arguments that the server's logits processor reads
_SEED_STRIDE = 1_000_003


class VllmEngine:
    """Generates on a pool of servers; every finished answer goes into the journal first."""

    def __init__(
        self,
        pool: ServerPool,
        tokenizer: PreTrainedTokenizerBase,
        image_root: Path,
        concurrency: int,
        journal: Journal,
    ) -> None:
        self._pool = pool
        self._tokenizer = tokenizer
        self._image_root = image_root
        self._concurrency = concurrency
        self._journal = journal
        self._image_id = token_id(tokenizer, IMAGE_TOKEN)
        self._end_id = token_id(tokenizer, END_OF_TURN)

    def generate(self, samples: Sequence[Sample], settings: DecodeSettings) -> list[Generation]:
        """One generation per sample; answers of an interrupted run are taken from the journal.

        Raises:
            TrainingError: the servers failed, or one of them sees another prompt than we do.
        """
        keys = [request_key(sample, settings) for sample in samples]
        done = self._journal.read()
        todo = [i for i, key in enumerate(keys) if key not in done]
        if len(todo) < len(samples):
            log.info("%d of %d answers are there from an earlier run", len(samples) - len(todo), len(samples))
        self._pool.check()
        common = self._common(settings)
        started = time.monotonic()
        with ThreadPoolExecutor(self._concurrency) as workers:
            tasks = {workers.submit(self._one, i, samples[i], keys[i], settings, common): i for i in todo}
            try:
                for finished, task in enumerate(as_completed(tasks), 1):
                    done[keys[tasks[task]]] = task.result()
                    if finished % 100 == 0 or finished == len(todo):
                        rate = finished / (time.monotonic() - started)
                        log.info("generated %d of %d images, %.1f images/s", finished, len(todo), rate)
            finally:
                workers.shutdown(cancel_futures=True)  # after a failure, do not ask what nobody will read
        return [done[key] for key in keys]

    def _common(self, settings: DecodeSettings) -> dict[str, Any]:
        """What all requests share. The grammar goes to the server's own decoder, the rest to our logits processor."""
        body: dict[str, Any] = {
            "model": SERVED_NAME,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": -1,
            "repetition_penalty": settings.repetition_penalty,
            "stop_token_ids": [self._end_id],
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if settings.constraints is not None:
            grammar = AnswerGrammar(self._tokenizer, settings.constraints)
            body["structured_outputs"] = {"grammar": grammar.to_lark()}
            body["vllm_xargs"] = {CONSTRAINTS_KEY: json.dumps(asdict(settings.constraints))}
        return body

    def _one(
        self, index: int, sample: Sample, key: str, settings: DecodeSettings, common: dict[str, Any]
    ) -> Generation:
        content = [
            {"type": "image_url", "image_url": {"url": self._data_url(sample)}},
            {"type": "text", "text": TASKS["detect"]},
        ]
        # A seed per picture: what is sampled depends neither on the server nor on what else it is doing.
        seed = (settings.seed + sample.image_id * _SEED_STRIDE) & 0x7FFFFFFF
        body = common | {"seed": seed, "messages": [{"role": "user", "content": content}]}
        response = self._pool.ask(index, body)
        self._check_prompt(sample, response["prompt_token_ids"])
        generation = self._generation(response["choices"][0])
        self._journal.append(key, generation)
        return generation

    def _generation(self, choice: dict[str, Any]) -> Generation:
        ids = np.array(choice["token_ids"], np.int32)
        ends = np.flatnonzero(ids == self._end_id)
        return Generation(ids[: ends[0] + 1], "stop") if len(ends) else Generation(ids, "length")

    def _data_url(self, sample: Sample) -> str:
        pixels = load_rgb(self._image_root / sample.image, sample.resized_width, sample.resized_height)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "png", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()

    def _check_prompt(self, sample: Sample, theirs: Sequence[int]) -> None:
        """A server that resizes differently or has another template would shift every box; refuse it."""
        ours = expand_image(sample.prompt_ids, self._image_id, sample.n_image_tokens)
        if not np.array_equal(ours, np.asarray(theirs)):
            raise TrainingError(
                f"{sample.image}: the server's prompt differs from ours at {_first_difference(ours, theirs)}. Expected "
                "the same chat template and image size; serve the checkpoint's own folder with its own processor files."
            )


def _first_difference(ours: NDArray[np.int32], theirs: Sequence[int]) -> str:
    shared = min(len(ours), len(theirs))
    unequal = np.flatnonzero(ours[:shared] != np.asarray(theirs[:shared]))
    if len(unequal):
        i = int(unequal[0])
        return f"token {i} (ours {int(ours[i])}, theirs {theirs[i]})"
    return f"its length (ours {len(ours)} tokens, theirs {len(theirs)})"
