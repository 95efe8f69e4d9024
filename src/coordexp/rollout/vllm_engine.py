"""The vLLM engine: answers over HTTP from servers that hold the checkpoint.

A request specifies exactly the computation of the in-memory engine: the same resized pixels (sent losslessly), the same
prompt tokens (checked in the reply, because another template or image size would shift every box), and the same
constraints. Order and results do not depend on timing.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from coordexp.infra.random_streams import stream_seed
from coordexp.packing.pixels import load_sample_rgb
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Generation, Journal, answer_seeds, request_key
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_reply import Expected, read_completion
from coordexp.text.codecs import END_OF_TURN
from coordexp.text.prompts import IMAGE_TOKEN, question_text
from coordexp.text.vocabulary import token_id

log = logging.getLogger(__name__)

CONSTRAINTS_KEY = "coordexp_constraints"  # the extra argument for the server's logits processor


class VllmEngine:
    """Generates on a pool of servers; every finished answer goes into the journal first."""

    def __init__(
        self,
        pool: ServerPool,
        tokenizer: PreTrainedTokenizerBase,
        image_root: Path,
        concurrency: int,
        journal: Journal,
        *,
        vocabulary_size: int | None = None,
    ) -> None:
        """`vocabulary_size` is the number of logits, which may exceed the number of tokens (the default)."""
        self._pool = pool
        self._tokenizer = tokenizer
        self._image_root = image_root
        self._concurrency = concurrency
        self._journal = journal
        self._vocabulary_size = vocabulary_size or len(tokenizer)
        self._image_id = token_id(tokenizer, IMAGE_TOKEN)
        self._end_id = token_id(tokenizer, END_OF_TURN)

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample; answers of an interrupted run come from the journal.

        Raises:
            DataError: the image of a sample cannot be read.
            ServerError: no server is left that gives valid answers to the same prompt tokens.
        """
        requests = [replace(request, seed=seed) for seed in answer_seeds(samples, request.seed)]
        keys = [request_key(sample, one, self._image_root) for sample, one in zip(samples, requests, strict=True)]
        done = self._journal.read(self._vocabulary_size)
        todo = [i for i, key in enumerate(keys) if key not in done]
        if len(todo) < len(samples):
            log.info("%d of %d answers exist from an earlier run", len(samples) - len(todo), len(samples))
        self._pool.check()
        common = self._common(request)
        started = time.monotonic()
        with ThreadPoolExecutor(self._concurrency) as workers:
            tasks = {workers.submit(self._one, i, samples[i], keys[i], requests[i], common): i for i in todo}
            try:
                for finished, task in enumerate(as_completed(tasks), 1):
                    done[keys[tasks[task]]] = task.result()
                    if finished % 100 == 0 or finished == len(todo):
                        rate = finished / (time.monotonic() - started)
                        log.info("generated %d of %d images, %.1f images/s", finished, len(todo), rate)
            finally:
                workers.shutdown(cancel_futures=True)  # after a failure, cancel the pending requests
        return [done[key] for key in keys]

    def _common(self, request: DecodeRequest) -> dict[str, Any]:
        """The common part of all requests. The server enforces the grammar, our logits processor the geometry.

        Without geometric constraints the processor is not loaded. An answer under a grammar alone that reaches its
        budget is then truncated, whereas the in-memory engine closes it in time.
        """
        params = request.params
        body: dict[str, Any] = {
            "model": self._pool.weights.name,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": -1,
            "repetition_penalty": params.repetition_penalty,
            "stop_token_ids": [self._end_id],
            "bad_words": [IMAGE_TOKEN],  # a placeholder for visual input: the model could not re-read such an answer
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if grammar := request.grammar(self._tokenizer):
            body["structured_outputs"] = {"grammar": grammar.to_lark()}
        if params.needs_walk:
            constraints = {"codec": request.codec, "decode": params.model_dump(), "names": request.names}
            body["vllm_xargs"] = {CONSTRAINTS_KEY: json.dumps(constraints)}
        return body

    def _one(self, index: int, sample: Sample, key: str, request: DecodeRequest, common: dict[str, Any]) -> Generation:
        content = [
            {"type": "image_url", "image_url": {"url": self._data_url(sample)}},
            {"type": "text", "text": question_text(self._tokenizer, sample.prompt_ids)},
        ]
        # One seed per image: the sampled answer depends neither on the server nor on its other requests.
        seed = stream_seed(request.seed, "decode/request", sample.image_id)
        body = common | {"seed": seed, "messages": [{"role": "user", "content": content}]}
        expected = Expected(
            model=self._pool.weights.name,
            prompt_ids=sample.expanded_prompt_ids(self._image_id).tolist(),
            vocabulary_size=self._vocabulary_size,
            max_new_tokens=request.params.max_new_tokens,
            end_id=self._end_id,
            image_id=self._image_id,
        )
        generation = self._pool.ask(index, body, lambda reply: read_completion(reply, expected))
        self._journal.append(key, generation)
        return generation

    def _data_url(self, sample: Sample) -> str:
        pixels = load_sample_rgb(self._image_root, sample.image, sample.resized_width, sample.resized_height)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "png", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
