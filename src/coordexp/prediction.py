"""What `coordexp predict` does with answers: the log that saves asking again, listings, notes and drawings."""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordexp.detector import Detections, Detector, open_picture
from coordexp.errors import DataError
from coordexp.records.descriptions import normalise_desc
from coordexp.records.images import image_sha256
from coordexp.records.prediction_log import PredictionLog

SHOWN_NAMES = 20


def answers(detector: Detector, paths: Sequence[Path], log: PredictionLog | None) -> Iterator[tuple[Path, Detections]]:
    """Each picture's answer, in order: from the log if it still holds, otherwise a new one, which is added to it."""
    if log is None:
        yield from ((path, found) for path, _, found in _asked(detector, paths, hashed=False))
        return
    source = detector.identity()
    known = [path for path in paths if str(path) in log]
    stale = {path: why for path in known if (why := log.change(str(path), source, image_sha256(path)))}
    kept = {path: _from_log(log, path) for path in known if path not in stale}
    _note_reuse(log, len(paths), len(kept), Counter(stale.values()))
    fresh = _asked(detector, [path for path in paths if path not in kept], hashed=True)
    for path in paths:
        if path in kept:
            yield path, kept[path]
        else:
            _, sha256, found = next(fresh)
            log.add(str(path), source, sha256, found.to_json())
            yield path, found
    if others := log.close(source):
        _note(f"note: {log.path} also holds {others} answers of another checkpoint or other settings, not asked now.")


def _from_log(log: PredictionLog, path: Path) -> Detections:
    try:
        return Detections.from_json(log.row(str(path)))
    except DataError as error:
        raise DataError(f"{log.path}: the line of {path} is {error} Delete the line.") from error


def _asked(detector: Detector, paths: Sequence[Path], hashed: bool) -> Iterator[tuple[Path, str, Detections]]:
    """New answers; with the sha256 of the file if `hashed`."""
    hashes = deque[str]()

    def taken() -> Iterator[Path]:
        for path in paths:
            # Before it is read: of a picture that is replaced meanwhile, the answer is asked again next time.
            hashes.append(image_sha256(path) if hashed else "")
            yield path

    for path, found in zip(paths, detector.stream(taken()), strict=True):
        yield path, hashes.popleft(), found


def _note_reuse(log: PredictionLog, total: int, kept: int, stale: Counter[str]) -> None:
    if kept:
        _note(f"note: {kept} of {total} images are in {log.path} already, and their answers hold.")
    for why, count in sorted(stale.items()):
        _note(f"note: {count} of {total} images are in {log.path}, but are asked again: {why}.")


def _note(message: str) -> None:
    print(message, file=sys.stderr)


def json_line(path: Path, found: Detections) -> str:
    """One answer as a line of JSON."""
    return json.dumps({"image": str(path)} | found.to_json(), ensure_ascii=False)


def listing(path: Path, found: Detections) -> str:
    """One answer for people to read: a line of its own for each object."""
    lines = [f"{path}: {found.width} x {found.height} px, {len(found)} objects"]
    for desc, box, score in zip(found.descs, found.boxes_xyxy_px.tolist(), found.scores.tolist(), strict=True):
        lines.append(f"  {score:.2f}  {desc}  [{', '.join(f'{v:.1f}' for v in box)}]")
    return "\n".join(lines)


def note_answer(path: Path, found: Detections, max_new_tokens: int) -> None:
    """Say what of an answer could not be used."""
    if not found.parse.container_found:
        _note(f"note: {path}: the answer is no list of objects; --json shows it.")
    elif found.parse.truncated:
        _note(f"note: {path}: the answer was cut (--max-new-tokens {max_new_tokens}), objects may be missing.")
    if dropped := found.parse.dropped:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))
        _note(f"note: {path}: {sum(dropped.values())} invalid objects dropped ({reasons}).")


def note_absent(names: Sequence[str], seen: set[str]) -> None:
    """Say which of the wanted names no object had: a typing error, or truly nothing."""
    called = {normalise_desc(desc) for desc in seen}
    absent = [name for name in names if normalise_desc(name) not in called]
    if absent:
        others = ", ".join(sorted(seen)[:SHOWN_NAMES]) or "nothing"
        _note(f"note: nothing was called {', '.join(absent)}; the model found {others}.")


def draw(path: Path, found: Detections, target: Path) -> None:
    """Write the picture with its boxes."""
    from coordexp.drawing.boxes import draw_detections  # loads matplotlib, which most calls do not need

    draw_detections(open_picture(path), found.boxes_xyxy_px, found.descs, found.scores.tolist()).save(target)
