"""Random streams: which of them coincide, and that no other code derives numbers from a seed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import coordexp
from coordexp.infra.random_streams import MEETINGS, STREAMS, entropy, generator, repetition_seed, stream_seed

PACKAGE = Path(coordexp.__file__).parent
HOME = PACKAGE / "infra" / "random_streams.py"
WORLD = ("records/scenes/composer.py", "training/pretrain.py")  # the embedded world has its own seeds
GENERATORS = {"default_rng", "SeedSequence", "RandomState", "PCG64"}


def test_streams_of_one_seed_differ_except_for_the_listed_pairs() -> None:
    """Compared as numpy seeds them, at the start and in the first parts of each: epochs, or steps and samples."""
    starts = {
        name: {
            tuple(np.random.SeedSequence(entropy(17, name, *index)).generate_state(4))
            for index in [(), *((i,) for i in range(5)), *((i, j) for i in range(5) for j in range(1, 5))]
        }
        for name, stream in STREAMS.items()
        if not stream.stride and name not in ("train/torch", "model/coordinate-rows")
    }
    wholes = {"evaluation/resamples", "gallery/images", "pack/order", "rollout/images"} | {
        name for name in starts if name.endswith("monitor/images")
    }
    for name in wholes:  # these have no parts
        starts[name] = {tuple(np.random.SeedSequence(entropy(17, name)).generate_state(4))}
    assert {frozenset(pair) for pair in combinations(starts, 2) if starts[pair[0]] & starts[pair[1]]} == MEETINGS


@pytest.mark.parametrize("name", [name for name, stream in STREAMS.items() if stream.stride])
def test_different_indices_of_a_stream_give_different_seeds(name: str) -> None:
    seeds = {stream_seed(2**31 - 1, name, index) for index in range(2000)}
    assert len(seeds) == 2000
    assert all(0 <= seed < STREAMS[name].modulus for seed in seeds)


def test_only_repetition_and_name_change_the_random_numbers() -> None:
    draws = [
        generator(seed, name, 1).integers(1 << 60)
        for seed in (17, repetition_seed(17, 1))
        for name in ("stage1/order", "stage2/order-a")
    ]
    assert len(set(draws)) == 4
    assert repetition_seed(17, 0) == 17
    assert generator(17, "stage1/order", 1).integers(1 << 60) == draws[0]
    assert entropy(17, "monitor/images") == entropy(18, "monitor/images")


def arithmetic_on_seeds(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and _name(node) in GENERATORS:
            yield _name(node)
        if isinstance(node, ast.BinOp) and any(_name(side).endswith("seed") for side in (node.left, node.right)):
            yield ast.unparse(node)


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_no_other_code_derives_a_generator_or_seed() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != HOME and not path.as_posix().endswith(WORLD)
        for what in arithmetic_on_seeds(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(), "draw from a stream of infra/random_streams.py, or add one"
    wrong = ast.parse("np.random.default_rng([run.seed + 2])")
    assert set(arithmetic_on_seeds(wrong)) == {"default_rng", "run.seed + 2"}
