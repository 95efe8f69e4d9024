"""What TensorBoard is given while a run is watched, read back by TensorBoard's own reader."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coordexp.experiments.events import Events


def append(path: Path, *rows: dict) -> None:
    with path.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, round(event.value, 4)) for event in read.Scalars(tag)]


def test_every_row_is_written_once_with_its_picture(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "events"
    (run / "monitor").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(run / "monitor" / "step_000002.jpg")
    events = Events(out)
    events.follow(tmp_path / "nowhere")
    append(run / "train_log.jsonl", {"step": 0, "loss/total": 4.0, "channel": "A", "time/step_s": 1.0})
    events.follow(run)
    append(run / "train_log.jsonl", {"step": 1, "loss/total": 3.0})
    append(run / "monitor.jsonl", {"step": 2, "f1": 0.25, "images": 16, "seconds": 1.0})
    with (run / "train_log.jsonl").open("a") as log:
        log.write('{"step": 2, "loss/to')  # a line that is being written
    events.follow(run)
    events.follow(run)
    append(tmp_path / "monitor.jsonl", {"step": 2, "map": 0.5, "map_50": None, "images": 16})
    events.follow(tmp_path, "monitor")
    assert scalars(out, "train/loss/total") == [(0, 4.0), (1, 3.0)]
    assert scalars(out, "eval/f1") == [(2, 0.25)]
    assert scalars(out, "monitor/map") == [(2, 0.5)]
    read = EventAccumulator(str(out))
    read.Reload()
    assert [image.step for image in read.Images("eval")] == [2]
    assert set(read.Tags()["scalars"]) == {"train/loss/total", "eval/f1", "monitor/map"}
