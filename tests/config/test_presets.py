"""Presets: every key exists, every value is accepted, and each preset is the recipe that its name says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coordexp.config.loading import read_yaml
from coordexp.config.presets import overrides, preset_names, read_preset, with_changes
from coordexp.config.schema import CoordSupervision, Params
from coordexp.errors import ConfigError
from coordexp.losses.terms import TERMS

COORD_KEYS = tuple(CoordSupervision.model_fields)

ROOT = Path(__file__).parents[2]
NAMES = preset_names(ROOT)


def applied(name: str) -> Params:
    return with_changes(read_yaml(ROOT / "params.yaml"), read_preset(name, ROOT), name)


def test_the_list_of_presets():
    assert NAMES == ["mixture", "note_a_only", "pure_ce", "raw_digits", "seed"]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_key_changes_the_parameters(name):
    params = applied(name).model_dump()
    for key, value in read_preset(name, ROOT).items():
        found = params
        for part in key.split("."):
            found = found[part]
        assert found == value, key


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("raw_digits", "note_a_only")])
def test_presets_set_the_weights_of_both_stages(name):
    """A preset sets all its weights; none depends on the current params.yaml."""
    changes = read_preset(name, ROOT)
    for term in (*COORD_KEYS, "text_gate_weight"):
        assert changes[term] == changes[f"stage1.{term}"], term


def test_pure_cross_entropy_is_hard_ce_plus_gate():
    stage1 = applied("pure_ce").stage1
    assert {term for term in COORD_KEYS if getattr(stage1, term)} == {"gate_weight", "coord_ce_weight"}
    assert stage1.gate_weight == stage1.coord_ce_weight


def test_raw_digits_trains_only_text():
    params = applied("raw_digits")
    assert params.text.codec == "digits"
    assert not any(getattr(weights, term) for weights in (params, params.stage1) for term in COORD_KEYS)
    assert params.stage2.b_ratio == 0


def test_note_a_only_changes_only_stage_2():
    params, stated = applied("note_a_only"), read_preset("note_a_only", ROOT)
    assert not any(key.startswith("stage1.") for key in stated)
    assert {f"{key}_weight" for key in TERMS if TERMS[key].place in ("coord", "box")} <= stated.keys()
    assert (params.stage2.b_ratio, params.stage2.n_softctx_iter, params.softce_weight) == (0, 2, 0.1)


def test_overrides_are_arguments_of_dvc_exp_run():
    changes = {"text.codec": "digits", "stage1.w1_weight": 0.0, "truncate": 8, "eval.f1_ious": [0.3, 0.5]}
    expected = ["text.codec=digits", "stage1.w1_weight=0.0", "truncate=8", "eval.f1_ious=[0.3, 0.5]"]
    assert overrides(changes) == [part for value in expected for part in ("-S", value)]


def test_an_unknown_preset_or_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"preset 'mixtur'.*Did you mean 'mixture'"):
        read_preset("mixtur", ROOT)
    with pytest.raises(ConfigError, match=r"here: wrong parameters\.\n  stage1\.w1_wt: unknown key"):
        with_changes(read_yaml(ROOT / "params.yaml"), {"stage1.w1_wt": 1.0}, "here")


def test_the_command_prints_a_preset(repository):
    def run(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "coordexp.config.presets", *names]
        environment = {"PYTHONPATH": "src"}
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)

    done = run("seed")
    assert done.returncode == 0
    assert "-S stage1.w1_weight=0.1" in done.stdout
    assert run().stdout.split() == NAMES
    wrong = run("nothing")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: preset 'nothing'")


def test_a_value_in_place_of_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"here: sigma\.x: 'sigma' is not a block"):
        with_changes(read_yaml(ROOT / "params.yaml"), {"sigma.x": 1.0}, "here")
