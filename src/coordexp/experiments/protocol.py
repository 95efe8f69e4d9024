"""What an A/B test decides by: one metric, and what is shown beside it."""

from __future__ import annotations

from coordexp.config.ablation import MAIN_METRIC as PRIMARY

__all__ = ["PRIMARY", "RULE", "SECONDARY"]

SECONDARY = ("coco.AP50", "coco.AP75", "f1.full_50", "f1.full_mean")

RULE = (
    f"Fixed before any number was seen: `{PRIMARY}` decides. An arm is **better** or **worse** than the reference when "
    "the interval of its paired difference, over images and training seeds, excludes 0; otherwise there is **no "
    "difference shown**: none that this budget could show. The intervals of {arms} hold together with 95 % confidence "
    "(Bonferroni). The smallest effect that could be shown is the true difference that this budget would have found "
    "with 80 % probability. The other metrics are context and decide nothing."
)
