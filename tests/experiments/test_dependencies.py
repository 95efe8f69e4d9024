"""The stages of this repository's graph, and the stages that a change would run."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.config.loading import read_yaml
from coordexp.experiments.dependencies import Change, Past, Present, changes
from coordexp.inputs import CODE

GRAPH = """\
stages:
  check: {cmd: check, outs: [{"inputs/${profile}": {cache: false}}]}
  train: {cmd: train, deps: ["inputs/${profile}/train.json"], outs: ["runs/${profile}/train"]}
  decode:
    foreach: [base, train]
    do:
      cmd: decode ${item}
      deps: ["inputs/${profile}/decode.json", "runs/${profile}/train"]
      outs: ["runs/${profile}/decode/${item}"]
  score:
    foreach: {box: "runs/${profile}/decode/train", name: "runs/${profile}/decode/base"}
    do:
      cmd: score ${key}
      deps: ["inputs/${profile}/score.json", "${item}"]
      outs: ["runs/${profile}/score/${key}"]
"""


@pytest.fixture
def present(tmp_path: Path, repository: Path) -> Present:
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    for name in ("params.yaml", "configs", "pipelines", "src"):
        (tmp_path / name).symlink_to(repository / name)
    return Present.of(tmp_path, "tiny", ["runs/tiny/decode/train"], lambda _: {})


def test_each_item_of_a_foreach_stage_is_a_stage(present: Present) -> None:
    assert list(present.graph) == ["train", "decode@base", "decode@train", "score@box", "score@name"]
    assert list(present.plans) == ["train", "decode@train"]
    assert present.targets == ("decode@train",)
    assert present.graph["score@name"].cmd == "score name"
    assert "runs/tiny/decode/base" in present.graph["score@name"].deps
    assert present.graph["decode@base"].outs == {"runs/tiny/decode/base"}


def entry(cmd: str, **deps: str) -> dict:
    named = {"train": "runs/tiny/train", "told": f"inputs/tiny/{cmd.split()[0]}.json"}
    return {"cmd": cmd, "deps": [{"path": named[name], "md5": md5} for name, md5 in deps.items()]}


def test_a_stage_with_an_outdated_dependency_runs_again(present: Present) -> None:
    """Stages that read its output run if that output changes."""
    train = entry("train", told="1") | {"outs": [{"path": "runs/tiny/train", "md5": "a"}]}
    lock = {"train": train, **{f"decode@{n}": entry(f"decode {n}", told="2", train="a") for n in ("base", "train")}}
    lock["decode@base"] = entry("decode base", told="2", train="before")
    past = Past(lock, {}, {}, {"inputs/tiny/train.json": "1", "inputs/tiny/decode.json": "2"})
    assert past.torn(["train", "decode@train"]) == ""
    assert past.torn(["decode@base"]) == "runs/tiny/train"
    assert Past(lock, {}, {}, {"inputs/tiny/train.json": "9"}).torn(["train"]) == "inputs/tiny/train.json"


def test_stages_of_another_profile_in_the_same_lock_do_not_count(present: Present) -> None:
    """An experiment that runs some stages of another profile keeps the entries of the others, with their inputs."""
    lock = {"train": entry("train", told="1"), "decode@train": entry("decode train", told="2", train="a")}
    told = present.told_stage("decode@train", [])
    past = Past(lock, {}, {"inputs/tiny/decode.json": told, "inputs/zoo/decode.json": told | {"decode.box": "?"}}, {})
    assert told
    assert present.change(past, []) == ""


def test_differences_name_each_key_once_and_code_last() -> None:
    old = Past({}, {}, {"inputs/t/a.json": {"x": 1, CODE: "1"}, "inputs/t/b.json": {"x": 1, "y": 2, CODE: "1"}}, {})
    new = Past({}, {}, {"inputs/t/a.json": {"x": 3, CODE: "2"}, "inputs/t/b.json": {"x": 3, "y": 2, CODE: "1"}}, {})
    assert changes(old, new) == [Change("x", 1, 3, ("a", "b")), Change(CODE, "1", "2", ("a",))]
    assert list(map(str, changes(old, new))) == ["x 1 -> 3", "code of a"]
    assert changes(old, old) == []


def test_the_graph_of_this_repository_is_read(repository: Path) -> None:
    present = Present.of(repository, "tiny", ["runs/tiny/eval/stage2/gt_vs_pred.jsonl"], lambda _: {})
    declared = read_yaml(repository / "pipelines" / "inputs.yaml")
    for stage, plan in present.graph.items():
        assert plan.inputs is not None, stage
        assert plan.inputs.stem in declared
        assert present.told_stage(stage, ["softce_weight=0.2"]), stage
