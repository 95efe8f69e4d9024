"""How `coordexp predict` handles answers: it reuses them from a log, lists them, reports problems, and draws boxes."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coordexp.detections import Detections, open_picture
from coordexp.detector import Detector
from coordexp.drawing.boxes import draw_detections
from coordexp.errors import DataError, PictureError
from coordexp.infra.printable import note, printable
from coordexp.records.descriptions import normalise_desc
from coordexp.records.images import image_sha256
from coordexp.records.prediction_log import PredictionLog

SHOWN_NAMES = 20

Answers = Iterator[tuple[Path, Detections | PictureError]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What to look for: labels or a phrase; if both are empty, the prompt that the checkpoint was trained with."""

    find: tuple[str, ...] = ()
    phrase: str = ""


def answers(
    detector: Detector, paths: Sequence[Path], log: PredictionLog | None, skip: bool = False, asked: Asked | None = None
) -> Answers:
    """The answer to each image, in order: from the log if it is still valid, otherwise a new one, added to the log.

    With `skip`, an image that cannot be read yields its error in place of an answer, also in the log; the next run
    tries it again. Without `skip`, PictureError is raised after the images before it are answered.
    """
    asked = asked or Asked()
    if log is None:
        yield from ((path, found) for path, _, found in _asked(detector, paths, asked, hashed=False, skip=skip))
        return
    source = detector.identity(asked.find, asked.phrase)
    known = [path for path in paths if str(path) in log]
    stale = {path: why for path in known if (why := log.change(str(path), source, _content(path)))}
    kept = {path: replace(_from_log(log, path), picture=path) for path in known if path not in stale}
    _note_reuse(log, len(paths), len(kept), Counter(stale.values()))
    fresh = _asked(detector, [path for path in paths if path not in kept], asked, hashed=True, skip=skip)
    for path in paths:
        if path in kept:
            yield path, kept[path]
        else:
            _, sha256, found = next(fresh)
            log.add(str(path), source, sha256, _answer(found))
            yield path, found
    if others := log.close(source):
        note(f"note: {log.path} also holds {others} answers from another checkpoint or other settings; they are kept.")


def _from_log(log: PredictionLog, path: Path) -> Detections:
    try:
        return Detections.from_json(log.row(str(path)))
    except DataError as error:
        raise DataError(f"{log.path}: the line of {path} is {error} Delete the line.") from error


def _asked(
    detector: Detector, paths: Sequence[Path], asked: Asked, hashed: bool, skip: bool
) -> Iterator[tuple[Path, str, Detections | PictureError]]:
    """New answers; with the sha256 of the file if `hashed`."""
    hashes = deque[str]()

    def taken() -> Iterator[Path]:
        for path in paths:
            # Hash before reading: if the image is replaced in between, the next run predicts it again.
            hashes.append(_content(path) if hashed else "")
            yield path

    with closing(detector.attempt(taken(), find=asked.find, phrase=asked.phrase)) as answers_in_order:
        for path, found in zip(paths, answers_in_order, strict=True):
            if isinstance(found, PictureError) and not skip:
                raise PictureError(f"{found} To skip such images and continue: --on-error skip.") from found
            yield path, hashes.popleft(), found


def _content(path: Path) -> str:
    """sha256 of an image's bytes; empty if it cannot be read: prediction reports that."""
    try:
        return image_sha256(path)
    except PictureError:
        return ""


def _note_reuse(log: PredictionLog, total: int, kept: int, stale: Counter[str]) -> None:
    if kept:
        note(f"note: {kept} of {total} images are in {log.path} already, and their answers are reused.")
    for why, count in sorted(stale.items()):
        note(f"note: {count} of {total} images are in {log.path}, but are predicted again: {why}.")


def json_line(path: Path, found: Detections | PictureError) -> str:
    """One answer as a line of printable JSON; for an image that cannot be read, the reason as `error`."""
    return printable(json.dumps({"image": str(path)} | _answer(found), ensure_ascii=False))


