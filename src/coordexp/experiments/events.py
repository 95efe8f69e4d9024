"""TensorBoard events of a run that is watched from outside: its log, its own looks, and those of the watcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coordexp.errors import ConfigError
from coordexp.infra.logs import read_rows
from coordexp.records.images import read_rgb

LOG, LOOKS, PICTURES = "train_log.jsonl", "monitor.jsonl", "monitor"
_LOGGED = ("loss/", "coord_diag/", "lr", "grad_norm")


class Events:
    """Writes into one folder; every row of a file is written once."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard: the package is not installed; pip install tensorboard.") from error
        self._writer: Any = SummaryWriter(str(folder))
        self._written: dict[str, int] = {}  # by file: the last step

    def look(self, step: int, values: dict[str, float | None]) -> None:
        """Metrics of one look of the watcher, under dev/."""
        for key, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"dev/{key.replace('.', '/')}", value, step)
        self._writer.flush()

    def follow(self, run: Path) -> None:
        """What training added to its folder since the last call: losses, and its looks with their pictures."""
        for row in self._new_rows(run / LOG):
            for key, value in row.items():
                if key.startswith(_LOGGED) and isinstance(value, int | float):
                    self._writer.add_scalar(f"train/{key}", value, row["step"])
        for row in self._new_rows(run / LOOKS):
            for key, value in row.items():
                if key not in ("step", "images", "objects", "seconds") and value is not None:
                    self._writer.add_scalar(f"look/{key}", value, row["step"])
            picture = run / PICTURES / f"step_{row['step']:06d}.jpg"
            if picture.is_file():
                self._writer.add_image("look", np.asarray(read_rgb(picture)), row["step"], dataformats="HWC")
        self._writer.flush()

    def _new_rows(self, path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        last = self._written.get(path.name, -1)
        rows = [row for row in read_rows(path, growing=True) if row["step"] > last]
        if rows:
            self._written[path.name] = rows[-1]["step"]
        return rows
