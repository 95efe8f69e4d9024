"""The forest plot of `coordexp compare`: paired differences to one reference, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordexp.evaluation.effect import Effect
from coordexp.reporting.style import INK, figure_style, new_figure, save_figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # told apart by the color blind, too
_MARKERS = ("o", "s", "D", "^", "v", "P")


def write_forest(
    path: Path, sides: Mapping[str, Mapping[str, Effect | None]], reference: str, keys: Sequence[str]
) -> None:
    """Draw the differences side - reference of each metric as PNG, one row per metric, one mark per side."""
    with figure_style():
        _draw(path, sides, reference, keys)


def _draw(path: Path, sides: Mapping[str, Mapping[str, Effect | None]], reference: str, keys: Sequence[str]) -> None:
    shown = [key for key in keys if any(effects.get(key) for effects in sides.values())]
    figure = new_figure(8.0, 1.4 + 0.16 * max(1, len(shown)) * (1 + len(sides)))
    ax = figure.subplots()
    for n, (name, effects) in enumerate(sides.items()):
        offset = (n - (len(sides) - 1) / 2) * 0.7 / max(1, len(sides))
        found = [(row + offset, effect) for row, key in enumerate(shown) if (effect := effects.get(key)) is not None]
        ax.errorbar(
            [effect.delta for _, effect in found], [y for y, _ in found],
            xerr=[[max(0.0, e.delta - e.lo) for _, e in found], [max(0.0, e.hi - e.delta) for _, e in found]],
            color=_COLORS[n % len(_COLORS)], marker=_MARKERS[n % len(_MARKERS)], markersize=4, linestyle="",
            elinewidth=1.4, label=name,
        )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(shown)), shown)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlabel(f"difference to {reference}, 95 % interval (paired over images)")
    figure.legend(loc="outside lower center", ncols=min(3, len(sides)))
    save_figure(figure, path)
