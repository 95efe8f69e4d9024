"""Saved states: their contents, detection of damage, and which processes can resume from which states."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coordexp.errors import CheckpointError, DamagedArtefactError
from coordexp.infra.artefacts import HASHES
from coordexp.training import checkpoint, recorder
from coordexp.training.checkpoint import (
    NO_LOG,
    ResumeState,
    StateSaver,
    generators,
    load_state,
    log_end,
    save_state,
    seed_process,
)
from coordexp.training.recorder import Recorder
from coordexp.training.state_files import FACTS, Rows, generations, open_state, publish_state, write_part

RUN = "delete .* to start this stage at step 0"


def trained_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A frozen layer, one that trains, and moments of the latter."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    take_step(model, optimizer)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.rand(2, 7)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(state: ResumeState | None) -> dict[str, object]:
    assert state is not None
    tensors = state.model | {f"optimizer/{name}": value for name, value in state.optimizer.items()}
    values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in tensors.items()}
    return values | {"step": state.step, "random": state.torch_rng.tolist(), "start": state.start}


def saved(folder: Path, steps: int = 1) -> list[dict[str, object]]:
    """States after so many steps in one folder; returns what is in each."""
    model, optimizer = trained_model()
    found = []
    for step in range(1, steps + 1):
        save_state(folder, step, model, optimizer, "weights")
        found.append(contents(load_state(folder)))
        take_step(model, optimizer)
    return found


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def outcomes(folder: Path, changes: Iterator[tuple[Path, bytes]]) -> set[str]:
    """What becomes of changed files: "refused" by a named error, or the step of the state that was read."""
    wanted = {state["step"]: state for state in map(contents, map(read_alone, generations(folder)))}
    seen = set()
    for path, changed in changes:
        whole = path.read_bytes()
        path.write_bytes(changed)
        found: object
        try:
            found = contents(load_state(folder))
            step = found["step"]
        except DamagedArtefactError as error:
            found, step = str(error), "refused"
        path.write_bytes(whole)
        if step == "refused":
            assert re.search(RUN, str(found))
            assert path.name in str(found)
        else:
            assert found == wanted[step]
        seen.add(str(step))
    return seen


def read_alone(generation: Path) -> ResumeState:
    return ResumeState(open_state(generation))


def flips(paths: list[Path], count: int) -> Iterator[tuple[Path, bytes]]:
    rng = random.Random(0)
    for path in paths:
        for _ in range(count):
            changed = bytearray(path.read_bytes())
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            yield path, bytes(changed)


def truncations(paths: list[Path], step: int) -> Iterator[tuple[Path, bytes]]:
    for path in paths:
        whole = path.read_bytes()
        yield from ((path, whole[:size]) for size in range(0, len(whole), step))


def test_a_state_restores_everything_except_frozen_weights(tmp_path: Path) -> None:
    (wanted,) = saved(tmp_path)
    assert {name for name in wanted if not name.startswith("optimizer/")} == {
        "1.weight", "1.bias", "step", "random", "start"
    }  # fmt: skip
    model, optimizer = trained_model()
    take_step(model, optimizer)
    state = load_state(tmp_path)
    assert state is not None
    state.restore(model, optimizer)
    save_state(tmp_path / "again", 1, model, optimizer, "weights")
    assert contents(load_state(tmp_path / "again")) == wanted


@pytest.mark.parametrize("steps", [1, 2])
def test_damage_is_never_ignored(tmp_path: Path, steps: int) -> None:
    """Of one state an error, of two the one before; what changes nothing that is read may pass."""
    saved(tmp_path, steps)
    newest = files_of(generations(tmp_path)[0])
    assert [path.name for path in newest] == [HASHES, FACTS, "part-000.safetensors"]
    instead = "refused" if steps == 1 else "1"
    assert outcomes(tmp_path, truncations(newest[2:], 97)) == {instead}
    assert outcomes(tmp_path, truncations(newest[:2], 1)) == {instead}
    assert outcomes(tmp_path, flips(newest, 150)) == {instead}


def test_falling_back_to_the_previous_state_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, _ = saved(tmp_path, 2)
    (generations(tmp_path)[0] / HASHES).unlink()
    assert contents(load_state(tmp_path)) == before
    assert "Resuming from the previous state, state-000001" in caplog.text


def test_two_states_are_kept_and_a_damaged_one_does_not_displace_an_intact_one(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    assert [path.name for path in generations(tmp_path)] == ["state-000003", "state-000002"]
    next(generations(tmp_path)[0].glob("part-*")).write_bytes(b"")
    model, optimizer = trained_model()
    with StateSaver(tmp_path, "weights", load_state(tmp_path)) as saver:
        saver.save(4, model, optimizer, {0: generators()})
    assert [path.name for path in generations(tmp_path)] == ["state-000004", "state-000002"]


def test_a_half_written_state_is_ignored(tmp_path: Path) -> None:
    (wanted,) = saved(tmp_path)
    write_part(tmp_path / ".state-000009.tmp", 0, {"model/x": Rows(torch.ones(3), 0, (3,))})
    assert contents(load_state(tmp_path)) == wanted
    with StateSaver(tmp_path, "weights"):
        assert not list(tmp_path.glob(".state-*"))


def test_a_log_that_changed_is_noticed(tmp_path: Path) -> None:
    log, (model, optimizer) = tmp_path / "log.jsonl", trained_model()
    for step in (1, 2):
        with log.open("a") as out:
            out.write(json.dumps({"step": step - 1, "loss": 0.5}) + "\n")
        with StateSaver(tmp_path, "") as saver:
            saver.save(step, model, optimizer, {0: generators()}, log_end(log, log.stat().st_size))
    whole = log.read_bytes()
    for place, expected in ((len(whole) - 3, 1), (3, None)):
        changed = bytearray(whole)
        changed[place] ^= 1
        log.write_bytes(changed)
        if expected:
            found = load_state(tmp_path, log)
            assert found is not None
            assert found.step == expected
        else:
            with pytest.raises(DamagedArtefactError, match=RUN):
                load_state(tmp_path, log)


def test_a_state_of_another_model_or_start_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    state = load_state(tmp_path)
    assert state is not None
    with pytest.raises(CheckpointError, match="'weights', but the present weights have hash 'other'"):
        state.check_start("other")
    for model in (nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)), nn.Sequential(nn.Identity(), nn.Linear(6, 3))):
        with pytest.raises(CheckpointError, match="trained weights differ in name or shape"):
            state.load_weights(model)


def test_rows_can_be_read_whatever_process_wrote_them(tmp_path: Path) -> None:
    """Three writers of unequal parts, any reader."""
    whole = torch.arange(70.0).reshape(7, 10)
    cuts = [(0, 3), (3, 6), (6, 7)]
    held = [{"model/w": Rows(whole[a:b].contiguous(), a, (7, 10))} for a, b in cuts]
    held[0]["model/n"] = Rows(torch.tensor(4.0), 0, ())
    parts: dict[str, str] = {}
    for rank, own in enumerate(held):
        parts |= write_part(tmp_path, rank, own)
    assert write_part(tmp_path, 3, {}) == {}
    publish_state(tmp_path, {}, parts)
    state = open_state(tmp_path)
    state.verify(state.parts)
    assert state.read("model/n") == 4
    for first in range(7):
        for count in range(1, 8 - first):
            assert torch.equal(state.read("model/w", first, count), whole[first : first + count])
    assert torch.equal(state.read("model/w"), whole)
    assert (state.shape("model/w"), state.shape("model/x"), state.names("model")) == ((7, 10), None, ["n", "w"])


def test_generators_restore_for_more_or_fewer_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes its own; one without gets numbers of its own, the same every time; surplus is ignored."""
    model, optimizer = trained_model()
    states = {}
    for rank in range(2):
        torch.manual_seed(100 + rank)
        states[rank] = generators()
    with StateSaver(tmp_path, "") as saver:
        saver.save(5, model, optimizer, states)
    state = load_state(tmp_path)
    assert state is not None
    drawn = []
    for rank in (0, 1, 2, 3, 3):
        monkeypatch.setattr(checkpoint, "world", lambda rank=rank: checkpoint_world(rank))
        torch.manual_seed(7)
        state.restore(model, optimizer)
        drawn.append(float(torch.rand(1)))
    for rank in range(2):
        torch.manual_seed(100 + rank)
        assert drawn[rank] == float(torch.rand(1))
    assert drawn[3] == drawn[4]
    assert len(set(drawn)) == 4


