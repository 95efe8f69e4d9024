"""One style for all figures: colors that stay with their checkpoint, readable by color-blind people.

A figure is at most `WIDTH_IN` wide: scaled to a phone, its text is still about 8 px high.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from coordexp.infra.files import replacing
from coordexp.infra.printable import printable_lines

# Okabe and Ito 2008; line style and marker repeat what the color shows.
GREEN, RED, INK, FAINT = "#009E73", "#D62728", "#333333", "#BBBBBB"
WIDTH_IN = 6.8
_DPI = 200  # twice what a screen shows of a figure of this width
COARSE_DPI = 110  # of figures that git keeps by the dozen
_RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "coordexp",
    "text.parse_math": False,  # a name with two dollar signs is still a name
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True, slots=True)
class LineLook:
    """Color, line and marker of one checkpoint or channel, the same in every figure."""

    colour: str
    line: str
    marker: str


LOOKS = {
    "base": LineLook("#7F7F7F", ":", "s"),
    "stage1": LineLook("#0072B2", "-", "o"),
    "stage1-control": LineLook("#CC79A7", "--", "^"),
    "stage2": LineLook("#D55E00", "-", "D"),
}
CHANNEL_LOOKS = {"A": LineLook("#D55E00", "-", "o"), "B": LineLook("#7A2E00", "--", "x")}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in this style, whatever the user's matplotlibrc sets."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)  # type: ignore[arg-type]
        yield


def new_figure(width_in: float, height_in: float, dpi: int = _DPI) -> Figure:
    """A figure that needs no window system."""
    return Figure(figsize=(width_in, height_in), dpi=dpi)


def save_figure(figure: Figure, path: Path, colours: int = 256) -> None:
    """Write a small palette PNG without the version of the program, so that equal input gives equal bytes."""
    for text in figure.findobj(Text):
        text.set_text(printable_lines(text.get_text()))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # once; savefig draws for the layout, then again
    shown = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture = shown.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    if colours < 256:
        picture = _with_lines(shown, picture.getpalette() or [], figure.findobj(Line2D))
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def _with_lines(shown: Image.Image, frequent: Sequence[int], lines: Iterable[Line2D]) -> Image.Image:
    """The picture in the nearest of its frequent colors and those of its lines: of a hidden line, few pixels show."""
    inks = {(*to_rgb(line.get_color()), 1.0 if (alpha := line.get_alpha()) is None else alpha) for line in lines}
    on_white = [[round(255 * (1 + alpha * (part - 1))) for part in ink] for *ink, alpha in sorted(inks)]
    palette = np.array([*np.reshape(frequent, (-1, 3)), *on_white])
    # Each color is looked up once: a table of all 2^24 is faster than sorting the pixels.
    pixels = np.asarray(shown, np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    table = np.zeros(1 << 24, np.uint8)
    table[pixels] = 1
    found = np.flatnonzero(table)
    parts = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1)
    table[found] = np.square(parts[:, None] - palette).sum(axis=2).argmin(axis=1)
    picture = Image.fromarray(table[pixels])
    picture.putpalette(palette.astype(np.uint8).tobytes())
    return picture
