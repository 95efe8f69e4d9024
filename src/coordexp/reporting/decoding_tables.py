"""The decoding study as Markdown: constraints, box rules, scores, and several samples per image.

The study is made on demand (`make decoding-study`) and is no part of the graph, so the report includes it only where it
was made with the very weights that the report is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordexp.reporting.markdown import number, table, with_interval

_COLUMNS = {
    "constraints": ("coco.mAP", "f1.full_50", "set.dup_pairs_90", "parse.parse_rate", "tokens_per_second"),
    "boxes": ("coco.mAP", "coco.AP75", "coco.AP90", "f1.full_95", "coco.APs", "coco.APm", "coco.APl"),
    "scores": ("coco.mAP", "coco.AP50", "coco.AP75", "confidence.auroc_tp_fp", "confidence.ece"),
    "best_of_k": ("coco.mAP", "coco.AP50", "f1.full_50", "set.dup_pairs_90"),
}
_TITLES = {
    "constraints": "Constraints at decode time",
    "boxes": "Box rules (`decode.box`)",
    "scores": "Scores (`decode.score`)",
    "best_of_k": "Several samples per image, by voting",
}


_ON_DEMAND = "`make decoding-study` measures what constraints, box rules, scores and several samples are worth"


def decoding_markdown(study: Mapping[str, Mapping[str, Any]], level: int = 1) -> str:
    """The tables of every checkpoint; `study` is what pipelines/decoding_study.py writes as JSON.

    `level` is that of the first heading.
    """
    mark = "#" * level
    parts = [
        f"{mark} Decoding study",
        "On val. Differences are of mAP, paired over images, with 95 % intervals. One choice is changed at a time; the "
        "first row is what the others are compared with.",
    ]
    for checkpoint, tables in study.items():
        parts.append(f"{mark}# {checkpoint}")
        for key, title in _TITLES.items():
            parts += [f"**{title}**", _table(tables[key], _COLUMNS[key])]
        parts.append(_oracle(tables["oracle_k"]))
    return "\n\n".join(parts) + "\n"


def decoding_section(
    study: Mapping[str, Mapping[str, Any]] | None, decodes: Mapping[str, Mapping[str, Any]], level: int
) -> str:
    """The study as a section of the report, or a sentence on why it is not there.

    Args:
        study: the study on file, or None.
        decodes: checkpoint -> its decode.json, whose identity names the weights.
        level: of the section's heading.
    """
    if study is None:
        return f"{_ON_DEMAND}; it has not been run."
    other = [name for name, tables in study.items() if tables["model"] != decodes[name]["identity"]["model"]]
    if other:
        return f"{_ON_DEMAND}; the study on file is of other weights ({', '.join(other)}) and left out."
    return decoding_markdown(study, level).rstrip()


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    header = ["", *(column.rpartition(".")[2] for column in columns), "difference of mAP"]
    return table(header, [[row["name"], *(number(row.get(column)) for column in columns), _gain(row)] for row in rows])


def _gain(row: Mapping[str, Any]) -> str:
    found = row.get("difference", {}).get("coco.mAP")
    return "" if found is None else with_interval(found["delta"], [found["lo"], found["hi"]], sign=True)


def _oracle(found: Mapping[str, Any]) -> str:
    return (
        f"Of {found['n_gt']} objects one sample finds {number(found['recall_one'])}, any of {found['k']} samples "
        f"{number(found['recall_any'])}; of what the first sample misses, the share that another one finds is "
        f"{number(found['recoverable'])}."
    )
