"""The rollouts that channel B trains on: those on file, and fresh ones every so many steps, matched anew in each step.

A fresh set is generated before the first step of channel B in each window of `every` steps, by the weights of that
moment, for the images of that window alone. It is written to the resume folder before it is used: a resumed run reads
it, and goes on exactly as if it had not been interrupted. Of several processes each answers some of the images.

The model in training generates itself; or servers do, which are given its weights as a checkpoint. That is the way for
weights that are sharded, too: vLLM's own transfers (NCCL, CUDA IPC) would need vLLM in the interpreter that trains.
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
from coordexp.errors import DamagedArtefactError
from coordexp.infra.artefacts import HASHES, damage, sealing
from coordexp.infra.files import remove
from coordexp.infra.random_streams import stream_seed
from coordexp.models.adapters import merged_weights
from coordexp.models.loading import Checkpoint, save_checkpoint
from coordexp.packing.samples import Sample, SampleStore
from coordexp.rollout.engine import DecodeRequest, Engine, Generation, Journal
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.opening import generate_answers
from coordexp.rollout.records import Rollout, match_rollouts, parsed_rollout, read_generations, write_generations
from coordexp.text.parser import ParsedAnswer
from coordexp.training.checkpoint import trained_sha256
from coordexp.training.distributed import any_process, from_main, is_sharded, shared_out, world
from coordexp.training.recorder import stopping_at_once
from coordexp.training.schedule import ramp
from coordexp.training.sharding import whole_weights

log = logging.getLogger(__name__)

ROLLOUTS, ANSWERS = "rollouts.jsonl", "answers"
MatchSchedule = Callable[[int], MatchingParams]


def match_schedule(params: Params, steps: int) -> MatchSchedule:
    """Matching by step: that of `matching`, approached linearly over the curriculum's fraction of the steps."""
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
    """The fresh sets of a run, from what each step of channel B trains on; none in the first window, or if 0 steps."""
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
    """Servers of the weights in training: they are written as a checkpoint, served, asked, and the servers leave.

    `weights` are the model's by name where it does not hold them as plain ones itself: sharded, or beside adapters.
    """

    run: RunConfig
    checkpoint: Checkpoint
    weights: dict[str, Tensor] | None
    folder: Path

    def generate(self, samples: Sequence[Sample], request: DecodeRequest) -> list[Generation]:
        """One generation per sample."""
        profile, served = self.run.profile, self.folder / "served"
        remove(served)  # of a run that was killed
        save_checkpoint(served, self.checkpoint, self.weights)
        batch_images = profile.rollout.batch_images
        generations, _, _ = generate_answers(
            profile, self.checkpoint, served, self.run.paths.raw, batch_images, samples, request
        )
        remove(served)
        return generations


def engine_of_now(run: RunConfig, checkpoint: Checkpoint, folder: Path) -> Engine:
    """What generates with the weights of this moment, where the profile says so; a collective call."""
    if run.profile.rollout.engine == "hf":
        # Of an interrupted set, what these very weights have answered; steps that run again come to the same ones.
        journal = Journal(folder / f"{ANSWERS}-{trained_sha256(checkpoint.model)[:12]}.jsonl")
        own = journal.of_process(world().rank)
        return HfEngine(checkpoint, run.paths.raw, run.profile.rollout.batch_images, own)
    model = checkpoint.model
    weights = whole_weights(model) if is_sharded(model) else merged_weights(model) if world().is_main else None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the allocator holds back is the servers' for now
    return ServedEngine(run, checkpoint, weights, folder)


