"""`coordexp init | doctor | convert | predict | evaluate | compare | run | runs | ab | answer | verify | report |
browse | monitor | export | serve`.

Results go to stdout, progress and notes to stderr. What a user can mend becomes one message and exit code 2. Heavy
libraries are imported by the commands that need them, so that `coordexp --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

import coordexp
from coordexp.config.formats import BoxForm, Format
from coordexp.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_SKIPPED,
    EXIT_USAGE,
    ConfigError,
    CoordExpError,
    Interrupted,
    TrainingError,
)
from coordexp.experiments.command import ab, answer, monitor, run, runs, verify
from coordexp.experiments.judge import compare, evaluate
from coordexp.infra.files import write_text
from coordexp.infra.printable import note, printable_output
from coordexp.infra.progress import bar
from coordexp.records.image_files import expand_images, picture_targets
from coordexp.reporting.command import browse, report

if TYPE_CHECKING:
    from coordexp.detector import Detector

T = TypeVar("T")

# Rich help costs as much time as everything else that --help does.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A vision-language model as an object detector, and what tells whether a change made it better.",
)
ProfileName = Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of --params]")]
ParamsFile = Annotated[Path, typer.Option(help="Parameter file of the repository.")]

app.command()(evaluate)
app.command()(compare)
app.command()(run)
app.command()(runs)
app.command()(verify)
app.command()(ab)
app.command()(answer)
app.command()(report)
app.command()(browse)
app.command()(monitor)


@printable_output()
def main(argv: Sequence[str] | None = None) -> None:
    """The console entry: runs one command and exits; what it prints is printable, whatever names are in it."""
    try:
        app(args=argv, prog_name="coordexp")
    except Interrupted as error:
        note(f"interrupted: {error}")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except TrainingError as error:
        _fail(str(error), EXIT_BUG)
    except CoordExpError as error:
        _fail(str(error))
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _fail(f"{error.filename}: {error.strerror}.")


def _fail(message: str, code: int = EXIT_USAGE) -> None:
    note(f"error: {message}")
    raise SystemExit(code)


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
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders, globs, or URLs.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, such as runs/tiny/stage2.")],
    save: Annotated[
        Path | None, typer.Option(help="Draw the boxes: a picture file for one image, otherwise a folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line for each image.")] = False,
    find: Annotated[str | None, typer.Option(help='Look for these labels, such as "cat,red mug".')] = None,
    phrase: Annotated[str | None, typer.Option(help='Look for what a phrase means, "the cup left of it".')] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score of an object that is shown.")] = 0.0,
    classes: Annotated[str | None, typer.Option(help="Show only these labels, whatever was asked.")] = None,
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
    processes: Annotated[
        int, typer.Option(min=0, help="Processes that answer, on the GPUs in turn; 0 is one for each GPU.")
    ] = 1,
    fetch: Annotated[Path | None, typer.Option(help="Folder that images named by their URL are fetched into.")] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="At an image that cannot be read: stop, or say why and go on.")
    ] = "stop",
) -> None:
    """Detect objects in images.

    With --on-error skip, the reason takes the place of the answer in --json and --out, and the exit code is 3.
    """
    from coordexp.infra.provenance import write_json
    from coordexp.records.prediction_log import PredictionLog, coco_predictions

    paths = _images(images, fetch)
    log = PredictionLog(out, checkpoint) if out else None
    targets = picture_targets(paths, save) if save else {}
    names, asked_names = _labels(classes), _labels(find)
    detector = _load_detector(
        checkpoint, servers=server or (), device=device, processes=processes, max_new_tokens=max_new_tokens
    )
    from coordexp import prediction  # loads torch: only now, after the allocator was tuned

    asked = prediction.Asked(tuple(asked_names), phrase or "")
    prediction.note_question(detector, asked)
    view = prediction.View(names or asked_names, threshold, as_json, max_new_tokens, targets, keeps_rows=bool(coco))
    answers = prediction.answers(detector, paths, log, on_error == "skip", asked)
    found = prediction.show(_progress(answers, len(paths), "predict"), view)
    if coco:
        write_json(coco, coco_predictions(found.rows))
    if found.skipped:
        prediction.note_skipped(found.skipped, len(paths))
        raise typer.Exit(EXIT_SKIPPED)


def _images(named: Sequence[str], fetch: Path | None) -> list[Path]:
    """Files, folders and globs; the images at URLs in the folder that they are fetched into."""
    from coordexp.records.fetched import fetched_files, is_address

    addresses = [name for name in named if is_address(name)]
    if addresses and not fetch:
        raise ConfigError(f"{addresses[0]}: nothing is taken from the network unless told to: --fetch FOLDER.")
    files = fetched_files(addresses, fetch) if fetch else []
    others = [name for name in named if not is_address(name)]
    return [*files, *(expand_images(others) if others or not files else ())]


def _labels(listed: str | None) -> list[str]:
    """The labels of an option, which commas part."""
    return [name.strip() for name in listed.split(",") if name.strip()] if listed else []


def _load_detector(checkpoint: Path, **options: Any) -> Detector:
    from coordexp.infra.threads import set_threads
    from coordexp.stage import LOG, lasting_imports, tune_allocator

    tune_allocator(LOG)  # before the first large allocation
    set_threads(0, LOG)
    with lasting_imports():
        from coordexp.detector import Detector

    return Detector.from_checkpoint(checkpoint, **options)


@app.command()
def convert(
    annotations: Annotated[Path, typer.Option(help="The annotation file of the format; of some a folder or a glob.")],
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder that the file names start from.")],
    out: Annotated[Path, typer.Option(help="Where to write the records, one JSON object a line; see --to.")],
    source: Annotated[Format, typer.Option(help="Format of the annotations (docs/data.md).")] = "coco",
    split: Annotated[Literal["train", "val"], typer.Option(help="For files that hold both.")] = "train",
    crowd: Annotated[Literal["ignore", "drop", "as_objects"], typer.Option(help="As records.crowd.")] = "ignore",
    max_lost: Annotated[float, typer.Option(min=0, max=1, help="As records.max_lost: share that may be lost.")] = 0.05,
    boxes: Annotated[BoxForm, typer.Option(help="What the numbers of a box are.")] = "format",
    to: Annotated[
        Literal["records", "coco", "yolo"], typer.Option(help="Write records, a COCO file, or a YOLO folder.")
    ] = "records",
) -> None:
    """Turn annotations into records, or into another format.

    One JSON line an image with boxes in pixels; every image must be there in its annotated size. Dropped boxes are
    counted by reason; the exit code is 2 if they are too many, or if no object is left that counts.
    """
    from coordexp.records.convert import FILE_POLICIES, convert_file
    from coordexp.records.schema import write_records
    from coordexp.records.write_back import write_coco, write_yolo

    policies = {"crowd": crowd, "max_lost": max_lost, "polygons": "keep" if to == "coco" else FILE_POLICIES.polygons}
    converted = convert_file(
        *(source, annotations, images, split, FILE_POLICIES.model_copy(update=policies), boxes),
        watch=lambda found, total: _progress(found, total, "check images"),
    )
    records = converted.splits[split]
    if to == "coco":
        write_coco(out, records, converted.named())
    elif to == "yolo":
        if left_out := write_yolo(out, records, converted.named(), images, split):
            note(f"{left_out} ignore regions are left out: YOLO has none")
    else:
        write_records(out, records)
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
    license_id: Annotated[
        str | None, typer.Option("--license", help="Licence for the model card, such as apache-2.0.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload to the Hugging Face Hub as USER/NAME.")] = None,
) -> None:
    """Publish a run.

    A Hugging Face folder with a model card and COCO results; or with --predictions and --image-info only the results,
    for a test server that keeps the annotations.
    """
    from coordexp.config.run import RunConfig
    from coordexp.export.publish import publish

    print(
        "\n".join(publish(RunConfig.read(params, profile), checkpoint, out, predictions, image_info, license_id, push))
    )


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Annotated pictures (docs/data.md).")],
    name: Annotated[str | None, typer.Option(help="Name of the profile  [default: that of the folder]")] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder of the pretrained model, or a profile to extend  [default: the embedded]")
    ] = None,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Make a profile for a folder of annotated pictures.

    Recognizes the format, looks at the pictures, writes configs/NAME.yaml with what differs from a profile that is
    there, takes a few training steps to say how long a run lasts, and names the next command.
    """
    from coordexp.infra.threads import set_threads
    from coordexp.stage import LOG, tune_allocator

    tune_allocator(LOG)  # before the first large allocation
    set_threads(0, LOG)
    from coordexp.doctor.first_profile import init as write_profile

    for line in write_profile(folder, name, base, params):
        print(line, flush=True)


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
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML page here: pictures as the model will see them, and statistics.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="First write the pins of the model into the profile.")] = False,
) -> None:
    """Find every fault of a profile's data and model in one pass, and say what a run will need.

    Nothing is written unless --out, --page or --pin is given. The exit code is 2 if the stages would stop.
    """
    from coordexp.config.loading import load_params
    from coordexp.config.run import RunConfig
    from coordexp.doctor.diagnosis import diagnose
    from coordexp.models.pins import write_pins

    if pin:
        file = params.parent / "configs" / f"{profile or load_params(params).profile}.yaml"
        note(f"pinned {len(write_pins(file))} files of the model in {file}; commit it")
    run_config = RunConfig.read(params, profile)
    diagnosis = diagnose(run_config, decode=not header_only)
    print("\n".join(diagnosis.lines))
    if out:
        write_text(out, "".join(f"{line}\n" for line in diagnosis.problem_lines))
    if page:
        from coordexp.doctor.page import write_page

        write_page(page, run_config, diagnosis.lines, diagnosis.records)
        note(f"pictures and statistics: {page}")
    if diagnosis.stops:
        raise typer.Exit(EXIT_USAGE)


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items; meanwhile on stderr a bar if that is a terminal, else a plain line for every tenth of ten or more."""
    with bar(what, total) as at:
        for done, item in enumerate(items, 1):
            yield item
            at(done)
            if total >= 10 and done * 10 // total > (done - 1) * 10 // total and not sys.stderr.isatty():
                note(f"{what}: {done} of {total}")


if __name__ == "__main__":
    main()
