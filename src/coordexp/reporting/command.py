"""`coordexp report`: the page to browse predictions."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_RUNS = ("stage2", "stage1-control")


def report(
    html: Annotated[Path, typer.Option(help="The page to write: one file, to be opened in a browser or sent around.")],
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="One or two gt_vs_pred.jsonl of the same images  [default: stage2 and stage1-control of the profile]",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of images  [default: the profile's]")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Name in configs/  [default: `profile` of params.yaml]")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most images; those with the lowest F1 are kept.")] = 500,
    side: Annotated[int, typer.Option(min=32, help="Longer side of the pictures, in pixels.")] = 256,
) -> None:
    """Browse predictions: a sortable table, boxes, scores, coordinates, filters, two runs side by side.

    Of the profile's own answers it also shows commit, time and machine of each stage, where the run left a record.
    """
    from coordexp.config.loading import load_params
    from coordexp.config.paths import GT_VS_PRED, ProfilePaths
    from coordexp.records.categories import Category, read_categories
    from coordexp.records.gt_vs_pred import read_results
    from coordexp.reporting.page import PageSettings, write_page
    from coordexp.reporting.provenance import run_records

    name = profile or load_params(Path("params.yaml")).profile if not (results and images) else ""
    paths = ProfilePaths(name)
    files = results or [paths.evaluation(run) / GT_VS_PRED for run in DEFAULT_RUNS]
    if (paths.records / "categories.json").is_file() and not results:
        categories = list(read_categories(paths.records / "categories.json"))
    else:
        names = sorted({g.desc for row in chain(*(read_results(file) for file in files)) for g in row.gt})
        categories = [Category(number, desc) for number, desc in enumerate(names, 1)]
    bounds, records = PageSettings(images=limit, side_px=side), [] if results else run_records(paths)
    size = write_page(files, categories, images or paths.raw, html, page=bounds, records=records)
    print(f"{html}: {size / 1e6:.1f} MB")