class Refresher:
    """Generates, keeps and reads back fresh sets. `engine_of_now` runs the weights of its call, on all processes."""

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
    ) -> None:
        """`model` is the one whose forwards show that the engine gets on."""
        self._refreshes = refreshes
        self._engine_of_now = engine_of_now
        self._parse = parse
        self._request = request
        self._store = store
        self._vocabulary_size = vocabulary_size
        self._folder = folder
        self._model = model
        self._loaded: tuple[Refresh, dict[int, Rollout]] | None = None

    @property
    def steps(self) -> frozenset[int]:
        """The steps before which a set is generated."""
        return frozenset(refresh.step for refresh in self._refreshes)

    def load(self, step: int) -> None:
        """Have the set of a step at hand: generated if no file holds it, by the weights of this moment."""
        refresh = self._current(step)
        if refresh is None or (self._loaded and self._loaded[0] == refresh):
            return
        generations = self._kept(refresh, step) or self._generate(refresh)
        self._loaded = refresh, {i: parsed_rollout(i, g, self._parse(g)) for i, g in generations.items()}

    def at(self, step: int) -> tuple[dict[int, Rollout], dict[str, float]] | None:
        """The loaded set of a step by image, and what generating it took if it is made for this step.

        None before the first refresh.
        """
        refresh = self._current(step)
        if refresh is None:
            return None
        assert self._loaded, f"step {step}: its rollouts are not loaded"
        loaded, rollouts = self._loaded
        assert loaded == refresh, f"step {step}: the rollouts of step {loaded.step} are loaded"
        return rollouts, self._compute(refresh, rollouts) if refresh.step == step else {}

    def _current(self, step: int) -> Refresh | None:
        earlier = [refresh for refresh in self._refreshes if refresh.step <= step]
        return earlier[-1] if earlier else None

    def _place(self, refresh: Refresh) -> Path:
        """The folder of a set."""
        return self._folder / f"rollouts-{refresh.step}"

    def _kept(self, refresh: Refresh, step: int) -> dict[int, Generation]:
        """The set that an interrupted run left; nothing if it left none and the weights are those to generate with.

        Raises:
            DamagedArtefactError: the set is damaged, or gone.
        """
        place = self._place(refresh)
        if step == refresh.step and not any_process(world().is_main and (place / HASHES).exists()):
            return {}
        for fault in damage(place):
            raise DamagedArtefactError(
                f"{fault} Expected the fresh rollouts that the interrupted run wrote; delete {self._folder} to start "
                "this stage at step 0."
            )
        return read_generations(place / ROLLOUTS, self._vocabulary_size)

    def _generate(self, refresh: Refresh) -> dict[int, Generation]:
        log.info("fresh rollouts of %d images before step %d", len(refresh.items), refresh.step)
        samples = [self._store[i] for i in refresh.items]
        seed = stream_seed(self._request.seed, "decode/fresh-rollouts", refresh.step)
        request = replace(self._request, seed=seed, keep_probs=False)
        # Whatever an engine draws, training goes on with its own numbers.
        with torch.random.fork_rng(), stopping_at_once():
            what = f"fresh rollouts of step {refresh.step}"
            engine = self._engine_of_now()
            if isinstance(engine, ServedEngine):
                generations = from_main(what, lambda: engine.generate(samples, request))
            else:
                generations = shared_out(what, samples, lambda own: engine.generate(own, request), self._model)
        by_image = {s.image_id: g for s, g in zip(samples, generations, strict=True)}
        if world().is_main:
            with sealing(self._place(refresh)) as folder:
                write_generations(folder / ROLLOUTS, by_image)
            for journal in self._folder.glob(f"{ANSWERS}-*.jsonl"):
                remove(journal)
        return by_image

    def _compute(self, refresh: Refresh, rollouts: Mapping[int, Rollout]) -> dict[str, float]:
        """Tokens read and written, from the set itself, so that a resumed run logs the same."""
        return {
            "rollout/prompt_tokens": sum(self._store[i].prompt_length for i in refresh.items),
            "rollout/generated_tokens": sum(len(rollout.ids) for rollout in rollouts.values()),
        }


class RolloutPool:
    """Rollouts by step, matched with the gate and the costs of the step."""

    def __init__(
        self, on_file: Mapping[int, Rollout], matching: MatchSchedule, refresher: Refresher | None = None
    ) -> None:
        self._on_file = on_file
        self._matching = matching
        self._refresher = refresher

    @property
    def refresh_steps(self) -> frozenset[int]:
        """The steps whose rollouts are made by the weights before them."""
        return self._refresher.steps if self._refresher else frozenset()

    def refresh(self, step: int) -> None:
        """Generate or read what `at` will give for a step. All processes must call it, outside of any thread."""
        if self._refresher:
            self._refresher.load(step)

    def at(self, step: int, samples: Sequence[Sample]) -> tuple[dict[int, Rollout], dict[str, float]]:
        """Matched rollouts of these samples by image, and numbers to log; `refresh` of this step comes before."""
        matching = self._matching(step)
        fresh = self._refresher.at(step) if self._refresher else None
        rollouts, logs = (self._on_file, {}) if fresh is None else fresh
        matched = match_rollouts([rollouts[s.image_id] for s in samples], samples, matching)
        return {rollout.image_id: rollout for rollout in matched}, logs
