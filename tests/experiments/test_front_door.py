"""`coordexp run`, `runs` and `compare` as users call them, on a toy repository."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from coordexp import cli
from coordexp.experiments.runs import Repository
from toy_graph import Toy, cold_path, copied_toy


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Done]


@pytest.fixture
def toy(committed_toy: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, warm: Path) -> Toy:
    toy = copied_toy(committed_toy, tmp_path, repository, monkeypatch, warm)
    toy.ran()
    monkeypatch.chdir(toy.root)
    return toy


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return call


def status(toy: Toy) -> list[str]:
    return toy.succeed("git", "status", "--porcelain").splitlines()


def test_an_experiment_from_plan_to_result(toy: Toy, call: Call) -> None:
    values = ("run", "-S", "softce_weight=0.2")
    plan = call(*values, "--dry").out
    stages = [line.split()[0] for line in plan.splitlines() if line.startswith("  ")]
    assert stages == ["stage2", "decode@stage1-control", "decode@stage2", "coco-eval", "report", "at"]
    assert "softce_weight changed; cost unknown" in plan
    assert (toy.ran(), status(toy)) == ([], [])

    done = call(*values)
    assert done.code == 0, done.err
    ran = ["stage2", "decode@stage1-control", "decode@stage2", "coco-eval"]
    assert toy.ran() == [f"{stage} 0.2 0" for stage in ran]
    told = [line.split(", ")[0].removeprefix("softce_weight-0.2: ") for line in done.err.splitlines()]
    assert told == ["softce_weight=0.2", "check", *ran, "report", "comparing with main"]
    assert "`softce_weight-0.2` against `main`: **better**: `coco.mAP` +" in done.out
    assert "changed: softce_weight 1.0 -> 0.2" in done.out
    assert status(toy) == ["?? reports/experiments/"]
    page = toy.root / "reports" / "experiments" / "softce_weight-0.2.md"
    text = page.read_text()
    assert text.index("**better**") < text.index("**Recommendation.** Keep the change") < text.index("**Cost.** ")
    assert "| `softce_weight` | 1.0 | 0.2 | stage2 |" in text

    assert call(*values).out.splitlines()[1].endswith("exists as softce_weight-0.2")
    page.unlink()
    assert "report: reports/experiments/softce_weight-0.2.md" in call("compare", "main", "softce_weight-0.2").out
    assert page.read_text() == text
    table = call("runs").out
    assert max(map(len, table.splitlines())) <= 80
    assert all(word in table for word in ("softce_weight-0.2", "softce_weight=0.2", "better"))
    assert "stage2                 softce_weight changed; about" in call("run", "-S", "softce_weight=0.4", "--dry").out
    taken = call("run", "-S", "softce_weight=0.4", "--name", "softce_weight-0.2")
    assert (taken.code, "another experiment has this name" in taken.err) == (2, True)
    assert toy.ran() == []


def test_existing_results_are_reused(toy: Toy, call: Call) -> None:
    for arguments in ([], ["-S", "softce_weight=1.0"]):
        done = call("run", *arguments)
        assert (done.code, "nothing to compare" in done.out) == (0, True)
    assert (toy.ran(), status(toy)) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run -S softce_wt=0.2", "softce_wt: unknown key, set to 0.2 (a number). Did you mean 'softce_weight'?"),
        ("run -S +softce_wt=0.2", "Did you mean 'softce_weight'?"),
        ("run -S +custom.coord_loss.weight=1", "custom.coord_loss: removed."),
        ("run -S sigma=-1", "sigma: found -1 (an integer), expected a number in (0, 200]."),
        ("run -S eval.f1_ious=0.5", "eval.f1_ious: found 0.5 (a number), expected a non-empty list"),
        ("run -S configs/tiny.yaml:stage2.steps=many", "stage2.steps: found 'many'"),
        ("run -S profile=nope", "within one profile"),
        ("run -S sigma", "expected KEY=VALUE"),
        ("run -S sigma=1.0 -S sigma=2.0", "given twice"),
        ("run -S sigma=2.5 --name ../x", "--name '../x'"),
        ("run -S sigma=1.0,2.0", "sigma: found '1.0,2.0' (text)"),
        ("compare main nothing", "'nothing': not a file, git revision or experiment."),
        ("compare main mian", "Did you mean 'main'?"),
        ("compare main HEAD", "are the same revision"),
        ("compare main params.yaml", "Expected prediction files, or two revisions"),
        ("compare main HEAD~1", "cannot be read"),
    ],
)
def test_invalid_input_gives_a_message_and_runs_nothing(toy: Toy, call: Call, arguments: str, words: str) -> None:
    done = call(*arguments.split())
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert (toy.ran(), status(toy)) == ([], [])


def test_a_missing_profile_and_an_edited_file_stop_before_anything_runs(toy: Toy, call: Call) -> None:
    params = toy.root / "params.yaml"
    params.write_text(params.read_text() + "# edited\n")
    done = call("run", "-S", "sigma=2.5")
    assert (done.code, "1 tracked files differ from the commit, for example params.yaml" in done.err) == (2, True)
    params.write_text(params.read_text().replace("profile: tiny", "profile: tinny"))
    toy.commit("a profile that is not there")
    done = call("run", "-S", "sigma=2.5")
    assert (done.code, "configs/tinny.yaml" in done.err) == (2, True)
    assert toy.ran() == []


def test_only_one_command_runs_experiments_at_a_time(toy: Toy, call: Call) -> None:
    with Repository(Path(), print).held():
        for command in ("run", "ab"):
            done = call(command, "-S", "softce_weight=0.2")
            assert (done.code, "(coordexp run or ab, since" in done.err) == (2, True)
    assert toy.ran() == []


def test_a_stage_that_fails_loses_nothing(toy: Toy, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAIL", "coco-eval")
    done = call("run", "-S", "softce_weight=0.2")
    assert done.code == 1
    assert "the toy fails" in done.err
    assert "the toy fails" in (toy.root / "runs" / "experiments" / "softce_weight-0.2.log").read_text()
    assert status(toy) == []
    monkeypatch.delenv("TOY_FAIL")
    toy.ran()
    assert call("run", "-S", "softce_weight=0.2").code == 0
    assert toy.ran() == ["coco-eval 0.2 0"]  # stage 2 had finished


def test_a_stopped_run_says_how_to_resume(toy: Toy, monkeypatch: pytest.MonkeyPatch, warm: Path) -> None:
    monkeypatch.setenv("PATH", cold_path(warm))  # a stage that was forked elsewhere is not stopped with the command
    monkeypatch.setenv("TOY_HANG", "stage2 0.2 0")
    command = ["python", "-m", "coordexp.cli", "run", "-S", "softce_weight=0.2"]
    with subprocess.Popen(command, cwd=toy.root, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while "stage2 0.2 0" not in (toy.log.read_text() if toy.log.exists() else ""):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "run the same command again" in err
    assert status(toy) == []


def test_without_results_the_commit_runs_first(toy: Toy, call: Call, tmp_path: Path, monkeypatch) -> None:
    """A clone without cache: the plan says so, and everything is made once."""
    toy.succeed("git", "clone", "--quiet", str(toy.root), str(tmp_path / "fresh"))
    monkeypatch.chdir(tmp_path / "fresh")
    plan = call("run", "-S", "softce_weight=0.2", "--dry").out
    assert "the results of main are not available: it runs first" in plan
    assert [line.split()[0] for line in plan.partition("experiment  ")[2].splitlines() if "  " in line[:2]] == [
        "stage2", "decode@stage1-control", "decode@stage2", "coco-eval", "report", "at"
    ]  # fmt: skip
    assert call("run", "-S", "softce_weight=0.2").code == 0
    ran = toy.ran()
    assert [line.split()[0] for line in ran].count("stage1") == 1
    assert {line for line in ran if line.startswith("stage2")} == {"stage2 1.0 0", "stage2 0.2 0"}
    assert call("run", "-S", "softce_weight=0.4").code == 0
    assert toy.ran() == [
        f"{stage} 0.4 0" for stage in ("stage2", "decode@stage1-control", "decode@stage2", "coco-eval")
    ]


def test_runs_on_different_images_are_not_compared(toy: Toy, call: Call) -> None:
    text = (toy.root / "toy.py").read_text()
    toy.write("toy.py", text.replace("for i in range(1, 4)", "for i in range(1, 5)"))
    toy.succeed("dvc", "repro", "--quiet")
    toy.commit("one image more")
    done = call("compare", "HEAD~2", "HEAD")
    assert done.code == 0, done.err
    assert "**not defined**: The two evaluations hold different images" in done.out
    assert "changed: code of" in done.out
