"""Each key of params.yaml reruns exactly the correct stages: those that run change, and the others are not stale.

Stages read exactly the keys that they declare. And every key is changed once on the smoke profile, under parameters
that use them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordexp.config.loading import load_params, load_profile
from coordexp.config.presets import leaves
from coordexp.config.serving import ServeConfig
from coordexp.inputs import PARAMS_FILE, PROFILE_FILE, declarations
from graph.local_graph import LocalGraph
from workspaces import PROFILE, content_hash

# Answers with objects from an untrained model, with all features enabled that a key may change.
ALIVE = {
    "temperature": 1.1, "text_gate_weight": 0.1, "entropy_weight": 0.01, "coord_ce_weight": 0.1,
    "bbox_giou_weight": 0.1, "bbox_l1_weight": 0.1, "bbox_log_wh_weight": 0.1,
    "anneal.sigma_fraction": 1.0, "anneal.temperature_fraction": 1.0,
    "stage1.coord_ce_weight": 0.1, "stage1.text_gate_weight": 0.1,
    "stage2.n_softctx_iter": 2, "stage2.coord_decode_mode": "top_k", "stage2.a1_coord_weight": 0.5,
    "stage2.over_generation": "truncate", "stage2.duplicate_unlikelihood_weight": 0.1, "stage2.refresh_steps": 2,
    "stage2.refresh_samples": 2, "stage2.reordered_ce_weight": 0.1,
    "stage2.passes": "one", "stage2.curriculum_fraction": 1.0,
    "matching.gate_threshold": 0.01,
    "decode.temperature": 0.8, "decode.top_p": 0.95, "decode.grammar": "any", "decode.corners": "valid",
    "decode.duplicate_iou": 0.8,
}  # fmt: skip

# Key -> another value that is valid together with the others.
CHANGES: dict[str, Any] = {
    "seed": 18, "softce_weight": 0.5, "w1_weight": 0.5, "gate_weight": 0.5, "coord_ce_weight": 0.5,
    "text_gate_weight": 0.5, "entropy_weight": 0.1, "target": "triangular", "sigma": 3.0, "truncate": 9,
    "temperature": 1.2, "bbox_smoothl1_weight": 1.0, "bbox_ciou_weight": 0.5, "bbox_giou_weight": 0.5,
    "bbox_l1_weight": 0.5, "bbox_log_wh_weight": 0.5, "smoothl1_beta_bins": 1.0,
    "anneal.sigma_from": 8.0, "anneal.sigma_fraction": 0.5, "anneal.temperature_from": 3.0,
    "anneal.temperature_fraction": 0.5, "text.codec": "tags", "text.object_order": "random",
    "stage1.seed": 1, "stage1.softce_weight": 0.5, "stage1.w1_weight": 0.5, "stage1.gate_weight": 0.5,
    "stage1.coord_ce_weight": 0.5, "stage1.text_gate_weight": 0.5,
    "stage2.seed": 1, "stage2.b_ratio": 0.25, "stage2.n_softctx_iter": 3, "stage2.softctx_grad_mode": "em_detach",
    "stage2.coord_ctx_embed_mode": "expectation", "stage2.coord_decode_mode": "median", "stage2.top_k": 4,
    "stage2.a1_coord_weight": 1.0, "stage2.text_ce_weight": 0.5, "stage2.eos_weight": 2.0,
    "stage2.reordered_ce_weight": 0.5, "stage2.passes": "two", "stage2.missed": "sorted", "stage2.extras": "drop",
    "stage2.over_generation": "keep", "stage2.over_close_weight": 2.0, "stage2.duplicate_unlikelihood_weight": 1.0,
    "stage2.refresh_steps": 3, "stage2.refresh_samples": 3, "stage2.refresh_temperature": 1.5,
    "control.budget": "tokens", "stage2.curriculum_fraction": 0.5, "stage2.gate_from": 0.9,
    "stage2.lambda_sem_from": 1.0,
    "matching.lambda_l1": 0.0, "matching.lambda_iou": 0.0, "matching.lambda_sem": 1.0, "matching.gate": "l1",
    "matching.semantic": "lexical",
    "matching.gate_threshold": 0.2,
    "decode.max_new_tokens": 60, "decode.temperature": 0.5, "decode.top_p": 0.5, "decode.repetition_penalty": 1.5,
    "decode.score": "mix", "decode.box": "argmax", "decode.box_top_k": 4, "decode.grammar": "closed",
    "decode.corners": "any", "decode.duplicate_iou": 0.3, "decode.beams": 2,
    "eval.bootstrap_resamples": 200, "eval.f1_ious": [0.25, 0.5], "eval.duplicate_ious": [0.5, 0.9],
    "eval.mapping": "exact", "eval.semantic_floor": 0.6, "eval.semantic_margin": 0.1,
}  # fmt: skip
# Other keys that a value requires.
BESIDE: dict[str, dict[str, Any]] = {
    "decode.beams": {"decode.temperature": 0.0, "decode.top_p": 1.0},
    "stage2.reordered_ce_weight": {"stage2.passes": "two"},
    "matching.semantic": {"matching.lambda_sem": 1.0},
}
QUICK = ("eval.bootstrap_resamples", "gate_weight")  # evaluation, all training
# Stages with unchanged bytes here: the key has no effect with eight images and four steps.
IDLE = {"matching.lambda_iou": {"stage2"}, "matching.lambda_l1": {"stage2"}}
WEIGHTS = "runs/smoke/stage2/model.safetensors"

# Locations do not change the run. The profile's name is in every path, the model is identified by its pins, and the
# number of decoding processes does not change the answers.
PLACES = {"profile", "model.path", "launch.processes"}
# Declared, but read on another way than that of the smoke profile, or before the stage begins.
ELSEWHERE = {
    "launch.threads",  # by stage.py
    "source.kind",  # by the loader of the profile
    *("rollout.requests_per_server", "rollout.servers", "rollout.timeout_seconds"),  # vLLM
    *("rollout.tries", "rollout.vllm_python"),
    *(f"rollout.serve.{key}" for key in ServeConfig.model_fields),
}
ELSEWHERE_OF = {
    # data sets on disk, not scenes
    "convert": {"seed"} | {f"records.{key}" for key in (
        "bad_images", "crop", "crowd", "flip", "over_max", "overlap", "scale_jitter", "truncated",
    )},
    # mapping: semantic, and a lambda_sem above 0
    "coco-eval": {"eval.semantic_floor", "eval.semantic_margin", "matching.semantic"},
}  # fmt: skip


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGraph]:
    graph = LocalGraph.new(tmp_path_factory.mktemp("cuts") / "baseline", ALIVE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(graph.root)
        patch.setenv("DVC_ROOT", str(graph.root))
        assert all(graph.repro(recorded=True).values())
        yield graph


def test_every_key_is_changed() -> None:
    keys = {key for key, _ in leaves(load_params(Path("params.yaml")).model_dump())}
    assert CHANGES.keys() == keys - {"profile"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=() if key in QUICK else pytest.mark.faults) for key in CHANGES]
)
def test_every_stage_that_a_key_reruns_changes_its_output(
    key: str, baseline: LocalGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = baseline.copy(tmp_path / "changed")
    monkeypatch.chdir(changed.root)
    monkeypatch.setenv("DVC_ROOT", str(changed.root))
    changed.set({key: CHANGES[key], **BESIDE.get(key, {})})
    ran = changed.repro()
    same = {stage for stage, differs in ran.items() if not differs}
    # Its budget, the tokens of stage 2, may change by less than the pack that it would train on besides.
    same -= {"stage1-control"}
    if content_hash(changed.root / WEIGHTS) == content_hash(baseline.root / WEIGHTS):  # only the log says more
        same -= {"decode@stage2", "coco-eval"}
    assert same == IDLE.get(key, set()), f"{key} ran {', '.join(ran)}"


@pytest.mark.slow
def test_stages_read_exactly_the_declared_keys(baseline: LocalGraph) -> None:
    stages = {stage.stage: stage for stage in declarations(baseline.root)}
    values = {
        PARAMS_FILE: load_params(baseline.root / PARAMS_FILE),
        PROFILE_FILE: load_profile(baseline.root / "configs" / f"{PROFILE}.yaml"),
    }
    lost, idle = {}, {}
    for name, stage in stages.items():
        keys = baseline.read[name]
        lost[name] = {key for file, key in keys if not stage.reads(file, key)} - PLACES
        declared = {
            (f, key) for f, block in values.items() for key, _ in leaves(block.model_dump()) if stage.reads(f, key)
        }
        idle[name] = {key for f, key in declared if not any(f == g and f"{key}.".startswith(f"{k}.") for g, k in keys)}
        idle[name] -= ELSEWHERE | ELSEWHERE_OF.get(name, set())
    assert not any(lost.values()), f"pipelines/inputs.yaml must list these: the stages read them. {lost}"
    assert not any(idle.values()), f"pipelines/inputs.yaml lists these, and the stages do not read them. {idle}"


@pytest.mark.slow
def test_without_changes_no_stage_runs(baseline: LocalGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = baseline.copy(tmp_path / "again")
    monkeypatch.chdir(again.root)
    assert again.repro() == {}
    assert os.listdir(again.root / "runs" / "smoke")
