"""Every command in README and docs runs as written, in a clone in which the smoke profile ran.

`tiny` reads `smoke`, and NAME the name of an experiment. What takes hours, GPUs, servers or a network is named in
NOT_RUN with a reason, and only its options are checked. A command that nobody names there is run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
import typer
from dvc.cli import parse_args

from coordexp import cli
from smoke_clone import Clone
from source_tree import ROOT
from warm_python import enter

pytestmark = pytest.mark.slow  # in the order of the documents: what one command leaves, the next finds

# In reading order, because a command may depend on results of earlier ones.
FIRST = (
    "README.md", "docs/quickstart.md", "docs/own_photos.md", "docs/ab_test.md", "docs/monitor_training.md",
    "docs/sharing.md",
)  # fmt: skip
PAGES = [*(ROOT / page for page in FIRST)]
PAGES += sorted(page for page in (ROOT / "docs").glob("*.md") if page not in PAGES)
# A pattern that matches a whole command, and the reason why it is not run.
NOT_RUN = {
    r"make (trees|real)|.*runs/trees/.*|.*osbs.*": "a network; test_public_sets.py",
    r"(?i:.*profile)[ =](trees|coco-val2017).*": "the same",
    r"make (demo|test)|make env": "minutes: builds the environment; the clone is what `dvc repro` left",
    r"git clone .*|cd .*|source .*": "the clone is there, and on the path",
    r"coordexp (ab|answer) (?!.*--(dry|list)).*": "trains for minutes to hours; tests/graph/test_smoke.py runs one",
    r"coordexp monitor .*|ls \.resume/.*|.* runs/monitor/.*": "watches a run in progress; tests/experiments",
    r"coordexp init .*|coordexp doctor --profile mine .*|.*profile=mine": "photos of a user; tests/doctor",
    r"coordexp (evaluate|compare) --truth .*": "detectors of others; tests/evaluation/test_foreign.py",
    r"coordexp (report|browse) .*--truth .*": "detectors of others; tests/reporting",
    r"make gpu-check.*": "a GPU; CI runs it on the CPU, shrunken",
    r".*coco-qwen3vl-.*|.*datasets/coco.*|.* published .*": "COCO, a Qwen3-VL; test_production.py is smaller",
    r"sudo .*|.*pip (un)?install .*|.*(s3|ssh)://.*|dvc remote modify storage .*": "a network",
    r".*(/where/|torchrun|accelerate).*|export .*|tensorboard .*": "servers and GPUs",
    r"COORDEXP_TRACK=.*": "`make demo` again; tests/training/test_live.py",
    r"dvc exp (push|pull|apply) .*softer": "two machines; tests/graph/test_smoke.py lets an experiment travel",
    r"#!/bin/bash\n.*": "SLURM",
}  # fmt: skip
PACKAGES_OF_OTHERS = {"supervision", "fiftyone"}


def fences(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of every fenced code block."""
    for page in PAGES:
        for block in re.findall(
            rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
        ):
            yield page.name, block


def split(block: str) -> list[str]:
    """The single commands of a block, a script as one, without comments at the end of a line."""
    if block.startswith("#!"):
        return [block]
    lines = block.replace("\\\n", " ").splitlines()
    found = (part for line in lines for part in re.sub(r"(^|\s+)#.*", "", line).split(" && "))
    return [" ".join(part.split()) for part in found if part.strip()]


COMMANDS = list(dict.fromkeys(command for _, block in fences("sh") for command in split(block)))
LISTED = {command for command in COMMANDS if any(re.fullmatch(p, command, re.DOTALL) for p in NOT_RUN)}
BLOCKS = [block for _, block in fences("python")]
COMMAND_OF_TYPER = typer.main.get_command(cli.app)


def test_options_of_commands_exist() -> None:
    """All commands; those that are run too say so sooner here."""
    for command in COMMANDS:
        if command.startswith("#!"):
            assert subprocess.run(["bash", "-n"], input=command, text=True).returncode == 0
            continue
        program, *words = (word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word))
        if program == "coordexp":
            assert words[0] in COMMAND_OF_TYPER.commands, command
            known = {name for option in COMMAND_OF_TYPER.commands[words[0]].params for name in option.opts}
            assert {word.split("=")[0] for word in words if word.startswith("-")} <= known, command
        elif program == "dvc":
            parse_args(words)  # argparse: exits with its own message
        elif program == "make":
            dry = ["make", "--dry-run", *shlex.split(command)[1:]]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_the_list_of_commands_not_run_is_current() -> None:
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command, re.DOTALL) for command in COMMANDS), pattern


def test_commands_are_in_fences() -> None:
    """Otherwise these tests would not find them."""
    for page in PAGES:
        text = page.read_text("utf-8")
        outside = re.findall(r"^    (?:coordexp|dvc|git|make|pip|python) .*", text, flags=re.MULTILINE)
        assert outside == [], page.name


@pytest.fixture(scope="module")
def reader(experimented: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone that has a git remote, for what a reader of the documents does to it."""
    copy = experimented.copy(tmp_path_factory.mktemp("reader")).without_experiments()
    bare = tmp_path_factory.mktemp("git") / "bare.git"
    copy.succeed("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(bare))
    copy.succeed("git", "remote", "add", "origin", str(bare))
    copy.succeed("git", "push", "--quiet", "--set-upstream", "origin", "main")
    return copy


def for_smoke(text: str, reader: Clone) -> str:
    """A text of the documents with this clone's profile, experiment and folder of the remote."""
    text = re.sub(r"\btiny\b", "smoke", text).replace("/mnt/share", str(reader.root.parent))
    if "NAME" in text:
        names = reader.succeed("git", "for-each-ref", "--sort=creatordate", "--format=%(refname)", "refs/exps/*/*/*")
        text = text.replace("NAME", names.split()[0].rpartition("/")[2])  # the first, also when others follow
    return text


@pytest.fixture
def inside(reader: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, in the clone and with its environment."""
    assert reader.warm
    monkeypatch.chdir(reader.root)
    enter(monkeypatch, reader.environment, reader.warm)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in LISTED])
@pytest.mark.usefixtures("inside")
def test_a_command_runs_as_written(command: str, reader: Clone, capfd: pytest.CaptureFixture[str]) -> None:
    written = for_smoke(command, reader)
    program, *words = shlex.split(written)
    if program == "coordexp":  # without another start of Python
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert not ended.value.code, capfd.readouterr()
        return
    if program == "make":  # the environment is that of the tests
        written = " ".join(["make", "--old-file=env", *map(shlex.quote, words)])
    reader.succeed("bash", "-c", written)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("inside")
def test_python_runs_as_written(block: str, reader: Clone) -> None:
    code = compile(for_smoke(block, reader), "documents", "exec")
    if not PACKAGES_OF_OTHERS & set(re.findall(r"^import (\w+)", block, flags=re.MULTILINE)):
        exec(code, {"__name__": "documents"})
