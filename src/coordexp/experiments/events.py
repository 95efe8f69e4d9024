"""TensorBoard events of a training run: its log, what its eval callback found, and what the one from outside found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.paths import TRAIN_LOG
from coordexp.errors import ConfigError
from coordexp.infra.logs import read_rows
from coordexp.records.images import read_rgb
from coordexp.training.eval_callback import PICTURES, ROWS

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
        self._written: dict[tuple[str, str], int] = {}  # by name of the file and tag: the last step

    def follow(self, run: Path, evals: str = "eval") -> None:
        """What was added to a folder since the last call: losses, and evaluations with their pictures under `evals`."""
        for row in self._new_rows(run / TRAIN_LOG, evals):
            for key, value in row.items():
                if key.startswith(_LOGGED) and isinstance(value, int | float):
                    self._writer.add_scalar(f"train/{key}", value, row["step"])
        for row in self._new_rows(run / ROWS, evals):
            for key, value in row.items():
                if key not in ("step", "images", "objects", "seconds") and value is not None:
                    self._writer.add_scalar(f"{evals}/{key}", value, row["step"])
            picture = run / PICTURES / f"step_{row['step']:06d}.jpg"
            if picture.is_file():
                self._writer.add_image(evals, np.asarray(read_rgb(picture)), row["step"], dataformats="HWC")
        self._writer.flush()

    def _new_rows(self, path: Path, evals: str) -> list[dict[str, Any]]:
        if not path.is_file():
            return []
        last = self._written.get((path.name, evals), -1)
        rows = [row for row in read_rows(path, growing=True) if row["step"] > last]
        if rows:
            self._written[path.name, evals] = rows[-1]["step"]
        return rows
