"""Whether boxes are in the frame that their format says: pixels inside the picture.

Files hold corners where a width and height belong, thousandths (as Qwen answers), or fractions. Boxes read in the wrong
frame are lost, or clipped to something that is no object; other readings of the same numbers tell which frame it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.records.sources.base import Box

FITS = 0.99  # share of the boxes that another reading must explain
FAR_OUT = 0.2  # share of the boxes that reach out of their pictures; amodal annotation alone stays below
TOLERANCE = 0.02  # share of a side by which a box may reach out of its picture
TOLERANCE_PX = 2.0


@dataclass(slots=True)
class BoxFrames:
    """Counts of boxes, and of how many of them fit each reading. Boxes are as the format reads them, not clipped."""

    boxes: int = 0
    beyond: int = 0  # reach out of their picture
    as_corners: int = 0  # x, y, width, height would be corners inside the picture
    as_thousandths: int = 0
    as_fractions: int = 0
    as_pixels: int = 0  # in a format of fractions

    def add(self, box_xyxy: Box, width: int, height: int, in_unit_frame: bool) -> None:
        """Count a box: pixels, or shares of width and height."""
        x1, y1, x2, y2 = box_xyxy
        self.boxes += 1
        if in_unit_frame:
            self.beyond += x2 > 1 + TOLERANCE or y2 > 1 + TOLERANCE
            self.as_pixels += 1 < x2 <= width + TOLERANCE_PX and 1 < y2 <= height + TOLERANCE_PX
            return
        right, bottom = width + max(TOLERANCE_PX, TOLERANCE * width), height + max(TOLERANCE_PX, TOLERANCE * height)
        self.beyond += x2 > right or y2 > bottom or x1 < width - right or y1 < height - bottom
        w, h = x2 - x1, y2 - y1
        self.as_corners += x1 < w <= right and y1 < h <= bottom
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
