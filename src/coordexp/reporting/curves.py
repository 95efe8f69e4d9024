"""Tables that `dvc plots` draws and diffs: tab-separated, one header line, empty where nothing was logged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from coordexp.config.paths import CHECKPOINTS
from coordexp.infra.files import write_text
from coordexp.reporting.inputs import TRAINED, ReportInputs, read_json
from coordexp.reporting.training_log import TrainingLog, read_training_log

Cell = str | int | float


def write_curves(inputs: ReportInputs, out_dir: Path) -> list[Path]:
    """Write stage1_loss.tsv, stage2_loss.tsv, coord_diag.tsv and pr_50.tsv; returns their paths.

    Raises:
        DataError: a log or a precision-recall curve is missing or broken.
    """
    logs = {stage: read_training_log(inputs.runs / stage / "train_log.jsonl") for stage in TRAINED}
    pr_rows = [
        (round(recall, 4), round(precision, 4), name)
        for name in CHECKPOINTS
        for recall, precision in _pr_points(inputs.evaluations / name / "pr_curve.json")
    ]
    return [
        write_log_curve(logs["stage1"], "loss/", out_dir / "stage1_loss.tsv"),
        write_log_curve(logs["stage2"], "loss/", out_dir / "stage2_loss.tsv"),
        _coord_diagnostics(logs, out_dir / "coord_diag.tsv"),
        _write_tsv(out_dir / "pr_50.tsv", ("recall", "precision", "checkpoint"), pr_rows),
    ]


def write_log_curve(log: TrainingLog, prefix: str, path: Path) -> Path:
    """The columns of one log under a prefix, by step; with the channel where the stage has channels."""
    names = log.names(prefix)
    channel = ("channel",) if log.channels else ()
    return _write_tsv(path, ("step", *channel, *names), _log_rows(log, names, bool(channel)))


def _coord_diagnostics(logs: dict[str, TrainingLog], path: Path) -> Path:
    names = list(dict.fromkeys(name for log in logs.values() for name in log.names("coord_diag/")))
    rows = [(stage, *row) for stage, log in logs.items() for row in _log_rows(log, names, with_channel=True)]
    return _write_tsv(path, ("stage", "step", "channel", *names), rows)


def _log_rows(log: TrainingLog, names: Sequence[str], with_channel: bool) -> Iterable[tuple[Cell, ...]]:
    missing = [math.nan] * len(log.step_S)
    columns = [log.columns[name].tolist() if name in log.columns else missing for name in names]
    for row, (step, channel) in enumerate(zip(log.step_S.tolist(), log.channel_S, strict=True)):
        head: tuple[Cell, ...] = (step, channel) if with_channel else (step,)
        yield (*head, *(column[row] for column in columns))


def _pr_points(path: Path) -> Iterable[tuple[float, float]]:
    curve = read_json(path, "coco-eval")
    return zip(curve["recall"], curve["precision_50"], strict=False)  # no curve where nothing is annotated


def _write_tsv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Path:
    lines = ["\t".join(header), *("\t".join(_cell(value) for value in row) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")
    return path


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
