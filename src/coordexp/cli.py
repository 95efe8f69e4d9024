"""`coordexp init | doctor | convert | predict | evaluate | compare | run | runs | ab | answer | verify | report |
browse | monitor | export | serve`.

Results go to stdout; progress and notes go to stderr. An error that the user can fix prints one message and exits with
code 2. Heavy libraries are imported inside the commands that need them, so that `coordexp --help` is fast.
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

# Rich markup would double the time of --help.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train a vision-language model as an object detector, and measure whether a change made it better.",
)
ProfileName = Annotated[
    str | None, typer.Option(help="Profile: configs/NAME.yaml.  [default: the `profile` key of --params]")
]
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
    """Console entry point: run one command and exit. Control characters in foreign names are escaped in its output."""
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
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders, glob patterns, or URLs.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder, such as runs/tiny/stage2.")],
    save: Annotated[
        Path | None, typer.Option(help="Save images with the boxes drawn: a file for one image, a folder for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, one per line.")] = False,
    find: Annotated[str | None, typer.Option(help='Labels to look for, separated by commas: "cat,red mug".')] = None,
    phrase: Annotated[
        str | None, typer.Option(help='Referring expression to look for, such as "the cup left of it".')
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Minimum score of an object to show.")] = 0.0,
    classes: Annotated[str | None, typer.Option(help="Show only objects with these labels; the prompt stays.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 512,
    out: Annotated[
        Path | None,
        typer.Option(help="Log of complete answers, one JSON line per image; answers that are still valid are reused."),
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(help="Write the objects as COCO instances JSON with scores; the ids are valid in this file only."),
    ] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="URL of a vLLM server that serves this checkpoint; repeat for several.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    processes: Annotated[
        int, typer.Option(min=0, help="Number of worker processes, spread over the GPUs; 0: one per GPU.")
    ] = 1,
    fetch: Annotated[Path | None, typer.Option(help="Folder to download images to that are given as URLs.")] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="If an image cannot be read: stop, or report why and continue.")
    ] = "stop",
) -> None:
    """Detect objects in images.

    With --on-error skip, --json and --out hold the reason in place of the answer, and the exit code is 3.
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
    """Expand files, folders and glob patterns; download images given as URLs and return their local paths."""
    from coordexp.records.fetched import fetched_files, is_address

    addresses = [name for name in named if is_address(name)]
    if addresses and not fetch:
        raise ConfigError(f"{addresses[0]}: images are downloaded only on request: add --fetch FOLDER.")
    files = fetched_files(addresses, fetch) if fetch else []
    others = [name for name in named if not is_address(name)]
    return [*files, *(expand_images(others) if others or not files else ())]


def _labels(listed: str | None) -> list[str]:
    """Split a comma-separated option into labels."""
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
    annotations: Annotated[Path, typer.Option(help="Annotation file; some formats take a folder or a glob pattern.")],
    images: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder that image file names are relative to.")
    ],
    out: Annotated[Path, typer.Option(help="Output: records, one JSON object per line, or what --to names.")],
    source: Annotated[Format, typer.Option(help="Format of the annotations (docs/data.md).")] = "coco",
    split: Annotated[
        Literal["train", "val"], typer.Option(help="Split to read from files that hold several.")
    ] = "train",
    crowd: Annotated[
        Literal["ignore", "drop", "as_objects"], typer.Option(help="Crowd regions, as with records.crowd.")
    ] = "ignore",
    max_lost: Annotated[
        float, typer.Option(min=0, max=1, help="Maximum fraction of boxes that may be lost, as with records.max_lost.")
    ] = 0.05,
    boxes: Annotated[BoxForm, typer.Option(help="Units and layout of the box coordinates.")] = "format",
    to: Annotated[
        Literal["records", "coco", "yolo"], typer.Option(help="Output format: records, a COCO file, or a YOLO folder.")
    ] = "records",
) -> None:
    """Convert annotations to records or to another format.

    Records hold one JSON line per image, with boxes in pixels. Every annotated image must exist in its annotated size.
    Dropped boxes are counted by reason. The exit code is 2 if too many boxes are dropped or no valid object is left.
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
            note(f"{left_out} ignore regions are left out: YOLO has no ignore regions")
    else:
        write_records(out, records)
    print(f"{out}:", "\n".join(converted.summary()))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder to create; with --predictions, a JSON file.")],
    checkpoint: Annotated[
        Literal["stage1", "stage1-control", "stage2"], typer.Option(help="Checkpoint to publish.")
    ] = "stage2",
    profile: ProfileName = None,
    params: ParamsFile = Path("params.yaml"),
    predictions: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Write only COCO results, from a log of predict --out."),
    ] = None,
    image_info: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="With --predictions: the image_info JSON of COCO.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="License for the model card, such as apache-2.0.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload the folder to the Hugging Face Hub as USER/NAME.")] = None,
) -> None:
    """Publish a trained checkpoint as a Hugging Face folder.

    The folder holds the checkpoint, a model card, and COCO results. With --predictions and --image-info, write only the
    COCO results, for an evaluation server whose annotations are not public.
    """
    from coordexp.config.run import RunConfig
    from coordexp.export.publish import publish

    print(
        "\n".join(publish(RunConfig.read(params, profile), checkpoint, out, predictions, image_info, license_id, push))
    )


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Annotated images (docs/data.md).")],
    name: Annotated[str | None, typer.Option(help="Name of the profile.  [default: the name of the folder]")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder of the pretrained model, or a profile to extend.  [default: the embedded model]"),
    ] = None,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Make a profile for a folder of annotated images.

    Recognizes the annotation format, inspects the images, and writes configs/NAME.yaml, which extends an existing
    profile. Then takes a few training steps to estimate how long a run lasts, and prints the next command.
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
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Checkpoint folder, such as runs/tiny/stage2.")
    ],
    profile: ProfileName = None,
    params: ParamsFile = Path("params.yaml"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the first server; more servers take the next ports.")
    ] = 8000,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the shell commands instead of running them.")
    ] = False,
) -> None:
    """Serve a checkpoint with vLLM, exactly as the stages do.

    Starts one server per device, or group of devices, of `rollout.serve` in the profile. Prints the URLs to set as
    `rollout.servers`, and runs until Ctrl-C. Requests must send the API key in VLLM_API_KEY; if it is not set, a new
    key is generated.
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
    header_only: Annotated[
        bool, typer.Option("--header-only", help="Do not decode images: faster, but finds fewer faults.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write every problem to this file, one JSON object per line.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML page with statistics and with images as the model sees them.")
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="First pin the model files in the profile, by their hashes.")
    ] = False,
) -> None:
    """Check a profile's data and model in one pass, and estimate what a run needs.

    Writes files only with --out, --page or --pin. The exit code is 2 if a stage would stop with an error.
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
        note(f"images and statistics: {page}")
    if diagnosis.stops:
        raise typer.Exit(EXIT_USAGE)


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items and show progress on stderr: a bar on a terminal, otherwise a line after every tenth of them."""
    with bar(what, total) as at:
        for done, item in enumerate(items, 1):
            yield item
            at(done)
            if total >= 10 and done * 10 // total > (done - 1) * 10 // total and not sys.stderr.isatty():
                note(f"{what}: {done} of {total}")


if __name__ == "__main__":
    main()
