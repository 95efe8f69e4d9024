"""The rollouts that channel B trains on: those on file, or periodically refreshed ones, matched again in each step.

A fresh set is generated before the first step of channel B in each window of `every` steps, with the weights at that
step, and only for the images of that window. If an image gets several answers, the one that matches best is kept. The
set is written to the resume folder before it is used, so a resumed run reads it and continues exactly as if it had not
been interrupted. With several processes, each one answers some of the images.

Either the model in training generates the answers, or servers that load its weights from a checkpoint. Sharded weights
need the servers: vLLM's own weight transfers (NCCL, CUDA IPC) would require vLLM in the training interpreter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from coordexp.config.run import RunConfig
from coordexp.config.schema import MatchingParams, Params
from coordexp.errors import DamagedArtefactError, DataError
from coordexp.infra.artefacts import HASHES, damage, sealing
from coordexp.infra.files import remove
from coordexp.infra.foreign import Gate
from coordexp.infra.provenance import write_json
from coordexp.infra.random_streams import stream_seed
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.packing.samples import Sample, SampleStore
from coordexp.rollout.engine import DecodeRequest, Engine, Generation, Journal
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.opening import generate_answers
from coordexp.rollout.records import Rollout, match_rollouts, parsed_rollout, read_generations, write_generations
from coordexp.text.parser import ParsedAnswer
from coordexp.training.checkpoint import trained_sha256
from coordexp.training.distributed import any_process, from_main, shared_out, world
from coordexp.training.recorder import stopping_at_once
from coordexp.training.schedule import ramp
from coordexp.training.sharding import plain_weights

log = logging.getLogger(__name__)

ROLLOUTS, COMPUTE, ANSWERS = "rollouts.jsonl", "compute.json", "answers"
BILL = Gate("the token counts of fresh rollouts", DataError, "Delete the folder to start this stage at step 0.")
MatchSchedule = Callable[[int], MatchingParams]


def match_schedule(params: Params, steps: int) -> MatchSchedule:
    """Matching parameters by step: a linear ramp to those of `matching` over the curriculum's fraction of the steps."""
    final, stage2 = params.matching, params.stage2
    ramp_steps = round(stage2.curriculum_fraction * steps)
    gate = ramp(stage2.gate_from, final.gate_threshold, ramp_steps)
    lambda_sem = ramp(stage2.lambda_sem_from, final.lambda_sem, ramp_steps)
    return lambda step: final.model_copy(update={"gate_threshold": gate(step), "lambda_sem": lambda_sem(step)})


@dataclass(frozen=True, slots=True)
class Refresh:
    """A fresh set: the step of channel B before which it is generated, and the samples (store indices) it holds."""

    step: int
    items: tuple[int, ...]


