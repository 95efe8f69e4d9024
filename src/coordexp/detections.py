"""The objects that a detector found in an image: index, filter, draw, and convert them for other tools."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.drawing.boxes import draw_detections
from coordexp.errors import DataError, PictureError
from coordexp.geometry.boxes import Boxes, as_boxes, xyxy_to_xywh
from coordexp.records.descriptions import normalise_desc
from coordexp.records.fetched import is_address
from coordexp.records.gt_vs_pred import ImageResult, ParseReport
from coordexp.records.images import read_rgb, to_rgb

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: label, box in pixels of the input image, score."""

    desc: str
    bbox_xyxy_px: tuple[float, ...]
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """The N objects found in one image, in the order in which the model wrote them.

    Attributes:
        boxes_xyxy_px: (N, 4) float64, in pixels of the input image (after its EXIF orientation is applied).
        descs: N labels, free text.
        scores: (N,) in [0, 1], higher is more confident: the expected IoU of the box, times the geometric mean of the
            probabilities of the label's tokens ("quality" in rollout/confidence.py). A model that writes digits has no
            distribution over bins: its score is the geometric mean of the coordinates' probabilities.
        width: of the image, in pixels.
        height: of the image, in pixels.
        raw_text: the model's complete answer.
        parse: what the strict parser kept and dropped of the answer.
        picture: the input image as it was given; None if the answer was read from a file.

    `found[2]`, `found[:5]` and `found[found.scores > 0.5]` are Detections, too; iteration yields `Detection` objects.
    """

    boxes_xyxy_px: Boxes
    descs: tuple[str, ...]
    scores: NDArray[np.float64]
    width: int
    height: int
    raw_text: str
    parse: ParseReport
    picture: Picture | None = None

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.descs)

    def __getitem__(
        self, which: int | slice | Sequence[int] | NDArray[np.bool_] | NDArray[np.integer[Any]]
    ) -> Detections:
        """Select objects by index, slice, indices or mask; `raw_text` and `parse` stay complete."""
        places = np.arange(len(self))[which]
        keep = np.atleast_1d(places)
        descs = tuple(self.descs[i] for i in keep.tolist())
        return replace(self, boxes_xyxy_px=self.boxes_xyxy_px[keep], descs=descs, scores=self.scores[keep])

    def __iter__(self) -> Iterator[Detection]:
        """The objects one by one."""
        for desc, box, score in zip(self.descs, self.boxes_xyxy_px.tolist(), self.scores.tolist(), strict=True):
            yield Detection(desc, tuple(box), score)

    def above(self, threshold: float) -> Detections:
        """Keep the objects with at least this score."""
        return self[self.scores >= threshold]

    def sorted(self) -> Detections:
        """Sort the objects by score, highest first."""
        return self[np.argsort(-self.scores, kind="stable")]

    def draw(self) -> Image.Image:
        """Draw boxes, labels and scores on the image; raises DataError if the image is not known."""
        if self.picture is None:
            raise DataError("this answer was read from a file and has no image; draw what `predict` returned.")
        return draw_detections(open_picture(self.picture), self.boxes_xyxy_px, self.descs, self.scores.tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image with its boxes; the suffix sets the format."""
        self.draw().save(path)

    def show(self) -> None:
        """Open the image with its boxes in the system's viewer. In a notebook, the cell value shows it."""
        self.draw().show()

    def _repr_png_(self) -> bytes | None:
        """PNG that a notebook displays."""
        if self.picture is None:
            return None
        out = io.BytesIO()
        self.draw().save(out, "PNG")
        return out.getvalue()

    def named(self, names: Iterable[str]) -> Detections:
        """Keep the objects with these labels, ignoring case, '_' and parentheses; the answer text stays complete."""
        wanted = {normalise_desc(name) for name in names}
        return self[np.array([normalise_desc(desc) in wanted for desc in self.descs], dtype=bool)]

    def to_coco(self, image_id: int, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
        """Convert the objects to COCO results; `category_ids` maps label to id.

        Raises:
            DataError: a label has no id.
        """
        ids = {normalise_desc(name): number for name, number in category_ids.items()}
        if unknown := sorted({desc for desc in self.descs if normalise_desc(desc) not in ids}):
            raise DataError(f"category_ids lack {', '.join(unknown[:5])}; add them, or drop these labels: named(...).")
        return [
            {
                "image_id": image_id,
                "category_id": ids[normalise_desc(one.desc)],
                "bbox": xyxy_to_xywh(as_boxes([one.bbox_xyxy_px]))[0].tolist(),
                "score": one.score,
            }
            for one in self
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value: `width`, `height`, `objects` (`desc`, `bbox_xyxy_px`, `score`), `parse`, `raw_text`."""
        rows = zip(self.descs, self.boxes_xyxy_px.tolist(), self.scores.tolist(), strict=True)
        objects = [{"desc": desc, "bbox_xyxy_px": box, "score": score} for desc, box, score in rows]
        size = {"width": self.width, "height": self.height}
        return size | {"objects": objects, "parse": asdict(self.parse), "raw_text": self.raw_text}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Detections:
        """The inverse of `to_json`; other keys are ignored.

        Raises:
            DataError: a key is missing, or its value has another type.
        """
        try:
            objects = row["objects"]
            return cls(
                boxes_xyxy_px=as_boxes([obj["bbox_xyxy_px"] for obj in objects]),
                descs=tuple(str(obj["desc"]) for obj in objects),
                scores=np.array([obj["score"] for obj in objects], dtype=np.float64),
                width=int(row["width"]),
                height=int(row["height"]),
                raw_text=str(row["raw_text"]),
                parse=ParseReport(**row["parse"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no answer as `Detections.to_json` writes it ({error!r}).") from error

    def to_supervision(self, class_names: Sequence[str] | None = None) -> Any:
        """Convert to `supervision.Detections`, with the labels in `data["class_name"]`.

        Args:
            class_names: `class_id` is the index in this list, ignoring case, '_' and parentheses. Pass the same list
                for all images of a metric. None: the index in the sorted labels of this answer.

        Raises:
            ImportError: the package supervision is not installed.
            DataError: the list has a duplicate, or lacks a label of the answer.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs the package supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy_px.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=class_ids(self.descs, class_names),
            data={"class_name": np.array(self.descs, dtype=str)},
        )


def class_ids(descs: Sequence[str], class_names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """(N,) index of each label in `class_names`, as `Detections.to_supervision` explains; raises DataError."""
    names = [normalise_desc(name) for name in (sorted(set(descs)) if class_names is None else class_names)]
    if class_names is None:
        names = list(dict.fromkeys(names))
    elif repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"class_names holds {', '.join(repeated)} more than once; expected each name once.")
    place = {name: number for number, name in enumerate(names)}
    if unknown := sorted({desc for desc in descs if normalise_desc(desc) not in place}):
        raise DataError(
            f"class_names lacks {', '.join(unknown[:5])} ({len(unknown)} of the labels found); expected every label of "
            "the answer. Add them, or drop these objects: found.named(class_names)."
        )
    return np.array([place[normalise_desc(desc)] for desc in descs], dtype=np.int64)


def detections_of(result: ImageResult) -> Detections:
    """The predictions of a parsed and scored answer."""
    if result.parse is None:
        raise DataError(f"image {result.image_id}: has no parsed answer.")
    return Detections(
        boxes_xyxy_px=as_boxes([p.bbox_xyxy_px for p in result.pred]),
        descs=tuple(p.desc for p in result.pred),
        scores=np.array([p.score for p in result.pred], dtype=np.float64),
        width=result.width,
        height=result.height,
        raw_text=result.raw_text,
        parse=result.parse,
    )


def open_picture(image: Picture) -> Image.Image:
    """Open an image of any accepted type as upright RGB, exactly as training does.

    Raises:
        PictureError: the file cannot be read (`records.images.read_rgb`), or the array is not uint8 (H, W, 3).
        DataError: the type is not accepted.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PictureError(f"{describe(image)}: expected an RGB array of shape (H, W, 3) and type uint8.")
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, str | os.PathLike):
        raise DataError(f"{describe(image)}: expected a file name, a PIL image, or an RGB array.")
    if is_address(image):
        raise PictureError(f"{image}: images are downloaded only on request: fetch=True, or --fetch FOLDER.")
    return read_rgb(image)


def describe(image: object) -> str:
    """Describe an input for messages."""
    if isinstance(image, np.ndarray):
        return f"array of shape {image.shape} and type {image.dtype}"
    if isinstance(image, Image.Image):
        return "PIL image"
    return str(image) if isinstance(image, str | os.PathLike) else f"image of type {type(image).__name__}"
