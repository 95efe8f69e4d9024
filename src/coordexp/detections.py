"""What a detector found in a picture: objects to index, filter, draw and hand to other tools."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.errors import DataError, PictureError
from coordexp.geometry.boxes import Boxes, as_boxes, xyxy_to_xywh
from coordexp.records.descriptions import normalise_desc
from coordexp.records.fetched import is_address
from coordexp.records.gt_vs_pred import ImageResult, ParseReport
from coordexp.records.images import read_rgb, to_rgb

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: label, box in pixels of the picture as given, score."""

    desc: str
    bbox_xyxy_px: tuple[float, ...]
    score: float


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What was found in one picture, N objects in the order in which the model named them.

    Attributes:
        boxes_xyxy_px: (N, 4) float64, pixels of the picture as given (turned upright if its EXIF data say so).
        descs: N names, free text.
        scores: (N,) in [0, 1], higher is surer: the IoU that the model expects of the box, times the geometric mean of
            the probabilities of its name's tokens ("quality" in rollout/confidence.py). A model that writes digits has
            no distribution over bins: there, the geometric mean of the coordinates' probabilities.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        raw_text: the model's whole answer.
        parse: what the strict parser kept and dropped of it.
        picture: what was asked about, as it was given; None where the answer comes from a file.

    `found[2]`, `found[:5]` and `found[found.scores > 0.5]` are Detections, too; iterating gives one `Detection` each.
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
        """Some of the objects, by place, places or mask; the answer stays whole."""
        places = np.arange(len(self))[which]
        keep = np.atleast_1d(places)
        descs = tuple(self.descs[i] for i in keep.tolist())
        return replace(self, boxes_xyxy_px=self.boxes_xyxy_px[keep], descs=descs, scores=self.scores[keep])

    def __iter__(self) -> Iterator[Detection]:
        """The objects one by one."""
        for desc, box, score in zip(self.descs, self.boxes_xyxy_px.tolist(), self.scores.tolist(), strict=True):
            yield Detection(desc, tuple(box), score)

    def above(self, threshold: float) -> Detections:
        """Only the objects of at least this score."""
        return self[self.scores >= threshold]

    def sorted(self) -> Detections:
        """The same objects, the surest first."""
        return self[np.argsort(-self.scores, kind="stable")]

    def draw(self) -> Image.Image:
        """The picture with its boxes, labels and scores; raises DataError where the picture is not known."""
        from coordexp.drawing.boxes import draw_detections  # loads matplotlib

        if self.picture is None:
            raise DataError("this answer does not know its picture; draw the one that `predict` gave.")
        return draw_detections(open_picture(self.picture), self.boxes_xyxy_px, self.descs, self.scores.tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture with its boxes; the suffix says the format."""
        self.draw().save(path)

    def show(self) -> None:
        """Open the picture with its boxes in the system's viewer; a notebook shows it as the value of a cell."""
        self.draw().show()

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        if self.picture is None:
            return None
        out = io.BytesIO()
        self.draw().save(out, "PNG")
        return out.getvalue()

    def named(self, names: Iterable[str]) -> Detections:
        """Only the objects of these names; case, '_' and parentheses do not count. The answer stays whole."""
        wanted = {normalise_desc(name) for name in names}
        return self[np.array([normalise_desc(desc) in wanted for desc in self.descs], dtype=bool)]

    def to_coco(self, image_id: int, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
        """The objects as COCO results; `category_ids` are by label.

        Raises:
            DataError: a label of the answer has no id.
        """
        ids = {normalise_desc(name): number for name, number in category_ids.items()}
        if unknown := sorted({desc for desc in self.descs if normalise_desc(desc) not in ids}):
            raise DataError(f"category_ids lack {', '.join(unknown[:5])}; give them, or keep only others: named(...).")
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
        """The inverse of `to_json`; keys of other kinds do not matter.

        Raises:
            DataError: something of it is missing or of another type.
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
        """The same objects as `supervision.Detections`, with the names in `data["class_name"]`.

        Args:
            class_names: `class_id` is the place in this list; case, '_' and parentheses do not count. Give the same
                list for all pictures of a metric. None: the place among the names of this answer, sorted.

        Raises:
            ImportError: that package is not installed.
            DataError: the list holds a name twice, or lacks one of the answer.
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
    """(N,) place of each name in `class_names`, which `Detections.to_supervision` explains; raises DataError."""
    names = [normalise_desc(name) for name in (sorted(set(descs)) if class_names is None else class_names)]
    if class_names is None:
        names = list(dict.fromkeys(names))
    elif repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"class_names holds {', '.join(repeated)} more than once; expected each name once.")
    place = {name: number for number, name in enumerate(names)}
    if unknown := sorted({desc for desc in descs if normalise_desc(desc) not in place}):
        raise DataError(
            f"class_names lacks {', '.join(unknown[:5])} ({len(unknown)} of the names found); expected every name of "
            "the answer. Add them, or keep only the others: found.named(class_names)."
        )
    return np.array([place[normalise_desc(desc)] for desc in descs], dtype=np.int64)


def detections_of(result: ImageResult) -> Detections:
    """The predictions of an answer that was parsed and scored."""
    if result.parse is None:
        raise DataError(f"image {result.image_id}: holds no parsed answer.")
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
    """A picture of any accepted kind as an upright RGB image: what training makes of the same file.

    Raises:
        PictureError: the file cannot be read (`records.images.read_rgb`), or the array is not (H, W, 3) of uint8.
        DataError: it is none of these kinds.
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
        raise PictureError(f"{image}: nothing is taken from the network unless told to: fetch=True, or --fetch FOLDER.")
    return read_rgb(image)


def describe(image: object) -> str:
    """What was given, for messages."""
    if isinstance(image, np.ndarray):
        return f"array of shape {image.shape} and type {image.dtype}"
    if isinstance(image, Image.Image):
        return "PIL image"
    return str(image) if isinstance(image, str | os.PathLike) else f"picture of type {type(image).__name__}"
