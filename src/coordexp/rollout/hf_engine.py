"""The in-memory engine: decodes fixed groups of samples in slots (rollout/slot_decoder.py) with the loaded model."""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordexp.infra.device import inference_plan
from coordexp.models.forward import input_table
from coordexp.models.loading import Checkpoint
from coordexp.packing.samples import Sample
from coordexp.rollout.beam_search import BeamSearch
from coordexp.rollout.engine import DecodeRequest, Generation, Journal, answer_seeds, request_key
from coordexp.rollout.slot_decoder import SlotDecoder
from coordexp.text.grammar import AnswerGrammar

log = logging.getLogger(__name__)

# Samples per group, in multiples of the answers that are open at a time. Slots run empty only at the end of a group, so
# a large group wastes less; an interruption costs at most one group per process.
GROUP_BATCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Samples that one process answers together, and the seeds of their answers.

    The composition of a batch affects the last bits of every number. It therefore depends on the samples alone, not on
    the number of processes.
    """

    samples: Sequence[Sample]
    seeds: Sequence[int]
    image_root: Path
    batch_images: int

    def keys(self, request: DecodeRequest) -> list[str]:
        """The journal key of each answer; it depends on the whole group."""
        own = [
            request_key(sample, replace(request, seed=seed), self.image_root)
            for sample, seed in zip(self.samples, self.seeds, strict=True)
        ]
        company = hashlib.sha256(f"{self.batch_images}:{request.keep_probs}:{own}".encode()).hexdigest()[:16]
        return [f"{company}-{key}" for key in own]


class GroupEngine(ABC):
    """Answers group by group, in this process or in others, each with `batch_images` open answers at a time.

    With a journal, finished groups survive an interruption.
    """

    def __init__(self, image_root: Path, batch_images: int, journal: Journal | None = None) -> None:
        self._image_root = image_root
        self._batch_images = batch_images
        self._journal = journal

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample, in their order; a group has prompts of similar length."""
        order = sorted(range(len(samples)), key=lambda i: (samples[i].prompt_length, i))
        seeds, size = answer_seeds(samples, request.seed), GROUP_BATCHES * self._batch_images
        places = [order[first : first + size] for first in range(0, len(order), size)]
        groups = [self._group([samples[i] for i in part], [seeds[i] for i in part]) for part in places]
        results = self._kept(places, groups, request)
        todo = [(part, group) for part, group in zip(places, groups, strict=True) if part[0] not in results]
        started, n_new, n_tokens = time.monotonic(), 0, 0
        answers = self._answers((group for _, group in todo), request)
        for (part, _), generations in zip(todo, answers, strict=True):
            results |= zip(part, generations, strict=True)
            n_new, n_tokens = n_new + len(part), n_tokens + sum(len(g.ids) for g in generations)
            rate = n_tokens / (time.monotonic() - started)
            log.info("generated %d of %d images, %.0f tokens/s", len(results), len(samples), rate)
        return [results[i] for i in range(len(samples))]

    def stream(
        self, parts: Iterable[Sequence[Sample]], request: DecodeRequest, image_root: Path
    ) -> Iterator[list[Generation]]:
        """The answers of each part, in order, as soon as they are ready; each part is a group, with its own images."""
        groups = (self._group(part, answer_seeds(part, request.seed)) for part in parts)
        return self._answers((replace(group, image_root=image_root) for group in groups), request)

    def _group(self, samples: Sequence[Sample], seeds: Sequence[int]) -> Group:
        return Group(samples=samples, seeds=seeds, image_root=self._image_root, batch_images=self._batch_images)

    def _kept(
        self, places: Sequence[Sequence[int]], groups: Sequence[Group], request: DecodeRequest
    ) -> dict[int, Generation]:
        """The answers of groups that are complete in the journal, by sample index."""
        done = self._journal.read(self._vocabulary_size()) if self._journal else {}
        kept: dict[int, Generation] = {}
        for part, group in zip(places, groups, strict=True) if done else ():
            keys = group.keys(request)
            if done.keys() >= set(keys):
                kept |= zip(part, (done[key] for key in keys), strict=True)
        return kept

    @abstractmethod
    def _answers(self, groups: Iterable[Group], request: DecodeRequest) -> Iterator[list[Generation]]:
        """The answers of each group, in order, written to the journal before they are returned."""

    @abstractmethod
    def _vocabulary_size(self) -> int:
        """The number of token ids that the model can emit."""

    @abstractmethod
    def close(self) -> None:
        """End the worker processes, if there are any."""


class HfEngine(GroupEngine):
    """Generates with the model in memory and its current weights."""

    def __init__(
        self, checkpoint: Checkpoint, image_root: Path, batch_images: int, journal: Journal | None = None
    ) -> None:
        super().__init__(image_root, batch_images, journal)
        self._checkpoint = checkpoint

    def _answers(self, groups: Iterable[Group], request: DecodeRequest) -> Iterator[list[Generation]]:
        grammar = request.grammar(self._checkpoint.tokenizer)
        for group in groups:
            generations = answer_group(self._checkpoint, group, request, grammar)
            keep(group, generations, request, self._journal)
            yield generations

    def _vocabulary_size(self) -> int:
        return len(input_table(self._checkpoint.model).weight)

    def close(self) -> None:
        """No-op: the model belongs to the caller."""


def answer_group(
    checkpoint: Checkpoint, group: Group, request: DecodeRequest, grammar: AnswerGrammar | None
) -> list[Generation]:
    """The answers of a group by a model in memory, which returns to its previous mode."""
    model, was_training = checkpoint.model, checkpoint.model.training
    decoder = SlotDecoder if request.params.beams == 1 else BeamSearch
    model.eval()
    with inference_plan(model.device).autocast(model):  # also when called from within a training step
        opened = decoder(checkpoint, checkpoint.collator(group.image_root), request, grammar, group.batch_images)
        generations = opened.decode(group.samples, group.seeds)
    model.train(was_training)
    return generations


def keep(group: Group, generations: Sequence[Generation], request: DecodeRequest, journal: Journal | None) -> None:
    """Append the answers of a group to a journal."""
    if journal:
        for key, generation in zip(group.keys(request), generations, strict=True):
            journal.append(key, generation)
