"""What the strict parser made of the answers, summed over a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coordexp.records.gt_vs_pred import ImageResult
from coordexp.text.parser import DROP_REASONS


def drop_key(reason: str) -> str:
    """The metric that counts the objects dropped for a reason."""
    return f"dropped_{reason.removeprefix('dropped_')}"


def parse_metrics(results: Sequence[ImageResult]) -> dict[str, float | int]:
    """The `parse` area of the metrics, with `dropped_<reason>` for each reason the parser knows, or the file names."""
    dropped: Counter[str] = Counter(dict.fromkeys(DROP_REASONS, 0))
    for result in results:
        dropped.update(result.parse.dropped)
    n_images = len(results)
    return {
        "parse_rate": sum(r.parse.ok for r in results) / n_images,
        "valid_objects": sum(r.parse.n_valid for r in results),
        "dropped_total": dropped.total(),
        **{drop_key(reason): count for reason, count in sorted(dropped.items())},
        "empty_rate": sum(not r.pred for r in results) / n_images,
    }
