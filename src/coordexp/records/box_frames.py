"""Check whether boxes are in the frame that their format specifies: pixels inside the image.

Some files contain corners instead of width and height, thousandths (as Qwen answers), or fractions. Boxes read in the
wrong frame are lost, or clipped to something that is not the object. Trying other readings of the same numbers reveals
the actual frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from coordexp.config.formats import BoxForm

if TYPE_CHECKING:
    from coordexp.records.sources.base import SourceObject

FITS = 0.99  # fraction of the boxes that another reading must explain
FAR_OUT = 0.2  # fraction of boxes that extend beyond their images; amodal annotation alone stays below it
TOLERANCE = 0.02  # fraction of a side by which a box may extend beyond its image
TOLERANCE_PX = 2.0
EXAMPLES = 3
SMALL_SIDE_PX = 900  # boxes in thousandths often extend beyond such an image if they are read as pixels
FEW = 10  # so many boxes in thousandths may all be inside their small images by chance
LARGE_SIDE_PX = 1600  # in larger images, thousandths that are read as pixels are all in one corner
UNKNOWN = "another unit, or sizes of other files"
_KEY = "source.sets.<name>.boxes"
_WORDS: dict[BoxForm, str] = {
    "fractions": "fractions of the image (0..1)",
    "thousandths": "thousandths of the image (0..1000)",
    "pixels": "pixels",
    "corners": "x1, y1, x2, y2",
    "from_0": "pixels counted from 0",
}


@dataclass(slots=True)
class BoxFrames:
    """Number of boxes, and how many of them fit each reading. Boxes are as read by the format, not clipped."""

    boxes: int = 0
    beyond: int = 0  # extend beyond their image
    as_corners: int = 0  # x, y, width, height would be corners inside the image
    beyond_as_corners: int = 0  # those of them that extend beyond it
    as_thousandths: int = 0
    far: int = 0  # have a coordinate above 500, as at least a fifth of boxes in thousandths do
    as_fractions: int = 0
    as_percent: int = 0
    as_pixels: int = 0  # in a format of fractions
    in_small: int = 0  # in a format of thousandths, in an image of short sides
    as_pixels_in_small: int = 0  # those of them that are inside it if they are pixels
    in_corner: int = 0  # in a format of pixels: could be thousandths of an image with longer sides
    from_0: int = 0  # start one pixel before the first one, because the file counts from 0 and the format from 1
    in_units: int = 0  # are read as fractions or thousandths
    examples: list[str] = field(default_factory=list)  # the first boxes that extend beyond their image

    def add(self, obj: SourceObject, width: int, height: int, shown: Callable[[], str]) -> None:
        """Count the box of an object; `shown` describes it for messages."""
        if obj.box_xyxy is None:
            return
        x1, y1, x2, y2 = obj.box_xyxy
        units = obj.side_units
        right, bottom = (width, height) if units is None else (units, units)
        slack_x, slack_y = TOLERANCE * right, TOLERANCE * bottom
        if units is None:
            slack_x, slack_y = max(TOLERANCE_PX, slack_x), max(TOLERANCE_PX, slack_y)
        self.boxes += 1
        is_beyond = x2 > right + slack_x or y2 > bottom + slack_y or x1 < -slack_x or y1 < -slack_y
        is_from_0 = obj.counts_from == 1 and -1 in (x1, y1)
        self.beyond += is_beyond
        self.from_0 += is_from_0
        if (is_beyond or is_from_0) and len(self.examples) < EXAMPLES:
            self.examples.append(shown())
        is_inside = x2 <= width + TOLERANCE_PX and y2 <= height + TOLERANCE_PX
        if units is not None:
            self.in_units += 1
            self.as_pixels += x2 > 1 and y2 > 1 and is_inside
            if units == 1000 and max(width, height) <= SMALL_SIDE_PX:
                self.in_small += 1
                self.as_pixels_in_small += is_inside
        else:
            w, h = x2 - x1, y2 - y1
            is_corners = obj.has_size and x1 < w <= right + slack_x and y1 < h <= bottom + slack_y
            self.as_corners += is_corners
            self.beyond_as_corners += is_corners and is_beyond
            is_large = min(width, height) >= LARGE_SIDE_PX
            self.in_corner += is_large and x1 >= 0 and y1 >= 0 and x2 <= 1001 and y2 <= 1001
        self.as_fractions += units != 1 and x2 <= 2 and y2 <= 2  # corners read as width and height end before 2
        is_whole = x1 >= 0 and y1 >= 0 and x2 > 2 and y2 > 2
        self.as_percent += units == 1 and is_whole and x2 <= 101 and y2 <= 101
        self.far += max(x2, y2) > 500
        self.as_thousandths += units != 1000 and is_whole and x2 <= 1001 and y2 <= 1001

    def merge(self, other: BoxFrames) -> None:
        """Add the counts of other boxes of the same split."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        del self.examples[EXAMPLES:]

    @property
    def reach_out(self) -> bool:
        """Whether so many boxes extend beyond their images that they cannot be in pixels of these images."""
        return self.beyond > FAR_OUT * self.boxes

    def cause(self) -> str:
        """The likely fault of the boxes in words; empty if none is found."""
        if reading := self.other_reading():
            return reading
        if not self.reach_out:
            return ""
        return f"{self.beyond} of {self.boxes} boxes extend beyond their images: {UNKNOWN}"

    def other_reading(self) -> str:
        """The other reading that explains the boxes, in words, with the key to set; empty if none does."""
        form = self.other_form()
        if not form:
            return ""
        expected = "pixels"
        if form == "percent":
            return "the boxes look like percent of the image (0..100); fractions (0..1) are expected: divide by 100"
        if form == "mixed":
            return "those look like x1, y1, x2, y2, the others like x, y, width, height: two conventions in one file"
        if self.in_units:
            expected = "fractions of the image (0..1)" if form != "pixels" or not self.in_small else "thousandths"
        if form == "corners":
            expected = "x, y, width, height"
        if form == "from_0":
            expected = "pixels counted from 1"
        verb = "is" if form == "corners" else "are"
        return (
            f"the boxes look like {_WORDS[form]}; {expected} {verb} expected. If they are, set {_KEY} to {form} "  # type: ignore[index]
            f"(coordexp convert: --boxes {form})"
        )

    def other_form(self) -> BoxForm | str:
        """The form of boxes, other than the one used, that explains the numbers; empty if none does."""
        enough = FITS * self.boxes
        if not self.boxes:
            return ""
        if self.as_fractions >= enough:
            return "fractions"
        if self.in_small >= max(FEW, enough) and self.as_pixels_in_small >= FITS * self.in_small:
            return "pixels"
        # Form, number of boxes that it explains, number that it must explain; the first match wins.
        readings: list[tuple[BoxForm | str, int, float]] = []
        if self.reach_out:
            readings += [("pixels", self.as_pixels, enough), ("corners", self.as_corners, enough)]
            readings += [("mixed", self.beyond_as_corners, FITS * self.beyond), ("percent", self.as_percent, enough)]
            if self.far >= FAR_OUT * self.boxes:
                readings += [("thousandths", self.as_thousandths, enough)]
        readings += [("thousandths", self.in_corner, max(FEW, enough)), ("from_0", self.from_0, 1)]
        return next((form for form, explained, needed in readings if explained >= needed), "")
