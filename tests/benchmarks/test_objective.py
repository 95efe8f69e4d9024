"""The ways that the benchmark compares do the same thing, and its table is complete."""

from __future__ import annotations

import pytest
import torch
from benchmarks.objective import ORDER, WAYS, Size, fused_beside_bare, measure_here, rows_of

SMALL = Size(tokens=512, vocab=1500, hidden=16, stock_share=0.5)


@pytest.mark.parametrize("way", ["usual", "stock"])
def test_all_variants_have_the_loss_and_gradients_of_the_fused_one(way):
    for found, expected in zip(WAYS[way](SMALL.pack()), WAYS["fused"](SMALL.pack()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_pack_is_mostly_image_and_prompt():
    pack = SMALL.pack()
    assert len(pack.slots_N) == pytest.approx(0.3 * SMALL.tokens, abs=1)
    assert pack.n_coord == pytest.approx(0.15 * len(pack.slots_N), abs=2)


def test_the_table():
    rows = rows_of({"bare": fused_beside_bare(SMALL)} | {way: measure_here(way, SMALL) for way in ORDER}, SMALL)
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.value is None or row.value >= 0 for row in rows)
    assert {row.name: row.target for row in rows if row.target} == {
        "fused / bare: time": "<= 1.1 x",
        "fused / stock: time": "<= 0.5 x",
        "fused: extra memory": "<= 0.05 of full logits",
    }
