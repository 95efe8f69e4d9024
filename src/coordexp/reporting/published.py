"""A run beside published numbers, each under its protocol; for data that published numbers are about."""

from __future__ import annotations

from typing import Any

from coordexp.evaluation.published import published_tables
from coordexp.reporting.inputs import Metrics, metric
from coordexp.reporting.markdown import escape, number, table

# Published column -> our metric, by the protocol under which the two may stand in one table.
_OURS = {
    "P1": {f"f1_{level}": f"protocol.positive_full_{level}" for level in ("50", "95", "mean")},
    "P2": {name: f"coco.{name}" for name in ("mAP", "AP50", "AP75")},
    "training matching": {
        **{"mAP": "coco.mAP", "n_pred": "coco.n_pred"},
        **{name: f"rollout.{name}" for name in ("f1", "precision", "recall")},
    },
}


def published_markdown(metrics: Metrics) -> str:
    """Every published table with its protocols in words, and stage 2 as its last rows, one for each protocol."""
    return "\n\n".join(_table(metrics, published) for published in published_tables().values())


def _table(metrics: Metrics, published: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(key for row in published["rows"] for key in row))
    protocols = published.get("protocols") or {"training matching": "; ".join(map(str, published["protocol"].values()))}
    rows = [[escape(number(row[key])) if key in row else "" for key in columns] for row in published["rows"]]
    for name in protocols:
        ours = {columns[0]: "**this run, stage2**", "protocol": name, "mark": "measured"}
        ours |= {column: number(metric(metrics, "stage2", key)) for column, key in _OURS[name].items()}
        rows.append([ours.get(key, "") for key in columns])
    title = f"**{escape(published['title'])}** ({escape(published['source'])})"
    notes = "\n".join(f"- {name}: {escape(words)}" for name, words in protocols.items())
    return f"{title}\n\n{table(columns, rows)}\n\n{notes}"
