"""Try a profile at negligible cost (`make check-profile PROFILE=...`); not part of the graph.

It runs the data stages on 16 images of each set and one training step of a shrunken model of the same family with the
real tokenizer, then prints the plan of the whole run. It works in a temporary folder, which it removes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from coordexp.config.paths import RUN_METADATA, ProfilePaths, model_folder
from coordexp.config.profile import DatasetsConfig, Profile
from coordexp.config.run import RunConfig
from coordexp.doctor.diagnosis import diagnose
from coordexp.errors import DataError
from coordexp.infra.provenance import read_run_record
from coordexp.models.pins import pins_of
from coordexp.models.sizes import write_shrunken
from coordexp.records.convert import write_sample
from coordexp.stage import LOG, stage_main
from pipelines import convert, norm1000, pack, raw, stage1

IMAGES = 16


def run(context: RunConfig) -> None:
    """Run the sample through the data stages and one training step, then print the plan."""
    with TemporaryDirectory(prefix="coordexp-check-") as folder:
        small = _shrunken(context, Path(folder))
        for stage in (raw, convert, norm1000, pack, stage1):
            stage.run(small)
        _summary(small)
    diagnosis = diagnose(context, decode=False)
    LOG.info("the plan of the whole run:\n  %s", "\n  ".join(diagnosis.lines))
    if diagnosis.stops:
        raise DataError("the sample passed, but the whole run would stop at the lines marked STOP above.")


def _shrunken(context: RunConfig, folder: Path) -> RunConfig:
    profile, base = context.profile, folder / "base"
    parameters = write_shrunken(model_folder(profile.model.path), base, context.params.seed)
    LOG.info("model: %s parameters instead of those of %s", f"{parameters:,}", profile.model.path)
    source = profile.source
    if isinstance(source, DatasetsConfig):
        sets = write_sample(source.sets, profile.records, folder / "sets", IMAGES)
        source = source.model_copy(update={"sets": sets, "verify": "decode"})
    else:
        source = source.model_copy(update={"train_images": IMAGES, "val_images": IMAGES})
    step = {"steps": 1, "warmup_steps": 0, "packs_per_step": 1, "log_every": 1}
    changes = {
        "source": source,
        "records": profile.records.model_copy(update={"dev_images": 2}),
        "model": profile.model.model_copy(update={"path": str(base), "files": pins_of(base)}),
        "stage1": profile.stage1.model_copy(update=step),
    }
    small = Profile.model_validate(profile.model_copy(update=changes).model_dump())
    return replace(context, profile=small, paths=ProfilePaths(context.paths.profile, folder))


def _summary(small: RunConfig) -> None:
    paths = small.paths
    summary = json.loads((paths.norm1000 / "summary.json").read_text(encoding="utf-8"))
    trained = json.loads((paths.run("stage1") / RUN_METADATA).read_text(encoding="utf-8"))
    for split in ("train", "dev", "val"):
        LOG.info("sample: %s: %s", split, summary[split])
    loss, seconds = trained["final_loss"], read_run_record(paths.run_record("stage1"))["step_seconds"]
    LOG.info("sample: one training step, loss %s, %s s on this machine (shrunken model: not a forecast)", loss, seconds)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
