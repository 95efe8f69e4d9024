"""A/B tests as users run them, on a toy repository: finished runs are reused, and interrupted tests resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordexp.config.loading import read_yaml
from coordexp.config.question import load_question
from coordexp.errors import ConfigError, DataError, TrainingError
from coordexp.experiments.compare import forecast, prepare, run_study
from coordexp.experiments.dvc_cache import DvcCache
from coordexp.experiments.plan import grid_study
from coordexp.experiments.questions import answer_question
from coordexp.experiments.runs import Repository
from coordexp.reporting.questions import INDEX, stored_answers
from toy_graph import Toy, cold_path, copied_toy

GRID = ["softce_weight=0.1,0.2"]


SAID: list[str] = []


def ab(toy: Toy, assignments: list[str], seeds: int = 1, name: str = "x") -> dict[str, Any]:
    SAID.clear()
    toy.ran()
    study = grid_study(assignments, "toy").model_copy(update={"seeds": seeds})
    return run_study(Repository(toy.root, SAID.append), study, name, lambda _numbers, _runs: None)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, repository: Path, committed_toy: Path, warm: Path
) -> Iterator[Path]:
    """A folder with a toy repository whose first test was killed in its second run, and then called again."""
    folder = tmp_path_factory.mktemp("ab")
    with pytest.MonkeyPatch.context() as patch:
        toy = copied_toy(committed_toy, folder, repository, patch, warm)
        patch.setenv("TOY_HANG", "stage2 0.2 0")
        command = ["python", "-m", "coordexp.cli", "ab", "-S", GRID[0], "--seeds", "1", "--name", "x"]
        cold = os.environ | {"PATH": cold_path(warm)}
        with subprocess.Popen(
            command, cwd=toy.root, env=cold, start_new_session=True, stderr=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + 300
            while "stage2 0.2 0" not in toy.log.read_text():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
        patch.delenv("TOY_HANG")
        ab(toy, GRID)
        yield folder


@pytest.fixture
def toy(finished: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Toy:
    """A copy of it."""
    return copied_toy(finished, tmp_path, repository, monkeypatch, warm)


def test_a_killed_test_resumes(toy: Toy) -> None:
    assert toy.ran() == ["stage2 0.2 0", "decode@stage2 0.2 0"]  # stage 1 is the commit's, arm 0.1 was finished
    assert len(Repository(toy.root, print).experiments("ab-x-*")) == 2


def test_finished_arms_are_reused_after_commits_and_extended(toy: Toy) -> None:
    first = ab(toy, GRID)
    toy.write("README.md", "read by no stage")
    toy.write("src/telling/words.py", 'WORDS = "of no stage that the test reads"\n')
    toy.write("toy.py", (toy.root / "toy.py").read_text() + "# a comment\n")
    assert ab(toy, GRID) == first | {"commit": toy.succeed("git", "rev-parse", "HEAD").strip()}
    assert toy.ran() == []
    more = ab(toy, ["softce_weight=0.2,0.4"], seeds=2, name="another-name")
    assert {line for line in toy.ran() if line.startswith("stage2")} == {"stage2 0.2 1", "stage2 0.4 0", "stage2 0.4 1"}
    assert more["runs"][0] == next(run for run in first["runs"] if run["arm"] == "softce_weight=0.2")


def test_a_dry_run_lists_existing_runs_and_the_cost_of_the_others(toy: Toy) -> None:
    study = grid_study(["softce_weight=0.2,0.4"], "toy").model_copy(update={"seeds": 2})
    repository = Repository(toy.root, print)
    toy.ran()
    lines = forecast(repository, prepare(repository, study))
    assert lines[0].startswith("softce_weight=0.2, seed 0: exists as ab-x-softce-weight-0.2")
    assert lines[1:4] == [
        "softce_weight=0.4, seed 0: stage2, decode@stage2",
        "softce_weight=0.2, seed 1: stage2, decode@stage2",
        "softce_weight=0.4, seed 1: stage2, decode@stage2",
    ]
    assert lines[4].startswith("4 runs; at most ")
    assert "without a measured time" not in lines[4]
    assert toy.ran() == []


def edit(name: str, old: str, new: str) -> Callable[[Toy], None]:
    def change(toy: Toy) -> None:
        text = (toy.root / name).read_text()
        assert old in text
        toy.write(name, text.replace(old, new, 1))

    return change


def stage1_trained_again(toy: Toy) -> None:
    """Its entry in dvc.lock: same inputs, another result."""
    text = (toy.root / "dvc.lock").read_text()
    digest = read_yaml(toy.root / "dvc.lock")["stages"]["stage1"]["outs"][0]["md5"]
    (toy.root / "dvc.lock").write_text(text.replace(digest, "0" * 32 + ".dir"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit("src/training/words.py", "first", "second"), "the code of stage stage1"),
        (edit("src/training/words.py", "WORDS", "# a comment\nWORDS"), ""),
        (edit("src/answering/words.py", "first", "second"), "the code of stage decode@stage2"),
        (edit("src/judging/words.py", "first", "second"), ""),
        (edit("src/telling/words.py", "first", "second"), ""),
        (edit("dvc.yaml", "-m pipelines.stage2", "-m  pipelines.stage2"), "the command of stage stage2"),
        (edit("dvc.yaml", "/decode.json\n", "/decode.json\n        - README.md\n"), "README.md"),
        (edit("pipelines/inputs.yaml", "sigma, ", ""), "sigma of stage stage1"),
        (edit("params.yaml", "sigma: 2.0", "sigma: 2.5"), "sigma of stage stage1"),
        (edit("params.yaml", "softce_weight: 1.0", "softce_weight: 9.0"), ""),  # both arms set it
        (edit("params.yaml", "w1_weight: ", "w1_weight: 1"), ""),  # no stage of the toy tracks it
        (edit("configs/tiny.yaml", "steps: 100", "steps: 200"), "configs/tiny.yaml:stage2.steps of stage stage2"),
        (edit("configs/tiny.yaml", "gallery_images: 24", "gallery_images: 4"), ""),
        (stage1_trained_again, "runs/tiny/stage1"),
    ],
)
def test_an_arm_is_identified_by_its_dependencies(toy: Toy, change: Callable[[Toy], None], reason: str) -> None:
    (toy.root / "README.md").write_text("text\n")
    change(toy)
    repository = Repository(toy.root, print)
    read = ["runs/tiny/decode/stage2", "runs/tiny/stage2/train_log.jsonl", "data/tiny/records/categories.json"]
    present = repository.present("tiny", read)
    [found] = repository.experiments("ab-x-*0.2*-s0")
    past = repository.past(found.revision, present)
    assert present.change(past, ["softce_weight=0.2", "stage2.seed=0"]) == reason
    assert present.change(past, ["softce_weight=0.2", "stage2.seed=1"]) != ""


def test_changed_decoding_decodes_again_and_trains_nothing(toy: Toy) -> None:
    toy.write("src/judging/words.py", 'WORDS = "judged in another way"\n')  # by who compares, not by the graph
    toy.write("src/answering/words.py", 'WORDS = "answered in another way"\n')
    (toy.root / "dvc.lock").write_text((toy.root / "dvc.lock").read_text() + "\n")  # as a run of the graph may leave it
    (toy.root / "reports" / "tiny" / "progress.md").write_text("as a run of the graph may leave it")
    ab(toy, GRID)
    assert toy.ran() == ["decode@stage2 0.1 0", "decode@stage2 0.2 0"]
    assert any("(runs again: the code of stage decode@stage2 changed)" in line for line in SAID)
    (toy.root / "params.yaml").write_text((toy.root / "params.yaml").read_text() + "\n")
    with pytest.raises(ConfigError, match=r"(?s)params\.yaml.*commit first.*git restore"):
        ab(toy, GRID)


def test_in_a_fresh_clone_everything_comes_with_the_run(toy: Toy, tmp_path: Path) -> None:
    toy.succeed("git", "clone", "--quiet", str(toy.root), str(tmp_path / "fresh"))
    fresh = Toy(tmp_path / "fresh", toy.log)
    numbers = ab(fresh, GRID)
    assert not (fresh.root / "data").exists()
    assert list(numbers["arms"]) == ["softce_weight=0.1", "softce_weight=0.2"]
    fresh.ran()
    edit("dvc.yaml", "      - data/${profile}/records\n  stage1:", "      - data/${profile}/rows\n  stage1:")(fresh)
    with pytest.raises(ConfigError, match=r"no stage makes data/tiny/records/categories\.json"):
        ab(fresh, GRID)
    assert fresh.ran() == []


QUESTION = """\
question: Is less nearer?
seeds: 2
arms:
  default: {}
  seed_recipe: {presets: [seed], baseline: default}
  near:
    changes: [softce_weight=0.1, "configs/${profile}.yaml:stage2.steps=50"]
    baseline: stage1-control
  before: {checkpoint: stage1, baseline: default}
