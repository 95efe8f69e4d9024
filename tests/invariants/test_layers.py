"""Layers import downwards only, and the core starts without a tensor library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from source_tree import LAYERS, imports, layer_of, modules

MODULES = sorted(name for name in modules() if layer_of(name))
CORE = ("config", "geometry", "records", "text", "matching", "evaluation")
# Not even downwards: evaluating a predictions file needs no code of the model that made it.
FORBIDDEN = {"evaluation": {"models", "losses", "rollout", "training"}}


@pytest.mark.parametrize(
    ("imported", "layer"),
    [
        ("coordexp", ""),
        ("coordexp.__version__", ""),
        ("coordexp.errors", "errors"),
        ("coordexp.text.parser.parse_answer", "text"),
        ("coordexp.nowhere", "nowhere"),
        ("numpy.errors", ""),
    ],
)
def test_layer_of_an_import(imported: str, layer: str) -> None:
    assert layer_of(imported) == layer


def test_imports_point_downwards() -> None:
    unknown = {layer_of(name) for name in MODULES} - set(LAYERS)
    assert not unknown, "add the layer to source_tree.LAYERS in its place"
    upwards = {}
    for module in MODULES:
        own = layer_of(module)
        allowed = {"", *LAYERS[: LAYERS.index(own) + 1]} - FORBIDDEN.get(own, set())
        if found := sorted(name for name in imports(modules()[module]) if layer_of(name) not in allowed):
            upwards[module] = found
    assert upwards == {}


def test_the_library_does_not_import_the_stage_graph() -> None:
    roots = {name: {imported.split(".")[0] for imported in imports(modules()[name])} for name in MODULES}
    assert {name for name, found in roots.items() if found & {"dvc", "pipelines"}} == set()
    assert {name for name, found in roots.items() if "dvclive" in found} == {"coordexp.training.live"}


def test_the_product_does_not_import_the_embedded_world() -> None:
    """For the product, it is a COCO folder and a checkpoint: only its composing stage and its pipeline import it."""
    knowing = {name for name, file in modules().items() if any(i.split(".")[0] == "toyworld" for i in imports(file))}
    assert {n for n in knowing if not n.startswith("toyworld")} == {
        "pipelines.raw", "pipelines.base.pretrain", "pipelines.base.scenes",
    }  # fmt: skip


def test_the_core_starts_without_torch(repository: Path) -> None:
    core = [name for name in MODULES if layer_of(name) in CORE]
    assert core
    script = (
        "import importlib, sys\n"
        f"for name in {core!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'scipy.stats'} & sys.modules.keys()\n"
        "    assert not heavy, f'importing {name} loads {sorted(heavy)}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(repository / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
