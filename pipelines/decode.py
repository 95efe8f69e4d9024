"""Generate the answers of one checkpoint on val, with the distributions that scores need."""

from __future__ import annotations

from coordexp.config.paths import CHECKPOINTS
from coordexp.config.run import RunConfig
from coordexp.models.pins import pinned_folder
from coordexp.rollout.stages import decode_split, record_rate
from coordexp.stage import LOG, stage_main


def run(context: RunConfig, name: str) -> None:
    """Decode, re-score and parse; the evaluation derives boxes and scores from the result."""
    is_base = name == "base"
    folder = pinned_folder(context.profile.model, context.params.profile) if is_base else context.paths.run(name)
    done = decode_split(context, name, folder, context.paths.decoded(name))
    record_rate(context, f"decode@{name}", done["images"], done["generate_seconds"])
    LOG.info("decode of %s: %d images, %d tokens", name, done["images"], done["tokens"])


if __name__ == "__main__":
    raise SystemExit(stage_main(run, names=CHECKPOINTS))
