"""The gallery: annotations next to predictions, for images selected by rule, not by hand."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from coordexp.drawing.boxes import draw_detections, readable_scale
from coordexp.drawing.panels import (
    BOTH_SIGN,
    CAUSES,
    DUPLICATE_SIGN,
    FALSE,
    FALSE_SIGN,
    FONT_PX,
    MISSED,
    RIGHT,
    RIGHT_SIGN,
    SHIFTED_SIGN,
    WRONG_NAME_SIGN,
    side_by_side,
)
from coordexp.errors import DataError
from coordexp.evaluation.error_causes import Cause
from coordexp.infra.files import write_bytes
from coordexp.infra.random_streams import generator
from coordexp.records.images import read_record_rgb, record_sha256
from coordexp.reporting.outcomes import Outcomes

_SIGNS = {
    Cause.RIGHT: RIGHT_SIGN,
    Cause.CLASSIFICATION: WRONG_NAME_SIGN,
    Cause.LOCALIZATION: SHIFTED_SIGN,
    Cause.BOTH: BOTH_SIGN,
    Cause.DUPLICATE: DUPLICATE_SIGN,
}
SHOWN, BEFORE = "stage2", "stage1"
CHANGE = "biggest change"
RULES = ("most duplicates", "most misses", CHANGE, "random")


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of a file, and what may be tried: longer side of the image and number of its colors, best first.

    Small images are enlarged after that.
    """

    max_bytes: int
    qualities: tuple[tuple[int, int | None], ...]


# Fewer colors than these can hide a small object in its background: rather the image gets smaller.
GALLERY = Budget(100_000, ((512, None), (512, 160), (448, 128), (384, 128), (320, 96), (256, 96)))
EXAMPLE = Budget(40_000, ((512, None), (512, 160), (448, 128), (384, 96), (320, 96), (256, 96), (192, 96)))


@dataclass(frozen=True, slots=True)
class GalleryPick:
    """One image of the gallery and the rule that selected it."""

    rule: str
    image_id: int

    @property
    def file_name(self) -> str:
        """By image alone: another rank or rule does not change the name."""
        return f"{self.image_id}.png"


