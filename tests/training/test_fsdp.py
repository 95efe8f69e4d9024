"""Weights spread over processes: the trace and the files of one process, and resuming from whatever was saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from coordexp.errors import ConfigError
from coordexp.training.stage2 import train_stage2
from stage_runs import ENDS_WITHIN_S, EXACT, assert_alike, run_stage, trace

SHARDED = {"processes": 2, "sharding": "fsdp2"}


def weights(ready, stage):
    return load_file(ready.paths.run(stage) / "model.safetensors")


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_trace_and_the_checkpoint_are_those_of_one_process(ready, stage):
    code, output = run_stage(ready, stage, {"processes": 1})
    assert code == 0, output
    alone, expected = trace(ready, stage), weights(ready, stage)
    code, output = run_stage(ready, stage, SHARDED)
    assert code == 0, output
    assert_alike(trace(ready, stage), alone)
    assert_same_weights(weights(ready, stage), expected)