def plan_refreshes(items_by_step: Mapping[int, Sequence[int]], every: int) -> list[Refresh]:
    """The fresh sets of a run, from the samples of each step of channel B; the first window has none, nor `every` 0."""
    windows: dict[int, list[int]] = {}
    for step in sorted(items_by_step):
        if every > 0 and step >= every:
            windows.setdefault(step // every, []).append(step)
    return [
        Refresh(steps[0], tuple(sorted({item for step in steps for item in items_by_step[step]})))
        for steps in windows.values()
    ]


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """Writes the weights in training as a checkpoint, starts servers on it, generates, and stops the servers.

    `weights` are given by name if the model does not hold plain weights itself, because it is sharded or has adapters.
    """

    run: RunConfig
    checkpoint: Checkpoint
    weights: dict[str, Tensor] | None
    folder: Path

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample."""
        profile, served = self.run.profile, self.folder / "served"
        remove(served)  # left by a killed run
        save_checkpoint(served, self.checkpoint, self.weights)
        batch_images = profile.rollout.batch_images
        generations, _, _ = generate_answers(
            profile, self.checkpoint, served, self.run.paths.raw, batch_images, samples, request
        )
        remove(served)
        return generations


def engine_of_now(run: RunConfig, checkpoint: Checkpoint, folder: Path) -> Engine:
    """The engine that generates with the current weights; a collective call."""
    if run.profile.rollout.engine == "hf":
        # The hash of the weights names the journal, so an interrupted set resumes only with the same weights, which
        # repeated steps reproduce.
        journal = Journal(folder / f"{ANSWERS}-{trained_sha256(checkpoint.model)[:12]}.jsonl")
        own = journal.of_process(world().rank)
        return HfEngine(checkpoint, run.paths.raw, run.profile.rollout.batch_images, own)
    model = checkpoint.model
    weights = plain_weights(model)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # leave the memory that the allocator caches to the servers
    return ServedEngine(run, checkpoint, weights, folder)


class Refresher:
    """Generates, stores and reloads fresh sets. `engine_of_now` returns an engine with the current weights."""

    def __init__(
        self,
        refreshes: Sequence[Refresh],
        engine_of_now: Callable[[], Engine],
        parse: Callable[[Generation], ParsedAnswer],
        request: DecodeRequest,
        store: SampleStore,
        vocabulary_size: int,
        folder: Path,
        model: nn.Module,
        further: DecodeRequest | None = None,
        n_further: int = 0,
        matching: MatchSchedule | None = None,
    ) -> None:
        """The forwards of `model` serve as heartbeats of the engine.

        In addition to the answer to `request`, the engine generates `n_further` answers to the request `further`; the
        answer that matches best is kept.
        """
        assert not n_further or (further and matching), "several answers need a request and a matching"
        self._refreshes = refreshes
        self._engine_of_now = engine_of_now
        self._parse = parse
        self._request = request
        self._store = store
        self._vocabulary_size = vocabulary_size
        self._folder = folder
        self._model = model
        self._further = (further,) * n_further if further else ()
        self._matching = matching
        self._loaded: tuple[Refresh, dict[int, Rollout], dict[str, float]] | None = None

    @property
    def steps(self) -> frozenset[int]:
        """The steps before which a fresh set is generated."""
        return frozenset(refresh.step for refresh in self._refreshes)

    def load(self, step: int) -> None:
        """Load the set of a step; generate it with the current weights if it is not on disk."""
        refresh = self._current(step)
        if refresh is None or (self._loaded and self._loaded[0] == refresh):
            return
        generations, compute = self._kept(refresh, step) or self._generate(refresh)
        self._loaded = refresh, {i: self._rollout(i, g) for i, g in generations.items()}, compute

    def at(self, step: int) -> tuple[dict[int, Rollout], dict[str, float]] | None:
        """The loaded set by image, and its token counts if this is the step for which it was generated.

        None before the first refresh.
        """
        refresh = self._current(step)
        if refresh is None:
            return None
        assert self._loaded, f"step {step}: its rollouts are not loaded"
        loaded, rollouts, compute = self._loaded
        assert loaded == refresh, f"step {step}: the rollouts of step {loaded.step} are loaded"
        return rollouts, compute if refresh.step == step else {}

    def _rollout(self, image_id: int, generation: Generation) -> Rollout:
        return parsed_rollout(image_id, generation, self._parse(generation))

    def _current(self, step: int) -> Refresh | None:
        earlier = [refresh for refresh in self._refreshes if refresh.step <= step]
        return earlier[-1] if earlier else None

    def _place(self, refresh: Refresh) -> Path:
        """The folder of a set."""
        return self._folder / f"rollouts-{refresh.step}"

    def _kept(self, refresh: Refresh, step: int) -> tuple[dict[int, Generation], dict[str, float]] | None:
        """The set that an interrupted run saved; None if there is none and this is the step to generate it.

        Raises:
            DamagedArtefactError: the set is damaged or missing.
        """
        # After the first step of its window the set must exist: the weights that generated it are gone.
        place = self._place(refresh)
        if step == refresh.step and not any_process(world().is_main and (place / HASHES).exists()):
            return None
        for fault in damage(place):
            raise DamagedArtefactError(
                f"{fault} Expected the fresh rollouts that the interrupted run wrote; delete {self._folder} to start "
                "this stage at step 0."
            )
        return read_generations(place / ROLLOUTS, self._vocabulary_size), BILL.read_object(place / COMPUTE)

    def _generate(self, refresh: Refresh) -> tuple[dict[int, Generation], dict[str, float]]:
        log.info("fresh rollouts of %d images before step %d", len(refresh.items), refresh.step)
        samples = [self._store[i] for i in refresh.items]
        seed = stream_seed(self._request.seed, "decode/fresh-rollouts", refresh.step)
        first = replace(self._request, seed=seed, keep_probs=False)
        # A sample is repeated once per answer of a kind; each repetition gets a seed of its own.
        asked = [(first, 1)]
        if self._further:
            asked.append((replace(self._further[0], seed=seed, keep_probs=False), len(self._further)))
        # The random numbers of training must not depend on how many the engine draws.
        with torch.random.fork_rng(), stopping_at_once():
            what = f"fresh rollouts of step {refresh.step}"
            engine = self._engine_of_now()

            def answer(own: Sequence[Sample]) -> list[list[Generation]]:
                found: list[list[Generation]] = [[] for _ in own]
                for request, times in asked:
                    made = engine.generate([sample for sample in own for _ in range(times)], request)
                    for i, generation in enumerate(made):
                        found[i // times].append(generation)
                return found

            if isinstance(engine, ServedEngine):
                answers = from_main(what, lambda: answer(samples))
            else:
                answers = shared_out(what, samples, answer, self._model)
        by_image = {s.image_id: g for s, g in zip(samples, self._best(samples, answers, refresh.step), strict=True)}
        compute: dict[str, float] = {
            "rollout/prompt_tokens": sum(sample.prompt_length for sample in samples),
            "rollout/generated_tokens": sum(len(g.ids) for answered in answers for g in answered),
        }
        if world().is_main:
            with sealing(self._place(refresh)) as folder:
                write_generations(folder / ROLLOUTS, by_image)
                write_json(folder / COMPUTE, compute)
            for journal in self._folder.glob(f"{ANSWERS}-*.jsonl"):
                remove(journal)
        return by_image, compute

    def _best(self, samples: Sequence[Sample], answers: Sequence[Sequence[Generation]], step: int) -> list[Generation]:
        """For each image the answer with the highest F1 in matching, then the highest IoU, then the lowest index."""
        if self._matching is None or not self._further:
            return [answered[0] for answered in answers]
        matching = self._matching(step)
        flat = [(s, g) for s, answered in zip(samples, answers, strict=True) for g in answered]
        rollouts = [self._rollout(sample.image_id, generation) for sample, generation in flat]
        found = iter(match_rollouts(rollouts, [sample for sample, _ in flat], matching))
        best = []
        for sample, answered in zip(samples, answers, strict=True):
            n_true = len(sample.descs) - sum(sample.iscrowd)
            merits = [_merit(next(found), n_true) for _ in answered]
            best.append(answered[merits.index(max(merits))])
        return best


def _merit(rollout: Rollout, n_true: int) -> tuple[float, float]:
    """F1 of a matched rollout and mean IoU of its pairs; F1 is 1 for an empty answer to an image without objects."""
    total = len(rollout.objects) + n_true
    f1 = 2 * len(rollout.pairs) / total if total else 1.0
    return f1, sum(rollout.pair_ious) / max(1, len(rollout.pairs))


class RolloutPool:
    """Rollouts by step, matched with the threshold and costs of the step."""

    def __init__(
        self, on_file: Mapping[int, Rollout], matching: MatchSchedule, refresher: Refresher | None = None
    ) -> None:
        self._on_file = on_file
        self._matching = matching
        self._refresher = refresher

    @property
    def refresh_steps(self) -> frozenset[int]:
        """The steps before which fresh rollouts are generated."""
        return self._refresher.steps if self._refresher else frozenset()

    def refresh(self, step: int) -> None:
        """Generate or load the set that `at` returns for a step. All processes must call it, in the main thread."""
        if self._refresher:
            self._refresher.load(step)

    def at(self, step: int, samples: Sequence[Sample]) -> tuple[dict[int, Rollout], dict[str, float]]:
        """Matched rollouts of these samples by image, and values to log; call `refresh` for the step first."""
        matching = self._matching(step)
        fresh = self._refresher.at(step) if self._refresher else None
        rollouts, logs = (self._on_file, {}) if fresh is None else fresh
        matched = match_rollouts([rollouts[s.image_id] for s in samples], samples, matching)
        return {rollout.image_id: rollout for rollout in matched}, logs