claims:
  nearer:
    {text: less is nearer, source: the toy, arm: near, baseline: default, expected: higher, "yes": Less is nearer.}
  tight: {text: boxes overlap by half, source: the toy, arm: near, metric: geometry.iou, than: 0.5, expected: higher}
"""


def test_a_question_runs_missing_arms_and_accepts_another_one(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default comes from the commit; an arm that says the same in other words comes with it."""

    def run(text: str, answer: str = "Less is nearer.") -> dict[str, Any]:
        toy.write("configs/questions/toy.yaml", text)
        SAID.clear()
        toy.ran()
        found = answer_question(Repository(toy.root, SAID.append), load_question("toy", toy.root), "toy")
        assert found == (Path("reports/answers/toy.md"), answer)
        return json.loads((toy.root / "reports" / "answers" / "toy.json").read_text())

    undecided = run(QUESTION, "Not shown: less is nearer.")
    assert [claim["judgement"] for claim in undecided["claims"]] == ["not shown"] * 2
    assert (
        "no rule about training is decided by fewer than 3 seeds"
        in (toy.root / "reports" / "answers" / "toy.md").read_text()
    )
    monkeypatch.setattr("coordexp.experiments.compare.FEWEST_SEEDS", 2)
    assert {line for line in toy.ran() if line.startswith("stage2")} == {"stage2 1.0 1", "stage2 0.1 0", "stage2 0.1 1"}

    numbers = run(QUESTION + "note: the same\n")
    assert toy.ran() == []
    assert any("seed-recipe" in line and "exists as ab-toy-default" in line for line in SAID)
    by_arm = {row["arm"]: row["metrics"]["coco.mAP"] for row in numbers["effects"]}
    assert by_arm["seed_recipe"]["verdict"] == "the same in every resample and seed"
    claim, value = numbers["claims"]
    assert (claim["judgement"], value["judgement"]) == ("confirmed", "confirmed")
    assert claim["delta"] > by_arm["near"]["delta"] > 0  # its own control is farther off than the default
    assert value["delta"] == pytest.approx(value["values"][0] - 0.5, abs=2e-4)
    assert {(run["arm"] == "before", run["tokens"], run["compute"]) for run in numbers["runs"]} == {
        (False, 10, 12),
        (True, 10, 10),  # no rollouts before stage 1
    }
    assert {run["arm"]: run.get("control") for run in numbers["runs"]} == {
        "default": None,
        "near": 15,
        "seed_recipe": None,
        "before": None,
    }
    details = (toy.root / "reports" / "answers" / "details" / "toy.md").read_text()
    assert details.index("less is nearer") < details.index("## Effects")
    page = (toy.root / "reports" / "answers" / "toy.md").read_text()
    assert page.startswith("# Is less nearer?\n\n**Less is nearer.**\n")
    assert "| less is nearer | `coco.mAP`: `near` > `default` |" in page
    assert len(page.splitlines()) <= 25
    assert "left out" not in page
    [row] = stored_answers(toy.root)
    assert (row.name, row.answer, row.page) == ("toy", "Less is nearer.", Path("reports/answers/toy.md"))
    assert (toy.root / row.page).with_suffix(".png").is_file()
    assert "| [Is less nearer?](toy.md) | Less is nearer. |" in (toy.root / INDEX).read_text()

    arm = "  far: {changes: [softce_weight=0.8], baseline: default}\nclaims"
    more = run(QUESTION.replace("claims", arm, 1))
    assert {line for line in toy.ran() if line.startswith("stage2")} == {"stage2 0.8 0", "stage2 0.8 1"}
    old = [run for run in more["runs"] if run["arm"] != "far"]
    assert old == numbers["runs"]
    answer_question(Repository(toy.root, SAID.append), load_question("toy", toy.root).only(["near"]), "toy")
    page = (toy.root / "reports" / "answers" / "toy.md").read_text()
    assert page.startswith("# Is less nearer?\n\n**Not answered: the arms of its first rule were left out.**\n")
    assert "Arms left out: `default`, `seed_recipe`, `before`, `far`." in page

    for edited, words in (
        (QUESTION.replace('higher, "yes"', 'lower, "yes"'), r"claims\.nearer .*: expected 'higher', now 'lower'"),
        (QUESTION[: QUESTION.index("  tight")], r"claims\.tight .*: it is gone"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(edited)
    assert toy.ran() == []


def test_files_copied_from_the_cache_equal_those_of_dvc_get(toy: Toy, tmp_path: Path) -> None:
    repository, revision = Repository(toy.root, print), toy.succeed("git", "rev-parse", "HEAD").strip()
    cache, past = DvcCache.of(toy.root, repository.run), repository.past(revision)

    def copies(path: str, target: Path) -> bool:
        return any(cache.copy(path, out, target) for out in past.outs(path))

    paths = ["runs/tiny/stage2", "runs/tiny/stage2/train_log.jsonl", "runs/tiny/stage2-compute.json"]
    for n, path in enumerate(paths):
        assert copies(path, tmp_path / f"copy{n}")
        toy.succeed("dvc", "get", ".", path, "--rev", "HEAD", "--out", str(tmp_path / f"get{n}"))
        copied, got = ({f.relative_to(top): f.read_bytes() for f in sorted([top, *top.rglob("*")]) if f.is_file()}
                       for top in (tmp_path / f"copy{n}", tmp_path / f"get{n}"))  # fmt: skip
        assert copied == got
    for path in ("runs/tiny/nothing", "runs/tiny/stage2/nothing"):
        assert not copies(path, tmp_path / "nothing")
    log = repository.fetch(revision, paths[1])
    weights = repository.fetch(revision, paths[0]) / "model.safetensors"  # its folder was there before, with the log
    assert weights.is_file()
    assert log.is_file()
    for cached in (toy.root / ".dvc" / "cache" / "files" / "md5").rglob("*"):
        if cached.is_file() and cached.read_bytes() == weights.read_bytes():
            cached.unlink()
    assert not copies(paths[0], tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_messages_contain_the_output_of_git_and_dvc(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Repository(toy.root, print).commit()
    with pytest.raises(DataError, match=r"(?s)runs/tiny/nothing of .* dvc get ended with .*nothing"):
        Repository(toy.root, print).fetch(head.revision, "runs/tiny/nothing")
    monkeypatch.setenv("TOY_FAIL", "stage2")
    with pytest.raises(TrainingError, match=r"(?s)0\.8-\w+-s0: dvc exp run ended with .*the toy fails"):
        ab(toy, ["softce_weight=0.8,0.9"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"(?s)no git commit.*not a git repository"):
        Repository(tmp_path / "empty", print).commit()
