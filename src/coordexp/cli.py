"""`coordexp predict | evaluate | compare | run | runs | ab | report | monitor | convert | doctor | export | serve`.

Results go to stdout, progress and notes to stderr. What a user can mend becomes one message and exit code 2. Heavy
libraries are imported by the commands that need them, so that `coordexp --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

import coordexp
from coordexp.config.formats import Format
from coordexp.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    ConfigError,
    CoordExpError,
    Interrupted,
    TrainingError,
)
from coordexp.experiments.command import Checkpoint, ab, compare_revisions, monitor, run, runs
from coordexp.infra.files import write_text
from coordexp.records.image_files import expand_images, picture_targets
from coordexp.reporting.command import report

if TYPE_CHECKING:
    from coordexp.detector import Detector
    from coordexp.evaluation.evaluator import Evaluation

T = TypeVar("T")

# Rich help costs as much time as everything else that --help does.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A vision-language model as an object detector, and what tells whether a change made it better.",
)
GtVsPred = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="A gt_vs_pred.jsonl, as decoding writes it.")
]
Mapping = Annotated[
    Literal["exact", "normalised", "semantic"], typer.Option(help="From a description to its category.")
]
CategoriesFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="categories.json of the data set  [default: the annotated names]"),
]
ProfileName = Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of --params]")]
ParamsFile = Annotated[Path, typer.Option(help="Parameter file of the repository.")]

app.command()(run)
app.command()(runs)
app.command()(ab)
app.command()(report)
app.command()(monitor)


def main(argv: Sequence[str] | None = None) -> None:
    """The console entry: runs one command and exits."""
    try:
        app(args=argv, prog_name="coordexp")
    except Interrupted as error:
        _note(f"interrupted: {error}")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except TrainingError as error:
        _fail(str(error), EXIT_BUG)
    except CoordExpError as error:
        _fail(str(error))
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _fail(f"{error.filename}: {error.strerror}.")


def _fail(message: str, code: int = EXIT_USAGE) -> None:
    _note(f"error: {message}")
    raise SystemExit(code)


def _note(message: str) -> None:
    print(message, file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"coordexp {coordexp.__version__}")
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
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders or globs.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, such as runs/tiny/stage2.")],
    save: Annotated[
        Path | None, typer.Option(help="Draw the boxes: a picture file for one image, otherwise a folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each image.")] = False,
    classes: Annotated[str | None, typer.Option(help='Keep only these names, such as "cat,red mug".')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Token budget of one answer.")] = 512,
    out: Annotated[
        Path | None,
        typer.Option(help="Log of whole answers, one JSON line an image; those that still hold are not asked again."),
    ] = None,
    coco: Annotated[
        Path | None, typer.Option(help="Write COCO instances JSON with scores; its ids are of this file alone.")
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="URL of a vLLM server of this checkpoint; repeat it for several.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Detect objects in images."""
    from coordexp.infra.provenance import write_json
    from coordexp.records.prediction_log import PredictionLog, coco_predictions

    paths = expand_images(images)
    log = PredictionLog(out, checkpoint) if out else None
    targets = picture_targets(paths, save) if save else {}
    names = [name.strip() for name in classes.split(",") if name.strip()] if classes else []
    detector = _load_detector(checkpoint, servers=server or (), device=device, max_new_tokens=max_new_tokens)
    from coordexp import prediction  # loads torch: only now, after the allocator was tuned

    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for path, found in _progress(prediction.answers(detector, paths, log), len(paths), "predict"):
        seen.update(found.descs)
        shown = found.named(names) if names else found
        print(prediction.json_line(path, shown) if as_json else prediction.listing(path, shown))
        prediction.note_answer(path, found, max_new_tokens)
        if path in targets:
            prediction.draw(path, shown, targets[path])
        if coco:
            rows.append({"image": str(path)} | shown.to_json())
    prediction.note_absent(names, seen)
    if coco:
        write_json(coco, coco_predictions(rows))


def _load_detector(checkpoint: Path, **options: Any) -> Detector:
    from coordexp.infra.threads import set_threads
    from coordexp.stage import LOG, tune_allocator

    tune_allocator(LOG)  # before the first large allocation
    set_threads(0, LOG)
    from coordexp.detector import Detector

    return Detector.from_checkpoint(checkpoint, **options)


