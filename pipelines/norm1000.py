"""Add coordinate tokens to tokenizer and model, and convert records with their boxes to tokens."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import repeat

from coordexp.config.run import RunConfig
from coordexp.infra.artefacts import sealing
from coordexp.infra.provenance import write_json
from coordexp.models.detection_config import DetectionConfig
from coordexp.models.expand import add_coordinate_tokens
from coordexp.models.loading import load_checkpoint, save_checkpoint
from coordexp.models.pins import pinned_folder
from coordexp.packing.prepare import SamplePreparer, have_areas, write_split
from coordexp.records.schema import read_records
from coordexp.stage import LOG, stage_main
from coordexp.text.codecs import get_codec


def run(context: RunConfig) -> None:
    """Write `init/` (the model with coordinate tokens), and one sample file per split."""
    config = context.profile.model
    base = load_checkpoint(pinned_folder(config, context.params.profile), config.min_pixels, config.max_pixels)
    vocabulary = add_coordinate_tokens(base.model, base.tokenizer, config.coord_init, context.params.seed)
    asked = read_records(context.paths.records / "train.jsonl")
    detection = DetectionConfig.of_training(context.params.text, asked, vocabulary)
    preparer = SamplePreparer(base.tokenizer, get_codec(detection.codec), base.pixels)
    summary: dict[str, object] = {"first_coord_id": vocabulary.first_id, "tokenizer_size": len(base.tokenizer)}
    with sealing(context.paths.norm1000) as out:
        save_checkpoint(context.paths.init, replace(base, detection=detection))
        for split in ("train", "dev", "val"):
            path, to = context.paths.records / f"{split}.jsonl", out / f"{split}.parquet"
            with_areas = have_areas(read_records(path))
            counts = write_split(preparer, read_records(path), repeat("detect"), to, with_areas)
            summary[split] = asdict(counts)
            LOG.info("%s: %s", split, counts)
        write_json(out / "summary.json", summary)


if __name__ == "__main__":
    raise SystemExit(stage_main(run))
