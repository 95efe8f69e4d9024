"""The arms of the ablation as runs: each is trained and decoded once, and again only if something it depends on moves.

    runs/<profile>/ablation/seed-17/seed_recipe/{stage1/, dev.jsonl, val.jsonl, done.json}
    runs/<profile>/ablation/seed-17/rollout/          answers of the shared stage-1 checkpoint

`done.json` comes last, so a folder that has it is complete. A run that is stopped goes on inside the arm.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coordexp.config.ablation import CONTROL, STAGE1_DEFAULT, STAGE2_DEFAULT, Arm, Budget
from coordexp.config.paths import ProfilePaths
from coordexp.config.presets import with_changes
from coordexp.config.profile import OptimConfig, Profile
from coordexp.config.run import RunConfig
from coordexp.config.schema import Params
from coordexp.infra.provenance import fingerprint, write_json
from coordexp.losses.coord_terms import CoordDiagnostics, slot_diagnostics
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.forward import hidden_states
from coordexp.models.loading import load_checkpoint, load_for_inference, load_format, save_checkpoint
from coordexp.models.pins import pinned_folder
from coordexp.packing.collator import teacher_segment
from coordexp.packing.samples import SampleSource, SampleStore
from coordexp.rollout.records import read_rollouts
from coordexp.rollout.stages import decode_split, run_rollouts
from coordexp.training.builders import first_coord_id, make_collator, make_encoder
from coordexp.training.channel_b_builders import channel_b_settings, match_schedule
from coordexp.training.rollout_pool import RolloutPool
from coordexp.training.stage1 import SHARED_KEYS, train_control, train_stage1
from coordexp.training.stage2 import train_stage2
from coordexp.training.stage2_task import plan_segments, plan_steps
from coordexp.training.step import Criterion, term_sums

log = logging.getLogger(__name__)

SPLITS = ("dev", "val")
_TRAINED = {"stage1": "stage1", "stage2": "stage2", "control": "stage1-control"}  # folder of an arm's checkpoint


@dataclass(frozen=True, slots=True)
class ArmPaths(ProfilePaths):
    """The data of the profile, with the runs of one arm; `shared` names runs that are taken from elsewhere."""

    own: Path = Path()
    shared: Mapping[str, Path] = field(default_factory=dict)

    @property
    def init(self) -> Path:
        """Where stage 1 starts."""
        return self.shared.get("init", self.norm1000 / "init")

    def run(self, stage: str) -> Path:
        """Output of a stage of this arm, or the shared one."""
        return self.shared.get(stage, self.own / stage)

    def curve(self, name: str) -> Path:
        """A curve of this arm, beside its runs: those in the reports are of the graph."""
        return self.own / "curves" / f"{name}.tsv"


class Ablation:
    """Runs arms of one profile. `params` and `profile` are those of the repository, the budget sets the sizes."""

    def __init__(self, run: RunConfig, budget: Budget) -> None:
        self._tree = run.params.model_dump(mode="json")
        self._profile = _resized(run.profile, budget)
        self._paths = run.paths
        self._budget = budget
        self._root = run.paths.run("ablation")

    def run(self, arm: Arm, seed: int) -> Path:
        """The folder of a finished arm: trains and decodes what is not there yet."""
        params, paths = self._params(arm, seed), self._arm_paths(arm, seed)
        profile = _with_init(self._profile, arm.coord_init)
        key = self._key(arm, params, profile, paths)
        for folder in sorted((self._root / f"seed-{seed}").glob("*/done.json")):
            if json.loads(folder.read_text(encoding="utf-8"))["key"] == key:
                return folder.parent  # this arm, or one of another name that is the same
        log.info("arm %s, seed %d", arm.name, seed)
        config = RunConfig(params=params, profile=profile, paths=paths)
        (paths.own / "done.json").unlink(missing_ok=True)  # of other settings: no longer true once training writes
        if arm.stage == "stage2":
            steps = steps_for_tokens(config, self._stage2_tokens(seed))
            profile = profile.model_copy(update={"stage2": _with_steps(profile.stage2, steps)})
            config = replace(config, profile=profile)
        train = {"stage1": train_stage1, "stage2": train_stage2, "control": train_control}[arm.stage]
        summary = train(config)
        checkpoint = paths.own / _TRAINED[arm.stage]
        for split in SPLITS:
            self._decode(params, paths, checkpoint, split)
        diagnostics = teacher_forced(config, checkpoint, self._budget.val_images)
        done = {"key": key, "arm": arm.name, "seed": seed, "changes": dict(arm.changes), **summary}
        write_json(paths.own / "done.json", done | {"diagnostics": diagnostics})
        return paths.own

    def _params(self, arm: Arm, seed: int) -> Params:
        return with_changes(self._tree, {**arm.changes, "seed": seed}, f"ablation arm {arm.name}")

    def _arm_paths(self, arm: Arm, seed: int) -> ArmPaths:
        shared: dict[str, Path] = {}
        if arm.coord_init:
            shared["init"] = self._initial(arm.coord_init)
        if arm.stage != "stage1":
            shared["stage1"] = self._default(STAGE1_DEFAULT, "stage1", seed) / "stage1"
        if arm.stage == "stage2":
            shared["rollout"] = self._rollouts(seed, shared["stage1"])
        if arm.stage == "control":
            shared["stage2-compute.json"] = self._default(STAGE2_DEFAULT, "stage2", seed) / "stage2-compute.json"
        return ArmPaths(self._paths.profile, self._paths.root, self._root / f"seed-{seed}" / arm.name, shared)

    def _default(self, name: str, stage: Any, seed: int) -> Path:
        """The finished arm of params.yaml as it stands."""
        return self.run(Arm(name=name, stage=stage, changes={}, baseline=CONTROL), seed)

    def _initial(self, coord_init: str) -> Path:
        """The base model with coordinate rows of another kind."""
        config, folder = self._profile.model, self._root / f"init-{coord_init}"
        base = load_checkpoint(pinned_folder(config, self._paths.profile), config.min_pixels, config.max_pixels)
        add_coordinate_tokens(base.model, base.tokenizer, coord_init, self._tree["seed"])
        save_checkpoint(folder, base.model, base.tokenizer, base.pixels)
        return folder

    def _key(self, arm: Arm, params: Params, profile: Profile, paths: ArmPaths) -> str:
        """What an arm depends on; its name is not part of it."""
        inputs = [paths.norm1000 / f"{split}.parquet" for split in ("train", "dev", "val")]
        inputs += [paths.init / "model.safetensors", paths.packed / "plan.parquet"]
        inputs += [path if path.is_file() else path / _MAIN_FILE[name] for name, path in paths.shared.items()]
        settings: dict[str, Any] = {"stage": arm.stage, "images": [self._budget.dev_images, self._budget.val_images]}
        if arm.stage == "stage2":  # how stage 1 was trained is in its checkpoint
            settings["params"] = params.model_dump(exclude={"profile", "stage1", "eval"})
        else:
            settings["params"] = params.model_dump(include={*SHARED_KEYS, "text", "stage1", "decode"})
        sizes = {"model", "packing", "rollout"} | ({"stage1"} if arm.stage == "stage1" else {"stage2"})
        return fingerprint(settings | {"profile": profile.model_dump(include=sizes)}, inputs)

    def _rollouts(self, seed: int, stage1: Path) -> Path:
        """Answers of the shared checkpoint on training images, generated once."""
        folder = self._root / f"seed-{seed}" / "rollout"
        params = with_changes(self._tree, {"seed": seed}, "ablation")
        settings = {"params": params.model_dump(), "rollout": self._profile.rollout.model_dump()}
        key, note = fingerprint(settings, [stage1 / "model.safetensors"]), folder / "key.json"
        if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != key:
            note.unlink(missing_ok=True)
            paths = ArmPaths(self._paths.profile, self._paths.root, folder.parent, {"stage1": stage1})
            run_rollouts(RunConfig(params=params, profile=self._profile, paths=paths))
            write_json(note, key)
        return folder

    def _stage2_tokens(self, seed: int) -> int:
        """The budget of every stage-2 arm: what the default takes in the budgeted number of steps."""
        arm = Arm(name=STAGE2_DEFAULT, stage="stage2", changes={}, baseline=CONTROL)
        params, paths = self._params(arm, seed), self._arm_paths(arm, seed)
        return sum(step_tokens(RunConfig(params=params, profile=self._profile, paths=paths), self._budget.stage2_steps))

    def _decode(self, params: Params, paths: ArmPaths, checkpoint: Path, split: str) -> None:
        """Predictions on a split, under the name of the split; the decode cache is not left to grow."""
        images = self._budget.dev_images if split == "dev" else self._budget.val_images
        evaluation = self._profile.eval.model_copy(update={"images": images})
        profile = self._profile.model_copy(update={"eval": evaluation})
        cache = decode_split(RunConfig(params=params, profile=profile, paths=paths), checkpoint, split)
        shutil.copyfile(cache / "gt_vs_pred.jsonl", paths.own / f"{split}.jsonl")
        shutil.rmtree(cache)


_MAIN_FILE = {"stage1": "model.safetensors", "rollout": "rollouts.jsonl", "init": "config.json"}


def _with_init(profile: Profile, coord_init: str) -> Profile:
    model = profile.model.model_copy(update={"coord_init": coord_init or profile.model.coord_init})
    return profile.model_copy(update={"model": model})


def _resized(profile: Profile, budget: Budget) -> Profile:
    return profile.model_copy(
        update={
            "stage1": _with_steps(profile.stage1, budget.stage1_steps),
            "stage2": _with_steps(profile.stage2, budget.stage2_steps),
            # Arms are judged when they are finished, and their cost is measured.
            "monitor": profile.monitor.model_copy(update={"every_steps": 0}),
        }
    )


def _with_steps(optim: OptimConfig, steps: int) -> OptimConfig:
    """The same optimizer for another number of steps, with a warm-up of the same share."""
    warmup = round(optim.warmup_steps * steps / optim.steps)
    return optim.model_copy(update={"steps": steps, "warmup_steps": min(warmup, steps - 1)})


def step_tokens(run: RunConfig, steps: int) -> list[int]:
    """Tokens that the forwards of each step of stage 2 will take, known from the plan and the rollouts on file."""
    encoder = make_encoder(run.params, load_format(run.paths.run("stage1")))
    store = SampleStore(run.paths.norm1000 / "train.parquet")
    source = SampleSource(store, encoder, run.params.text.object_order, run.params.stage2_seed)
    rollouts = read_rollouts(run.paths.run("rollout") / "rollouts.jsonl")
    rolled_out = [i for i in range(len(store)) if store[i].image_id in rollouts]
    pool, settings = RolloutPool(rollouts, match_schedule(run.params, steps)), channel_b_settings(run.params)
    plan = plan_steps(
        len(store),
        rolled_out,
        run.profile.stage2.samples_per_step,
        steps,
        run.params.stage2.b_ratio,
        run.params.stage2_seed + 1,
    )
    tokens = []
    for step, planned in enumerate(plan):
        is_a = planned.channel == "A"
        matched = {} if is_a else pool.at(step, [store[i] for i in planned.items])[0]
        segments, _ = plan_segments(planned, step, source, matched, encoder, settings)
        tokens.append(sum(s.length for s in segments) * (run.params.stage2.n_softctx_iter if is_a else 1))
    return tokens


def steps_for_tokens(run: RunConfig, budget_tokens: int) -> int:
    """The number of steps of stage 2, at least 1, whose tokens come nearest to a budget."""
    steps = run.profile.stage2.steps
    while sum(tokens := step_tokens(run, steps)) < budget_tokens:
        steps *= 2
    seen, best = 0, (budget_tokens, 0)
    for done, added in enumerate(tokens, 1):
        seen += added
        best = min(best, (abs(budget_tokens - seen), done))
    return max(1, best[1])


@torch.no_grad()
def teacher_forced(run: RunConfig, checkpoint: Path, images: int) -> dict[str, float]:
    """Coordinate diagnostics on val (its first images, 0 for all) under the annotated context."""
    loaded = load_for_inference(checkpoint)
    store = SampleStore(run.paths.norm1000 / "val.parquet")
    collator = make_collator(loaded, run.paths.raw, run.profile.packing.pack_tokens)
    criterion = Criterion.stage1(run.params, first_coord_id(loaded), 1)
    model = loaded.model.eval()
    total: CoordDiagnostics | None = None
    size = run.profile.eval.batch_images
    count = min(images or len(store), len(store))
    for first in range(0, count, size):
        batch = collator([teacher_segment(store[i]) for i in range(first, min(first + size, count))]).to(model.device)
        hidden = hidden_states(model, batch)
        found = slot_diagnostics(term_sums(model, criterion, batch, hidden, hidden)[1])
        total = found if total is None else total + found
    return total.summary() if total is not None else {}
