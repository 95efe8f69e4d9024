"""The gallery: ground truth beside prediction, for images that a rule chose and nobody picked."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from coordexp.drawing.boxes import draw_detections, readable_scale
from coordexp.drawing.panels import (
    DUPLICATE_SIGN,
    FALSE,
    FALSE_SIGN,
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
    Cause.DUPLICATE: DUPLICATE_SIGN,
}
SHOWN, BEFORE = "stage2", "stage1"
RULES = ("most duplicates", "most misses", "biggest change", "random")


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of a picture, and what may be tried: largest side of the photo and number of its colours, best first.

    Small photos are enlarged after. With a `palette` labels and boxes share one with the photo: a third of the bytes.
    """

    max_bytes: int
    qualities: tuple[tuple[int, int | None], ...]
    palette: bool


GALLERY = Budget(80_000, ((512, None), (512, 128), (400, 64), (320, 32), (256, 24)), palette=False)
EXAMPLE = Budget(18_500, ((512, 96), (512, 64), (512, 48), (400, 32), (320, 24), (256, 16), (192, 16)), palette=True)


@dataclass(frozen=True, slots=True)
class GalleryPick:
    """One picture of the gallery and the rule that chose it."""

    rule: str
    image_id: int

    @property
    def file_name(self) -> str:
        """By image alone: another rank or rule is no other name."""
        return f"{self.image_id}.png"


def choose_images(per_image: Mapping[str, pd.DataFrame], dup_key: str, count: int, seed: int) -> list[GalleryPick]:
    """Choose images of the stage-2 checkpoint, an equal number by each rule, no image twice.

    Duplicates and misses are ranked by their number, change by the difference in errors (false and missed) between
    stage 1 and stage 2; ties go to the lower image id. What a rule cannot fill goes to the random rule.

    Raises:
        DataError: the per-image tables do not hold the same images, or lack a column.
    """
    shown, before = (_checked(per_image[checkpoint], checkpoint, dup_key) for checkpoint in (SHOWN, BEFORE))
    if not shown.index.equals(before.index):
        raise DataError(f"per_image.json of {SHOWN} and {BEFORE} hold different images; run `dvc repro coco-eval`.")
    scores = {
        "most duplicates": shown[dup_key],
        "most misses": shown["fn_50"],
        "biggest change": (n_errors(shown) - n_errors(before)).abs(),
    }
    chosen: dict[int, str] = {}
    for rule, score in scores.items():
        left = score[(score > 0) & ~score.index.isin(chosen)].sort_values(ascending=False, kind="stable")
        chosen |= dict.fromkeys(left.index[: count // len(RULES)].tolist(), rule)
    # One order of all images, so that runs that err on other images still draw nearly the same ones.
    order = generator(seed, "gallery/images").permutation(shown.index.to_numpy()).tolist()
    drawn = [image_id for image_id in order if image_id not in chosen]
    chosen |= dict.fromkeys(drawn[: max(0, count - len(chosen))], "random")
    return [GalleryPick(rule, image_id) for image_id, rule in chosen.items()]


def n_errors(per_image: pd.DataFrame) -> pd.Series:
    """False and missed boxes of each image."""
    return per_image["fp_50"] + per_image["fn_50"]


def _checked(per_image: pd.DataFrame, checkpoint: str, dup_key: str) -> pd.DataFrame:
    if missing := {"fp_50", "fn_50", dup_key} - set(per_image.columns):
        raise DataError(f"per_image.json of {checkpoint} lacks {sorted(missing)}; run `dvc repro coco-eval`.")
    return per_image


def image_names(picks: Sequence[GalleryPick], outcomes: Mapping[str, Outcomes], image_root: Path) -> list[str]:
    """The image of each pick; raises DataError naming one that is not there."""
    names = [outcomes[SHOWN].of_image(pick.image_id)[0].image for pick in picks]
    for name in names:
        record_sha256(image_root, name)
    return names


def write_gallery(
    picks: Sequence[GalleryPick], outcomes: Mapping[str, Outcomes], image_root: Path, folder: Path
) -> None:
    """Draw every pick into `folder`; raises DataError naming an image file that is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for pick, name in zip(picks, image_names(picks, outcomes, image_root), strict=True):
        shown = (BEFORE, SHOWN) if pick.rule == "biggest change" else (SHOWN,)
        runs = {run: outcomes[run] for run in shown}
        data = _small_picture(read_record_rgb(image_root, name), pick.image_id, runs, GALLERY)
        write_bytes(folder / pick.file_name, data)


def write_example(pick: GalleryPick, outcomes: Mapping[str, Outcomes], image_root: Path, path: Path) -> None:
    """Annotation beside the answer of SHOWN, small enough for git."""
    image = read_record_rgb(image_root, outcomes[SHOWN].of_image(pick.image_id)[0].image)
    write_bytes(path, _small_picture(image, pick.image_id, {SHOWN: outcomes[SHOWN]}, EXAMPLE))


def _small_picture(image: Image.Image, image_id: int, outcomes: dict[str, Outcomes], budget: Budget) -> bytes:
    """PNG within the budget, or its last quality: photos lose colours, then size, until it fits; boxes stay sharp."""
    data = b""
    for panel_px, colours in budget.qualities:
        out = io.BytesIO()
        picture = draw_outcomes(image, image_id, outcomes, panel_px, colours)
        if budget.palette and colours is not None:
            picture = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
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
) -> Image.Image:
    """Panels side by side: ground truth, judged by the last checkpoint given, then each checkpoint's predictions."""
    shrink = min(1.0, panel_px / max(image.size))
    if shrink < 1:
        size = (round(image.width * shrink), round(image.height * shrink))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if colours is not None:
        image = image.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).convert("RGB")
    last = list(outcomes)[-1]
    panels = [("annotated", _truth_panel(image, image_id, outcomes[last], shrink))]
    panels += [(f"predicted, {name}", _prediction_panel(image, image_id, o, shrink)) for name, o in outcomes.items()]
    return side_by_side(panels)


def _truth_panel(image: Image.Image, image_id: int, outcomes: Outcomes, shrink: float) -> Image.Image:
    result, _, rows = outcomes.of_image(image_id)
    styles = [RIGHT if found else MISSED for found in outcomes.found_G[rows].tolist()]
    boxes = outcomes.table.gt_boxes_G4[rows] * shrink
    return draw_detections(image, boxes, [g.desc for g in result.gt], None, styles, readable_scale(*image.size))


def _prediction_panel(image: Image.Image, image_id: int, outcomes: Outcomes, shrink: float) -> Image.Image:
    result, rows, _ = outcomes.of_image(image_id)
    causes = [Cause(cause) for cause in outcomes.cause_P[rows].tolist()]
    labels = [_SIGNS.get(cause, FALSE_SIGN) + p.desc for cause, p in zip(causes, result.pred, strict=True)]
    styles = [RIGHT if cause == Cause.RIGHT else FALSE for cause in causes]
    boxes = outcomes.table.pred_boxes_P4[rows] * shrink
    scores = [p.score for p in result.pred]
    return draw_detections(image, boxes, labels, scores, styles, readable_scale(*image.size))