@app.command()
def evaluate(
    results: GtVsPred,
    out: Annotated[Path, typer.Option(help="Where to write all metrics, as JSON.")],
    categories: CategoriesFile = None,
    annotations: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="COCO or LVIS JSON to check the images; LVIS adds its AP."),
    ] = None,
    mapping: Mapping = "normalised",
    tables: Annotated[Path | None, typer.Option(help="Folder for tables by class, size, score and image.")] = None,
) -> None:
    """Judge predictions by all metrics.

    AP, F1, parsing, duplicates, calibration, and 95% intervals; a short table is printed, everything goes into --out.
    """
    from coordexp.evaluation.evaluator import rounded
    from coordexp.evaluation.registry import view
    from coordexp.infra.provenance import write_json

    (evaluation,) = _evaluate([results], categories, mapping, annotations)
    write_json(out, rounded(evaluation.metrics))
    if tables:
        from coordexp.evaluation.suite import write_tables

        write_tables(evaluation, tables)
    counts = evaluation.metrics["coco"]
    print(f"{counts['n_images']} images, {counts['n_gt']} objects, {counts['n_pred']} predictions")
    intervals = evaluation.metrics["interval"]
    shown = [key for key in view("printed", evaluation.params) if key.split(".")[0] in evaluation.metrics]
    rows = [[key, _number(evaluation.value(key)), _interval(intervals.get(key))] for key in shown]
    _print_table(rows, ["metric", "value", "95% interval"])
    print(f"all metrics: {out}")


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A gt_vs_pred.jsonl; or an experiment, branch, commit or `workspace`.")],
    b: Annotated[str, typer.Argument(help="The same kind as A.")],
    categories: CategoriesFile = None,
    mapping: Mapping = "normalised",
    images: Annotated[int, typer.Option(min=0, help="Of files: most changed images to list.")] = 10,
    checkpoint: Checkpoint = "stage2",
    out: Annotated[Path | None, typer.Option(help="Of revisions: write the answer here, as Markdown.")] = None,
) -> None:
    """Is one better than the other, or is it noise?

    Two files: the paired difference A - B on the same images, with a 95% bootstrap interval. Two revisions, the older
    first as in `git diff`: what B changed beside A, by their predictions in DVC's cache.
    """
    files = [Path(name) for name in (a, b)]
    if not any(file.is_file() for file in files):
        compare_revisions(a, b, checkpoint, out)
        return
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"{missing[0]}: no such file. Expected two gt_vs_pred.jsonl, or two revisions.")
    _compare_files(files[0], files[1], categories, mapping, images)


def _compare_files(a: Path, b: Path, categories: Path | None, mapping: Mapping, images: int) -> None:
    from coordexp.evaluation.comparison import compare as compare_evaluations
    from coordexp.evaluation.comparison import most_changed_images

    of_a, of_b = _evaluate([a, b], categories, mapping)
    rows = []
    for key, difference in compare_evaluations(of_a, of_b).items():
        row = [key, _number(of_a.value(key)), _number(of_b.value(key))]
        if difference:
            bounds = _interval([difference["lo"], difference["hi"]])
            row += [f"{difference['delta']:+.4f}", bounds, f"{difference['p_superior']:.3f}"]
        rows.append(row)
    print(f"A: {a}\nB: {b}\n{of_a.table.n_images} images")
    _print_table(rows, ["metric", "A", "B", "A - B", "95% interval", "P(A better)"])
    changed = [row for row in most_changed_images(of_a, of_b, images) if row["delta"]]
    if changed:
        print("\nmost changed images (F1 of boxes and names, IoU 0.5)")
        keys = ("f1_full_50_a", "f1_full_50_b")
        shown = [[row["image"], *(_number(row[key]) for key in keys), f"{row['delta']:+.4f}"] for row in changed]
        _print_table(shown, ["image", "A", "B", "A - B"])


def _evaluate(
    files: Sequence[Path], categories: Path | None, mapping: Mapping, annotations: Path | None = None
) -> list[Evaluation]:
    """Evaluate files of one data set; without a list of categories, the names annotated in any of them."""
    from coordexp.evaluation.categories import annotated_categories
    from coordexp.evaluation.evaluator import evaluate as evaluate_results
    from coordexp.evaluation.lvis import read_annotations
    from coordexp.evaluation.parse import faults_of
    from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING, STANDARD_SEED
    from coordexp.evaluation.table import check_known_images
    from coordexp.records.categories import read_categories
    from coordexp.records.gt_vs_pred import read_results

    results = [list(read_results(file)) for file in files]
    known = read_categories(categories) if categories else annotated_categories(chain(*results))
    federated = None
    if annotations:
        image_ids, federated = read_annotations(annotations)
        for rows in results:
            check_known_images(rows, image_ids, str(annotations))
            if len(rows) < len(image_ids):
                _note(f"note: {len(rows)} of the {len(image_ids)} annotated images are evaluated.")
    params = STANDARD.model_copy(update={"mapping": mapping})
    evaluations = [
        evaluate_results(rows, known, params, STANDARD_MATCHING, STANDARD_SEED, federated) for rows in results
    ]
    for file, evaluation in zip(files, evaluations, strict=True):
        if faults := faults_of(evaluation.metrics):
            print(f"{file} is not judged: {', '.join(faults)}.")
    return evaluations


