"""Is the score a probability, and what would another score be worth: reliability beside the mAP of each ranking."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from coordexp.reporting.style import INK, LOOKS, figure_style, new_figure, save_figure


def write_confidence_figure(
    details: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Write the reliability diagram and the mAP of each score, all checkpoints together, as PNG."""
    with figure_style():
        figure = new_figure(10.4, 4.2)
        reliability, rankings = figure.subplots(1, 2, width_ratios=(4, 5))
        _reliability(reliability, details, metrics)
        _rankings(rankings, details)
        figure.legend(*reliability.get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS) + 1)
        save_figure(figure, path)


def _reliability(ax: Axes, details: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Precision over mean confidence in bins of equal mass; the area of a marker is its share of the predictions."""
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="calibrated")
    for name, tables in details.items():
        bins, look, ece = tables["reliability"], LOOKS[name], metrics[name]["confidence"]["ece"]
        if not bins:  # no prediction, or a score that is no probability
            continue
        x, y, n = (np.array([row[key] for row in bins]) for key in ("confidence", "precision", "n"))
        label = f"{name}: ECE {ece:.3f}"
        ax.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker, markersize=3, label=label)
        ax.scatter(x, y, s=300 * n / n.sum(), color=look.colour, marker=look.marker, alpha=0.7, linewidth=0)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="mean score of the bin", ylabel="share that is right, IoU .50")
    ax.set_title("Reliability of the score in use")


def _rankings(ax: Axes, details: Mapping[str, Mapping[str, Any]]) -> None:
    scores = list(dict.fromkeys(row["score"] for tables in details.values() for row in tables["scores"]))
    scores.sort(key=lambda score: {"constant": 0, "perfect ranking": 2}.get(score, 1))
    for shift, (name, tables) in enumerate(details.items()):
        known = {row["score"]: row["mAP"] for row in tables["scores"] if row["mAP"] is not None}
        places = [(known[score], scores.index(score)) for score in scores if score in known]
        x, y = np.array(places).reshape(-1, 2).T
        look = LOOKS[name]
        offset = 0.14 * (shift - (len(details) - 1) / 2)
        ax.plot(x, y - offset, color=look.colour, marker=look.marker, linestyle="", markersize=5)
    ax.set_yticks(range(len(scores)), scores)
    ax.set(xlabel="mAP under this ranking", ylim=(-0.6, len(scores) - 0.4), xlim=(0, None))
    ax.set_title("The same boxes, ranked by")
