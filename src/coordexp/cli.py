"""The command line: `coordexp predict | evaluate | compare | convert`, useful without DVC.

Results go to stdout, progress and notes to stderr. What a user can mend becomes one message and exit code 2. Heavy
libraries are imported by the commands that need them, so that `coordexp --help` answers at once.
"""

from __future__ import annotations

import glob
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from coordexp import __version__
from coordexp.errors import EXIT_USAGE, CoordExpError, DataError, closest

if TYPE_CHECKING:
    from coordexp.detector import Detections, Detector
    from coordexp.evaluation.categories import Category
    from coordexp.evaluation.evaluator import Evaluation
    from coordexp.records.gt_vs_pred import ImageResult
    from coordexp.records.schema import Record

T = TypeVar("T")

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SHOWN_METRICS = (
    *("coco.mAP", "coco.AP50", "coco.AP75", "f1.precision_50", "f1.recall_50", "f1.full_50", "f1.loc_50"),
    *("parse.parse_rate", "set.dup_pairs_90", "confidence.ece"),
)

# Rich help costs as much time as everything else that --help does.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A vision-language model as an object detector: predict, evaluate, compare, convert.",
)
ExistingFile = typer.Argument(exists=True, dir_okay=False, show_default=False)
CategoriesFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="categories.json of the data set  [default: the annotated names]"),
]


def main(argv: Sequence[str] | None = None) -> None:
    """The console entry: runs one command and exits."""
    try:
        app(args=argv)
    except CoordExpError as error:
        _fail(str(error))
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _fail(f"{error.filename}: {error.strerror}.")


def _fail(message: str) -> None:
    _note(f"error: {message}")
    raise SystemExit(EXIT_USAGE)


def _note(message: str) -> None:
    print(message, file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"coordexp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, folders or globs.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, such as runs/tiny/stage2.")],
    save: Annotated[
        Path | None, typer.Option(help="Draw the boxes: a picture file for one image, otherwise a folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each image.")] = False,
    classes: Annotated[str | None, typer.Option(help='Keep only these names, such as "cat,red mug".')] = None,
    min_pixels: Annotated[
        int | None, typer.Option(min=1, help="Least image area for the model  [default: as trained]")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most image area for the model  [default: as trained]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Token budget of one answer.")] = 512,
) -> None:
    """Detect objects in images."""
    paths = expand_images(images)
    targets = _picture_targets(paths, save) if save else {}
    names = [name.strip() for name in classes.split(",") if name.strip()] if classes else []
    detector = _load_detector(checkpoint, min_pixels, max_pixels, max_new_tokens)
    seen: set[str] = set()
    for path, found in _progress(_detect(detector, paths), len(paths), "predict"):
        seen.update(found.descs)
        shown = found.named(names) if names else found
        print(json.dumps({"image": str(path)} | shown.to_json(), ensure_ascii=False) if as_json else _listing(path, shown))
        if found.parse.truncated:
            _note(f"note: {path}: the answer was cut at {max_new_tokens} tokens; objects may be missing.")
        if path in targets:
            _draw(path, shown, targets[path])
    for name in names:
        if name not in seen:
            _note(f"note: nothing was called {name!r}.{closest(name, seen)}")


def expand_images(arguments: Iterable[str]) -> list[Path]:
    """The image files that the arguments mean, each once: files, the images of a folder, the matches of a glob.

    Raises:
        DataError: an argument means no file.
    """
    paths: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            matches = [path] if path.is_file() else sorted(p for p in map(Path, glob.glob(argument)) if p.is_file())
        if not matches:
            raise DataError(f"{argument}: no image there; expected an image file, a folder of images, or a glob.")
        paths |= dict.fromkeys(matches)
    return list(paths)


def _picture_targets(paths: Sequence[Path], save: Path) -> dict[Path, Path]:
    """Where each drawn picture goes; names that repeat in a folder get a number."""
    if save.suffix.lower() in IMAGE_SUFFIXES and not save.is_dir():
        if len(paths) > 1:
            raise DataError(f"--save {save}: one file for {len(paths)} images; give a folder.")
        save.parent.mkdir(parents=True, exist_ok=True)
        return {paths[0]: save}
    save.mkdir(parents=True, exist_ok=True)
    targets: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        targets[path] = save / f"{name}.png"
    if clash := targets.keys() & targets.values():
        raise DataError(f"--save {save}: would overwrite the image {min(clash)}; give another folder.")
    return targets


def _load_detector(checkpoint: Path, min_pixels: int | None, max_pixels: int | None, max_new_tokens: int) -> Detector:
    from coordexp.config.process import LOG, tune_allocator

    tune_allocator(LOG)  # before the first large allocation
    from coordexp.detector import Detector

    return Detector.from_checkpoint(
        checkpoint, min_pixels=min_pixels, max_pixels=max_pixels, max_new_tokens=max_new_tokens
    )


def _detect(detector: Detector, paths: Sequence[Path]) -> Iterator[tuple[Path, Detections]]:
    for first in range(0, len(paths), detector.batch_images):
        batch = paths[first : first + detector.batch_images]
        yield from zip(batch, detector.predict(batch), strict=True)


def _listing(path: Path, found: Detections) -> str:
    lines = [f"{path}: {found.width} x {found.height} px, {len(found)} objects"]
    for desc, box, score in zip(found.descs, found.boxes_xyxy_px.tolist(), found.scores.tolist(), strict=True):
        lines.append(f"  {score:.2f}  {desc}  [{', '.join(f'{v:.1f}' for v in box)}]")
    return "\n".join(lines)


def _draw(path: Path, found: Detections, target: Path) -> None:
    from coordexp.detector import open_picture
    from coordexp.reporting.drawing import draw_detections

    draw_detections(open_picture(path), found.boxes_xyxy_px, found.descs, found.scores.tolist()).save(target)
