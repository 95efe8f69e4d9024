"""The engine in memory: the model as it is, decoded by slots (rollout/slot_decoder.py), in fixed groups of samples."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordexp.infra.device import inference_plan
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, Generation, Journal, request_key
from coordexp.rollout.slot_decoder import SlotDecoder
from coordexp.text.grammar import AnswerGrammar

log = logging.getLogger(__name__)

# Samples of a group, in units of those that are open together. Slots are empty at the end of a group alone, so a large
# one wastes less; what an interruption costs is one group.
GROUP_BATCHES = 8


def group_keys(samples: Sequence[Sample], request: DecodeRequest, image_root: Path, slots: int) -> list[str]:
    """A journal key for each answer of a group. The whole group is in it: which answers are open together decides the
    last bits of every number."""
    own = [request_key(sample, request, image_root) for sample in samples]
    company = hashlib.sha256(f"{slots}:{request.keep_probs}:{own}".encode()).hexdigest()[:16]
    return [f"{company}-{key}" for key in own]


class HfEngine:
    """Answers by the model in memory; the weights are used as they are at the time of the call."""

    def __init__(
        self, checkpoint: Checkpoint, image_root: Path, batch_images: int, journal: Journal | None = None
    ) -> None:
        """`batch_images` answers are open at a time. With a journal, finished groups survive an interruption."""
        self._checkpoint = checkpoint
        self._image_root = image_root
        self._batch_images = batch_images
        self._journal = journal

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample; groups hold prompts of similar length, results keep the samples' order."""
        order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt_length, i))
        results: dict[int, Generation] = {}
        model = self._checkpoint.model
        done = self._journal.read(len(input_table(model).weight)) if self._journal else {}
        grammar = request.grammar(self._checkpoint.tokenizer)
        was_training = model.training
        model.eval()
        started = time.monotonic()
        for first in range(0, len(order), GROUP_BATCHES * self._batch_images):
            places = order[first : first + GROUP_BATCHES * self._batch_images]
            group = [samples[i] for i in places]
            keys = group_keys(group, request, self._image_root, self._batch_images)
            if not done.keys() >= set(keys):
                done |= zip(keys, self._run(group, request, grammar), strict=True)
                self._keep(keys, done)
            results |= zip(places, (done[key] for key in keys), strict=True)
            tokens = sum(len(g.ids) for g in results.values())
            rate = tokens / (time.monotonic() - started)
            log.info("generated %d of %d images, %.0f tokens/s", len(results), len(samples), rate)
        model.train(was_training)
        return [results[i] for i in range(len(samples))]

    def _run(
        self, samples: Sequence[Sample], request: DecodeRequest, grammar: AnswerGrammar | None
    ) -> list[Generation]:
        checkpoint = self._checkpoint
        image_id, pad_id = checkpoint.model.config.image_token_id, checkpoint.tokenizer.pad_token_id
        collator = Collator(self._image_root, checkpoint.pixels, image_id, pad_id, pack_tokens=0)
        plan = inference_plan(checkpoint.model.device)
        with plan.autocast(checkpoint.model):  # also when asked from within a training step
            return SlotDecoder(checkpoint, collator, request, grammar, self._batch_images).decode(samples)

    def _keep(self, keys: Sequence[str], done: Mapping[str, Generation]) -> None:
        if self._journal:
            for key in keys:
                self._journal.append(key, done[key])
