"""Whether boxes are in the frame that their format says: pixels inside the picture.

Files hold corners where a width and height belong, thousandths (as Qwen answers), or fractions. Boxes read in the wrong
frame are lost, or clipped to something that is no object; other readings of the same numbers tell which frame it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordexp.geometry.boxes import Box

FITS = 0.99  # fraction of the boxes that another reading must explain
FAR_OUT = 0.2  # fraction of the boxes that reach out of their pictures; amodal annotation alone stays below
TOLERANCE = 0.02  # fraction of a side by which a box may reach out of its picture
TOLERANCE_PX = 2.0
EXAMPLES = 3


@dataclass(slots=True)
class BoxFrames:
    """Counts of boxes, and of how many of them fit each reading. Boxes are as the format reads them, not clipped."""

    boxes: int = 0
    beyond: int = 0  # reach out of their picture
    as_corners: int = 0  # x, y, width, height would be corners inside the picture
    as_thousandths: int = 0
    as_fractions: int = 0
    as_pixels: int = 0  # in a format of fractions
    examples: list[str] = field(default_factory=list)  # the first of those that reach out

    def add(self, box_xyxy: Box, width: int, height: int, in_unit_frame: bool, shown: Callable[[], str]) -> None:
        """Count a box: pixels, or fractions of width and height. `shown` says in words which one it is."""
        x1, y1, x2, y2 = box_xyxy
        right, bottom = (1.0, 1.0) if in_unit_frame else (width, height)
        slack = 0.0 if in_unit_frame else TOLERANCE_PX
        slack_x, slack_y = max(slack, TOLERANCE * right), max(slack, TOLERANCE * bottom)
        self.boxes += 1
        if x2 > right + slack_x or y2 > bottom + slack_y or x1 < -slack_x or y1 < -slack_y:
            self.beyond += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(shown())
        if in_unit_frame:
            self.as_pixels += 1 < x2 <= width + TOLERANCE_PX and 1 < y2 <= height + TOLERANCE_PX
            return
        w, h = x2 - x1, y2 - y1
        self.as_corners += x1 < w <= right + slack_x and y1 < h <= bottom + slack_y
        self.as_thousandths += x1 >= 0 and y1 >= 0 and x2 <= 1001 and y2 <= 1001
        self.as_fractions += x2 <= 1.5 and y2 <= 1.5  # a center with width and height ends before 1.5

    def cause(self) -> str:
        """What is likely wrong with the boxes, in words; empty if nothing can be told."""
        if reading := self.other_reading():
            return reading
        if self.beyond <= FAR_OUT * self.boxes:
            return ""
        return f"{self.beyond} of {self.boxes} boxes reach out of their pictures: another unit, or sizes of other files"

    def other_reading(self) -> str:
        """Which other reading explains the boxes, in words; empty if none does."""
        enough = FITS * self.boxes
        if not self.boxes:
            return ""
        if self.as_fractions >= enough:
            return "the boxes look like fractions of the picture (0..1); pixels are expected"
        if self.beyond <= FAR_OUT * self.boxes:
            return ""
        if self.as_pixels >= enough:
            return "the boxes look like pixels; fractions of the picture (0..1) are expected"
        if self.as_corners >= enough:
            return "the boxes look like x1, y1, x2, y2; x, y, width, height is expected"
        if self.as_thousandths >= enough:
            return "the boxes look like thousandths of the picture (0..1000); pixels are expected"
        return ""
