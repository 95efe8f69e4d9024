"""Which edits change the code hash of an entry point, and which do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coordexp.infra.code_hash import Modules

FILES = {
    "pipelines/__init__.py": "",
    "pipelines/train.py": "from lib.steps import step\n\n\ndef run():\n    return step()\n",
    "pipelines/judge.py": "def run():\n    from lib import tables\n\n    return tables.NAME\n",
    "src/lib/__init__.py": '__version__ = "1"\n',
    "src/lib/steps.py": (
        "from __future__ import annotations\n\nfrom typing import TYPE_CHECKING\n\nimport json\n\n"
        "if TYPE_CHECKING:\n    from lib.typed import T\n\n\n"
        "def step(size: int = 3) -> T:\n    return json.loads(str(size))\n"
    ),
    "src/lib/tables.py": 'NAME = "table.json"\n',
    "src/lib/table.json": "[1]\n",
    "src/lib/typed.py": "T = int\n",
    "src/lib/unused.py": "X = 1\n",
    "src/lib/settings.py": (
        "from pydantic import BaseModel, Field, model_validator\n\n\nclass Block(BaseModel):\n"
        '    size: int = Field(gt=0, description="how big")\n\n    @model_validator(mode="after")\n'
        "    def _fits(self):\n        return self\n\n"
        "    @property\n    def double(self):\n        return 2 * self.size\n"
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def hashes(root: Path) -> dict[str, str]:
    modules = Modules.below(root / "src", root)
    return {name: modules.code_hash(name) for name in ("pipelines.train", "pipelines.judge", "lib.settings")}


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("src/lib/steps.py", "def step", "# a comment\ndef step", set()),
        ("src/lib/steps.py", "T:\n", 'T:\n    """A docstring."""\n', set()),
        ("src/lib/steps.py", "(str(size))", "(\n        str(size),\n    )", set()),
        ("src/lib/steps.py", "size: int = 3", "size: int = 4", {"pipelines.train"}),
        ("src/lib/__init__.py", '"1"', '"2"', set()),
        ("src/lib/__init__.py", '"1"', '"1"\nX = 1', {"pipelines.train", "pipelines.judge", "lib.settings"}),
        ("src/lib/typed.py", "int", "float", set()),
        ("src/lib/unused.py", "1", "2", set()),
        ("src/lib/tables.py", "\n", "\nX = 1\n", {"pipelines.judge"}),
        ("src/lib/table.json", "1", "2", {"pipelines.judge"}),
        ("pipelines/train.py", "step()", "step(4)", {"pipelines.train"}),
        ("src/lib/settings.py", "gt=0", "gt=1", set()),
        ("src/lib/settings.py", "return self\n", "return None\n", set()),
        ("src/lib/settings.py", "2 * self", "3 * self", {"lib.settings"}),
    ],
)
def test_which_edits_change_a_hash(root: Path, file: str, old: str, new: str, changed: set[str]) -> None:
    before = hashes(root)
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    after = hashes(root)
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_package_means_its_modules_and_left_out_modules_are_not_followed(root: Path) -> None:
    modules = Modules.below(root / "src", root)
    assert {"lib.unused", "lib.tables"} <= modules.import_closure("lib")
    assert modules.import_closure("pipelines.train", left_out={"lib.steps"}) == {"pipelines", "pipelines.train"}


def test_the_closure_of_an_entry_contains_every_module_that_its_import_loads(repository: Path) -> None:
    program = (
        "import sys, pipelines.report; print(*(n for n in sys.modules if n.split('.')[0] in ('coordexp', 'pipelines')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repository,
        env={"PYTHONPATH": f"{repository / 'src'}:{repository}"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "coordexp.reporting.report" in loaded
    assert loaded <= Modules.below(repository / "src", repository).import_closure("pipelines.report")
