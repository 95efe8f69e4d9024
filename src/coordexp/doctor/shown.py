"""Preview of the model's inputs and target answers: records as samples, before any stage has run.

The preview is exact: prompt, answer and image size are those of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from coordexp.config.paths import model_folder
from coordexp.config.profile import DatasetsConfig
from coordexp.config.run import RunConfig
from coordexp.geometry.bins import COORD_TOKENS
from coordexp.models.loading import read_format
from coordexp.packing.prepare import SamplePreparer
from coordexp.packing.samples import Sample
from coordexp.records.images import read_record_rgb, read_rgb
from coordexp.records.manifest import located
from coordexp.records.schema import Record
from coordexp.records.shards import find_source
from coordexp.text.codecs import get_codec
from coordexp.text.vocabulary import has_coord_tokens

MEASURED = 2000  # maximum number of records to measure; a hash of their names selects them


class Preview:
    """The samples of a profile's records, with the tokenizer, codec and image size of its training."""

    def __init__(self, run: RunConfig) -> None:
        """Raises CheckpointError if the profile's model folder is not a Qwen3-VL checkpoint."""
        self._run = run
        form, model = read_format(model_folder(run.profile.model.path)), run.profile.model
        self.tokenizer = form.tokenizer
        if not has_coord_tokens(self.tokenizer):
            self.tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
        self.pixels = form.pixels.within(model.min_pixels, model.max_pixels)
        self._preparer = SamplePreparer(self.tokenizer, get_codec(run.params.text.codec), self.pixels)

    def samples(self, records: Iterable[Record], at_most: int = MEASURED) -> list[Sample]:
        """The samples of at most `at_most` records, selected by a hash of their names."""
        return [self._preparer.prepare(record) for record in sorted(records, key=_digest)[:at_most]]

    def picture(self, sample: Sample) -> Image.Image:
        """The image of a sample in the model's input size; raises PictureError."""
        source = self._run.profile.source
        if isinstance(source, DatasetsConfig):
            name, _, below = sample.image.partition("/")
            rgb = read_rgb(find_source(Path(located(name, source.sets[name]).root), below))
        else:
            rgb = read_record_rgb(self._run.paths.raw, sample.image)
        return rgb.resize((sample.resized_width, sample.resized_height), Image.Resampling.BICUBIC)


def _digest(record: Record) -> str:
    return hashlib.sha256(record.image.encode()).hexdigest()
