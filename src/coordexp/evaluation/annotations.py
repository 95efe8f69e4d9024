"""The annotation file a set of predictions belongs to: which images there are, and LVIS's labels if it has them."""

from __future__ import annotations

import json
from pathlib import Path

from coordexp.errors import DataError
from coordexp.evaluation.lvis import FederatedLabels, federated_from


def read_annotations(path: Path) -> tuple[set[int], FederatedLabels | None]:
    """Image ids of a COCO or LVIS annotation file, and LVIS's labels, None for COCO.

    Raises:
        DataError: the file holds no such annotations, or is LVIS in part only.
    """
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
        image_ids = {int(image["id"]) for image in source["images"]}
        is_lvis = any("neg_category_ids" in image for image in source["images"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: found something else ({error!r}), expected COCO or LVIS annotations.") from error
    return image_ids, federated_from(source, str(path)) if is_lvis else None