@app.command()
def convert(
    annotations: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The annotation file of the format.")],
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder that the file names start from.")],
    out: Annotated[Path, typer.Option(help="Where to write the records, one JSON object a line.")],
    source: Annotated[Format, typer.Option(help="Format of the annotations (docs/data.md).")] = "coco",
    split: Annotated[Literal["train", "val"], typer.Option(help="For files that hold both.")] = "train",
    crowd: Annotated[Literal["ignore", "drop", "as_objects"], typer.Option(help="As records.crowd.")] = "ignore",
    max_lost: Annotated[float, typer.Option(min=0, max=1, help="As records.max_lost: share that may be lost.")] = 0.05,
) -> None:
    """Turn annotations into records.

    One JSON line an image with boxes in pixels; every image must be there in its annotated size. Dropped boxes are
    counted by reason; the exit code is 2 if they are too many, or if no object is left that counts.
    """
    from coordexp.records.convert import FILE_POLICIES, convert_file
    from coordexp.records.schema import write_records

    config = FILE_POLICIES.model_copy(update={"crowd": crowd, "max_lost": max_lost})
    converted = convert_file(
        source, annotations, images, split, config, lambda found, total: _progress(found, total, "check images")
    )
    write_records(out, converted.splits[split])
    print(f"{out}:", "\n".join(converted.summary()))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="New folder, or with --predictions a JSON file.")],
    checkpoint: Annotated[Literal["stage1", "stage1-control", "stage2"], typer.Option(help="Which one.")] = "stage2",
    profile: ProfileName = None,
    params: ParamsFile = Path("params.yaml"),
    predictions: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Only results: what predict --out wrote.")
    ] = None,
    image_info: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="With --predictions: COCO's image_info JSON.")
    ] = None,
) -> None:
    """Publish a run.

    A Hugging Face folder with a model card and COCO results; or with --predictions and --image-info only the results,
    for a test server that keeps the annotations.
    """
    from coordexp.config.run import RunConfig
    from coordexp.export.publish import publish

    print("\n".join(publish(RunConfig.read(params, profile), checkpoint, out, predictions, image_info)))


@app.command()
def serve(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder, such as runs/tiny/stage2.")],
    profile: ProfileName = None,
    params: ParamsFile = Path("params.yaml"),
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the first server; others take the next.")] = 8000,
    only_print: Annotated[bool, typer.Option("--print", help="Print the commands for a shell, start nothing.")] = False,
) -> None:
    """Serve a checkpoint by vLLM, exactly as the stages do.

    One server for each device, or group of devices, of `rollout.serve` in the profile. Prints the URLs for
    `rollout.servers` and runs until Ctrl-C. VLLM_API_KEY is what requests must bring along; without it, a new key.
    """
    from coordexp.config.run import RunConfig
    from coordexp.rollout.serve import print_commands, run_servers
    from coordexp.stage import LOG

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    LOG.setLevel(logging.INFO)
    act = print_commands if only_print else run_servers
    act(RunConfig.read(params, profile), checkpoint, host, port)


@app.command()
def doctor(
    profile: ProfileName = None,
    params: ParamsFile = Path("params.yaml"),
    header_only: Annotated[bool, typer.Option("--header-only", help="Do not unpack images: sees less.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write every problem here, one JSON object a line.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="First write the pins of the model into the profile.")] = False,
) -> None:
    """Find every fault of a profile's data and model in one pass, and say what a run will need.

    Nothing is written unless --out or --pin is given. The exit code is 2 if the stages would stop.
    """
    from coordexp.config.loading import load_params
    from coordexp.config.run import RunConfig
    from coordexp.doctor.diagnosis import diagnose
    from coordexp.models.pins import write_pins

    if pin:
        file = params.parent / "configs" / f"{profile or load_params(params).profile}.yaml"
        _note(f"pinned {len(write_pins(file))} files of the model in {file}; commit it")
    diagnosis = diagnose(RunConfig.read(params, profile), decode=not header_only)
    print("\n".join(diagnosis.lines))
    if out:
        write_text(out, "".join(f"{line}\n" for line in diagnosis.problem_lines))
    if diagnosis.stops:
        raise typer.Exit(EXIT_USAGE)


def _number(value: float | None) -> str:
    return "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} .. {bounds[1]:.4f}"


def _print_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> None:
    from tabulate import tabulate

    print(tabulate(rows, headers, tablefmt="simple", disable_numparse=True))


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items; meanwhile on stderr a bar if that is a terminal, else a plain line for every tenth of ten or more."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        # rich sends stdout through its own console, here stderr: right only where both are the terminal.
        with Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    for done, item in enumerate(items, 1):
        yield item
        if total >= 10 and done * 10 // total > (done - 1) * 10 // total:
            _note(f"{what}: {done} of {total}")


if __name__ == "__main__":
    main()
