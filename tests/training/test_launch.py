"""Starting the processes of a stage: by the stage itself, or by a launcher whose processes join."""

from __future__ import annotations

import json

import pytest

from coordexp.errors import ConfigError, Interrupted, TrainingError
from coordexp.training import launch
from coordexp.training.launch import _error_of, run_in_processes
from stage_runs import run_stage, trace

WORLD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
# As `accelerate config` writes it for two GPUs; without a GPU the processes find none and take gloo.
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "num_machines": 1,
    "num_processes": 2,
    "main_process_port": 0,
    "mixed_precision": "no",
    "use_cpu": False,
}


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        ({0: 75, 1: 75}, Interrupted),
        ({0: 75, 1: -15}, Interrupted),
        ({0: -15, 1: 1}, TrainingError),
        ({0: 2, 1: 2}, ConfigError),
        ({0: -9, 1: -15}, TrainingError),
        ({0: 75, 1: 1}, TrainingError),
    ],
)
def test_exit_codes_map_to_errors(codes, kind):
    assert type(_error_of(codes, 2)) is kind


@pytest.fixture
def started(monkeypatch):
    """What would be started, and nothing of a launcher in the environment."""
    asked = []
    for name in (*WORLD, *launch._ENGINES, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "elastic_launch", lambda config, _: lambda *_: asked.append(config.nproc_per_node))
    return asked


def test_a_stage_starts_its_own_processes_unless_it_was_started_by_a_launcher(started, monkeypatch):
    assert not run_in_processes(1)
    assert run_in_processes(3)
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    assert not run_in_processes(3)
    assert started == [3]


@pytest.mark.parametrize("missing", [name for name in WORLD if name != "WORLD_SIZE"])
def test_an_incomplete_launcher_environment_is_rejected(started, monkeypatch, missing):
    """As of `srun` without torchrun: every process would take itself for the first and wait for the others."""
    for name, value in WORLD.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE to 2, but not {missing}"):
        run_in_processes(1)


@pytest.mark.parametrize("size", ["", "two", "0", "-1"])
def test_an_invalid_number_of_processes_is_rejected(started, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match="expected a number of processes"):
        run_in_processes(1)


@pytest.mark.parametrize("name", launch._ENGINES)
def test_accelerate_engines_are_rejected(started, monkeypatch, name):
    for key, value in {**WORLD, name: "true"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=f"{launch._ENGINES[name]}, which this project does not use"):
        run_in_processes(1)


def test_mixed_precision_of_accelerate_gives_a_warning(started, monkeypatch, caplog):
    for key, value in {**WORLD, "ACCELERATE_MIXED_PRECISION": "fp16"}.items():
        monkeypatch.setenv(key, value)
    assert not run_in_processes(1)
    assert "accelerate's mixed_precision fp16 is ignored" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_processes_that_a_launcher_started_join(ready, tmp_path, launcher):
    if launcher == "torchrun":
        starter = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        pytest.importorskip("accelerate")
        (tmp_path / "accelerate.yaml").write_text(json.dumps(ACCELERATE))  # in YAML, a bare no is false
        config = ["--config_file", str(tmp_path / "accelerate.yaml")]
        starter = ["python", "-m", "accelerate.commands.launch", *config]
    # a file of its own for each: on a shared standard output the lines of two processes run into each other
    noted = (
        "from pathlib import Path\nfrom coordexp.training.distributed import world\n"
        f"Path({str(tmp_path)!r}, f'joined {{world().rank}} of {{world().size}}').touch()"
    )
    code, output = run_stage(ready, "stage1", {"processes": 1}, before=noted, starter=starter)
    assert code == 0, output
    assert sorted(path.name for path in tmp_path.glob("joined*")) == ["joined 0 of 2", "joined 1 of 2"], output
    assert len(trace(ready, "stage1")) == 4
    assert json.loads((ready.paths.run("stage1") / "run_metadata.json").read_text())["stage"] == "stage1"