def _answer(found: Detections | PictureError) -> dict[str, Any]:
    return {"error": str(found)} if isinstance(found, PictureError) else found.to_json()


def show_failure(path: Path, error: PictureError, as_json: bool) -> None:
    """Report why an image has no answer; with `as_json`, also on stdout in place of the answer."""
    note(f"skipped: {error}")
    if as_json:
        print(json_line(path, error))


def note_skipped(skipped: Sequence[Path], total: int) -> None:
    """Report at the end which images have no answer."""
    note(f"note: {len(skipped)} of {total} images could not be read: {', '.join(map(str, skipped[:SHOWN_NAMES]))}.")


def listing(path: Path, found: Detections) -> str:
    """One answer as readable text, one line per object."""
    lines = [f"{printable(str(path))}: {found.width} x {found.height} px, {len(found)} objects"]
    for desc, box, score in zip(found.descs, found.boxes_xyxy_px.tolist(), found.scores.tolist(), strict=True):
        lines.append(f"  {score:.2f}  {printable(desc)}  [{', '.join(f'{v:.1f}' for v in box)}]")
    return "\n".join(lines)


def note_answer(path: Path, found: Detections, max_new_tokens: int) -> None:
    """Report which parts of an answer could not be used."""
    if not found.parse.container_found:
        note(f"note: {path}: the answer is not a list of objects; --json shows it.")
    elif found.parse.truncated:
        note(f"note: {path}: the answer was truncated (--max-new-tokens {max_new_tokens}); objects may be missing.")
    if dropped := found.parse.dropped:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))
        note(f"note: {path}: {sum(dropped.values())} invalid objects dropped ({reasons}).")


@dataclass(frozen=True, slots=True)
class View:
    """What to show of the answers: labels (empty: all), minimum score, JSON or text, and where to draw."""

    names: Sequence[str]
    threshold: float
    as_json: bool
    max_new_tokens: int
    targets: Mapping[Path, Path]
    keeps_rows: bool = False  # the caller needs the shown objects afterwards


@dataclass(frozen=True, slots=True)
class Shown:
    """The shown objects as JSON values, and the images that could not be read."""

    rows: list[dict[str, Any]]
    skipped: list[Path]


def show(found_in: Iterable[tuple[Path, Detections | PictureError]], view: View) -> Shown:
    """Print and draw the answers as they arrive; report at the end which labels were not found."""
    shown, seen = Shown([], []), set[str]()
    for path, found in found_in:
        if isinstance(found, PictureError):
            shown.skipped.append(path)
            show_failure(path, found, view.as_json)
            continue
        seen.update(found.descs)
        kept = (found.named(view.names) if view.names else found).above(view.threshold)
        print(json_line(path, kept) if view.as_json else listing(path, kept))
        note_answer(path, found, view.max_new_tokens)
        if path in view.targets:
            draw(path, kept, view.targets[path])
        if view.keeps_rows:
            shown.rows.append({"image": str(path)} | kept.to_json())
    note_absent(view.names, seen)
    return shown


def note_question(detector: Detector, asked: Asked) -> None:
    """Report it if the labels to look for cannot be put into the prompt."""
    if asked.find and not detector.takes_labels:
        note("note: this checkpoint was not trained with label lists: it looks for everything, then filters by label.")


def note_absent(names: Sequence[str], seen: set[str]) -> None:
    """Report which of the wanted labels no object has: a typo, or the objects are not there."""
    called = {normalise_desc(desc) for desc in seen}
    absent = [name for name in names if normalise_desc(name) not in called]
    if absent:
        others = ", ".join(map(printable, sorted(seen)[:SHOWN_NAMES])) or "nothing"
        note(f"note: no object is labeled {', '.join(absent)}; the model found {others}.")


def draw(path: Path, found: Detections, target: Path) -> None:
    """Write the image with its boxes."""
    draw_detections(open_picture(path), found.boxes_xyxy_px, found.descs, found.scores.tolist()).save(target)