def checkpoint_world(rank: int) -> object:
    from coordexp.training.distributed import World

    return World(rank, 4, torch.device("cpu"))


def test_the_main_process_starts_with_the_seed_of_the_run() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    seed_process(0)
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Writing begins when the returned function is called."""
    gate = threading.Event()

    def waiting(*args: object) -> dict[str, str]:
        assert gate.wait(30)
        return write_part(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_part", waiting)
    return gate.set


def test_a_state_holds_the_values_at_the_time_of_saving(tmp_path: Path, slow_disk: Callable[[], None]) -> None:
    """Steps go on while the thread writes, twice, in the memory of the first copy."""
    model, optimizer = trained_model()
    wanted = model[1].weight.detach().clone()
    with StateSaver(tmp_path, "") as saver:
        saver.save(1, model, optimizer, {0: generators()})
        take_step(model, optimizer)
        assert load_state(tmp_path) is None
        slow_disk()
        later = model[1].weight.detach().clone()
        saver.save(2, model, optimizer, {0: generators()})
        take_step(model, optimizer)
    first, second = (read_alone(path).model["1.weight"] for path in reversed(generations(tmp_path)))
    assert torch.equal(first, wanted)
    assert torch.equal(second, later)


def test_an_error_of_the_thread_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_part", full)
    model, optimizer = trained_model()
    with pytest.raises(OSError, match="No space left"):
        save_and_go_on(model, optimizer, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) < 1000


def save_and_go_on(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    with Recorder(folder / "state", folder / "log.jsonl", "", 0.0, None) as disk:
        disk.save(1, model, optimizer)
        for _ in range(1000):
            disk.log({"step": 1})
            threading.Event().wait(0.01)


def test_saving_takes_a_small_fraction_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that took 3 s of the steps is followed by 147 s without one, or the floor if that is longer."""
    now = [1000.0]
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(StateSaver, "cost_s", 3.0)
    for least, due in ((60.0, 3.0 / recorder.SAVING_FRACTION), (500.0, 500.0)):
        with Recorder(tmp_path / "state", tmp_path / "log.jsonl", "", least, None) as disk:
            began = now[0]
            now[0] = began + due - 1
            assert not disk.is_due()
            now[0] = began + due + 1
            assert disk.is_due()


def test_the_end_of_a_missing_log_is_zero_bytes(tmp_path: Path) -> None:
    assert log_end(tmp_path / "none", 0) == NO_LOG
