"""`make quick` runs the tests relevant to a change, and starts none after its time limit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import changed


def test_order_is_tests_of_the_module_then_importers_then_invariants() -> None:
    found = changed.tests_of([Path("src/coordexp/matching/matcher.py"), Path("tests/text/test_codecs.py")])
    places = [found.index(Path("tests") / name) for name in ("text/test_codecs.py", "matching/test_matcher.py")]
    assert places == [0, 1]
    assert Path("tests/text/test_parser.py") not in found
    rules = [path.parent.name == "invariants" for path in found]
    assert any(rules)
    assert rules == sorted(rules)


@pytest.mark.parametrize(
    ("file", "test"),
    [
        ("src/coordexp/geometry/boxes.py", "tests/drawing/test_boxes.py"),  # imports it
        ("src/coordexp/reporting/templates/page.html", "tests/reporting/test_page.py"),  # has its name
        ("tests/smoke_clone.py", "tests/graph/test_kill.py"),  # a helper
        ("pipelines/check.py", "tests/graph/test_inputs.py"),
        ("configs/smoke.yaml", "tests/graph/test_smoke.py"),  # names it
    ],
)
def test_every_changed_file_has_tests(file: str, test: str) -> None:
    assert Path(test) in changed.tests_of([Path(file)])


def test_changed_files_are_those_that_differ_from_a_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--initial-branch", "main")
    for name in ("kept", "later", "edited"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "-m", "first")
    git("checkout", "-b", "work")
    (tmp_path / "edited").write_text("otherwise")
    git("commit", "-am", "second")
    git("checkout", "main")
    (tmp_path / "later").write_text("of main alone")
    git("commit", "-am", "third")
    git("checkout", "work")
    (tmp_path / "new").touch()
    monkeypatch.setattr(changed, "ROOT", tmp_path)
    assert changed.changed_files("main") == [Path("edited"), Path("new")]
    with pytest.raises(SystemExit, match="no-branch: no such branch"):
        changed.changed_files("no-branch")


def test_tests_that_would_start_after_the_deadline_are_skipped() -> None:
    changed.Deadline(3600).pytest_runtest_setup()
    with pytest.raises(pytest.skip.Exception, match="make test runs it"):
        changed.Deadline(0).pytest_runtest_setup()