def choose_images(per_image: Mapping[str, pd.DataFrame], dup_key: str, count: int, seed: int) -> list[GalleryPick]:
    """Select images of the stage-2 checkpoint, the same number by each rule, no image twice.

    Duplicates and misses are ranked by their number. Change is ranked by the difference in errors (false positives and
    false negatives) between stage 1 and stage 2. Ties go to the lower image id; the random rule fills the rest.

    Raises:
        DataError: the per-image tables do not hold the same images, or lack a column.
    """
    shown, before = (_checked(per_image[checkpoint], checkpoint, dup_key) for checkpoint in (SHOWN, BEFORE))
    if not shown.index.equals(before.index):
        raise DataError(f"per_image.json of {SHOWN} and {BEFORE} contain different images; run `dvc repro coco-eval`.")
    scores = {
        "most duplicates": shown[dup_key],
        "most misses": shown["fn_50"],
        CHANGE: (n_errors(shown) - n_errors(before)).abs(),
    }
    chosen: dict[int, str] = {}
    for rule, score in scores.items():
        left = score[(score > 0) & ~score.index.isin(chosen)].sort_values(ascending=False, kind="stable")
        chosen |= dict.fromkeys(left.index[: count // len(RULES)].tolist(), rule)
    drawn = [image_id for image_id in image_ranks(shown.index, seed) if image_id not in chosen]
    chosen |= dict.fromkeys(drawn[: max(0, count - len(chosen))], "random")
    return [GalleryPick(rule, image_id) for image_id, rule in chosen.items()]


def image_ranks(image_ids: Iterable[int], seed: int) -> dict[int, int]:
    """Image id -> its place in an order that the seed shuffles; the ids come in that order.

    One order of all images, so that runs that err on different images still show nearly the same ones.
    """
    order = generator(seed, "gallery/images").permutation(np.array([*image_ids])).tolist()
    return {image_id: place for place, image_id in enumerate(order)}


def n_errors(per_image: pd.DataFrame) -> pd.Series:
    """False positives and false negatives of each image."""
    return per_image["fp_50"] + per_image["fn_50"]


def _checked(per_image: pd.DataFrame, checkpoint: str, dup_key: str) -> pd.DataFrame:
    if missing := {"fp_50", "fn_50", dup_key} - set(per_image.columns):
        raise DataError(f"per_image.json of {checkpoint} lacks {sorted(missing)}; run `dvc repro coco-eval`.")
    return per_image


def image_names(picks: Sequence[GalleryPick], outcomes: Mapping[str, Outcomes], image_root: Path) -> list[str]:
    """The image of each pick; raises DataError naming an image that does not exist."""
    names = [outcomes[SHOWN].of_image(pick.image_id)[0].image for pick in picks]
    for name in names:
        record_sha256(image_root, name)
    return names


def write_gallery(
    picks: Sequence[GalleryPick], outcomes: Mapping[str, Outcomes], image_root: Path, folder: Path
) -> None:
    """Draw every pick into `folder`; raises DataError naming an image file that does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for pick, name in zip(picks, image_names(picks, outcomes, image_root), strict=True):
        shown = (BEFORE, SHOWN) if pick.rule == CHANGE else (SHOWN,)
        runs = {run: outcomes[run] for run in shown}
        data = _small_picture(read_record_rgb(image_root, name), pick.image_id, runs, GALLERY)
        write_bytes(folder / pick.file_name, data)


def write_example(pick: GalleryPick, outcomes: Mapping[str, Outcomes], image_root: Path, path: Path) -> None:
    """Annotations next to the answer of SHOWN; for a change, the answer of BEFORE next to it. Small enough for git."""
    image = read_record_rgb(image_root, outcomes[SHOWN].of_image(pick.image_id)[0].image)
    is_change = pick.rule == CHANGE
    shown = (BEFORE, SHOWN) if is_change else (SHOWN,)
    runs = {run: outcomes[run] for run in shown}
    write_bytes(path, _small_picture(image, pick.image_id, runs, EXAMPLE, annotated=not is_change))


def _small_picture(
    image: Image.Image, image_id: int, outcomes: dict[str, Outcomes], budget: Budget, annotated: bool = True
) -> bytes:
    """PNG within the budget, or of its last quality: the image loses colors, then size; boxes stay sharp."""
    data = b""
    for panel_px, colours in budget.qualities:
        out = io.BytesIO()
        picture = with_palette(draw_outcomes(image, image_id, outcomes, panel_px, colours, annotated))
        picture.save(out, "PNG", optimize=True)
        data = out.getvalue()
        if len(data) <= budget.max_bytes:
            break
    return data


def draw_outcomes(
    image: Image.Image,
    image_id: int,
    outcomes: Mapping[str, Outcomes],
    panel_px: int = 512,
    colours: int | None = None,
    annotated: bool = True,
) -> Image.Image:
    """Panels: annotations, found or missed by the last checkpoint given, then the predictions of each checkpoint."""
    shrink = min(1.0, panel_px / max(image.size))
    if shrink < 1:
        size = (round(image.width * shrink), round(image.height * shrink))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if colours is not None:
        image = reduced(image, colours).convert("RGB")
    last = list(outcomes)[-1]
    panels = [("annotated", _truth_panel(image, image_id, outcomes[last], shrink))] if annotated else []
    panels += [(f"predicted, {name}", _prediction_panel(image, image_id, o, shrink)) for name, o in outcomes.items()]
    return side_by_side(panels, CAUSES)


def reduced(image: Image.Image, colours: int) -> Image.Image:
    """A palette image by median cut, which keeps colors of small objects that an octree merges with the background."""
    return image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def with_palette(picture: Image.Image) -> Image.Image:
    """A palette image of panels, in which boxes and labels keep their colors however few pixels have them."""
    inks = ((RIGHT.colour, 255), (FALSE.colour, 255), (MISSED.colour, 0), ((255, 255, 255), 0))
    steps = [[round(c + (ink - c) * step / 4) for c in colour] for colour, ink in inks for step in range(5)]
    kept = [channel for colour in steps for channel in colour]
    holder = Image.new("P", (1, 1))
    holder.putpalette((reduced(picture, 256 - len(steps)).getpalette() or [])[: 3 * (256 - len(steps))] + kept)
    return picture.quantize(palette=holder, dither=Image.Dither.NONE)


def _truth_panel(image: Image.Image, image_id: int, outcomes: Outcomes, shrink: float) -> Image.Image:
    result, _, rows = outcomes.of_image(image_id)
    styles = [RIGHT if found else MISSED for found in outcomes.found_G[rows].tolist()]
    boxes = outcomes.table.gt_boxes_G4[rows] * shrink
    return draw_detections(
        image, boxes, [g.desc for g in result.gt], None, styles, readable_scale(*image.size), FONT_PX
    )


def _prediction_panel(image: Image.Image, image_id: int, outcomes: Outcomes, shrink: float) -> Image.Image:
    result, rows, _ = outcomes.of_image(image_id)
    causes = [Cause(cause) for cause in outcomes.cause_P[rows].tolist()]
    labels = [_SIGNS.get(cause, FALSE_SIGN) + p.desc for cause, p in zip(causes, result.pred, strict=True)]
    styles = [RIGHT if cause == Cause.RIGHT else FALSE for cause in causes]
    boxes = outcomes.table.pred_boxes_P4[rows] * shrink
    scores = [p.score for p in result.pred]
    return draw_detections(image, boxes, labels, scores, styles, readable_scale(*image.size), FONT_PX)
