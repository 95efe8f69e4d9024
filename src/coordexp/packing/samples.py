"""Tokenized samples: norm1000 writes one parquet file per split, and every trainer and engine reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from coordexp.geometry.bins import encode_boxes
from coordexp.infra.artefacts import verified
from coordexp.infra.random_streams import generator
from coordexp.text.codecs import AnswerEncoder, TextObject

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("resized_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("n_image_tokens", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
        ("answer_roles", pa.list_(pa.uint8())),
        ("answer_objects", pa.list_(pa.int16())),
        ("descs", pa.list_(pa.string())),
        ("boxes_xyxy_px", pa.list_(pa.float32())),
        ("iscrowd", pa.list_(pa.bool_())),
        ("probe", pa.string()),
        ("asked", pa.list_(pa.string())),
    ]
)
# Only in files with annotated areas, which most sources lack. 64 bits: an area close to a limit decides the size band.
AREA_COLUMN = pa.field("areas_px2", pa.list_(pa.float64()))


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its prompt (one image placeholder), target answer, and annotations.

    Annotations are in answer order, with crowd regions last. Shapes: A answer tokens, M objects. `boxes_xyxy_px` (M, 4)
    are float pixels of the original image; the model sees the resized one. `areas_px2` are the annotated areas of
    masks, None for an object with only a box; the tuple is empty if all are None. `probe` and `asked` belong to a
    further prompt for an image that has a sample already (`records.mixing`): its kind, and the category names it lists.
    """

    image_id: int
    image: str
    width: int
    height: int
    resized_width: int
    resized_height: int
    n_image_tokens: int
    prompt_ids: NDArray[np.int32]
    answer_ids: NDArray[np.int32]
    answer_roles: NDArray[np.uint8]
    answer_objects: NDArray[np.int16]
    descs: tuple[str, ...]
    boxes_xyxy_px: NDArray[np.float32]
    iscrowd: tuple[bool, ...]
    areas_px2: tuple[float | None, ...] = ()
    probe: str = ""
    asked: tuple[str, ...] = ()

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens after the image placeholder is expanded."""
        return len(self.prompt_ids) - 1 + self.n_image_tokens

    def expanded_prompt_ids(self, image_token_id: int) -> NDArray[np.int32]:
        """The prompt as the model sees it: the image placeholder repeated for each visual token."""
        (position,) = np.flatnonzero(self.prompt_ids == image_token_id)
        image = np.full(self.n_image_tokens, image_token_id, self.prompt_ids.dtype)
        return np.concatenate([self.prompt_ids[:position], image, self.prompt_ids[position + 1 :]])

    @property
    def length(self) -> int:
        """Number of tokens of prompt and answer."""
        return self.prompt_length + len(self.answer_ids)


class SampleWriter:
    """Writes samples in row groups, so that a large split is never in memory as a whole.

    `with_areas` adds the column of annotated areas; without it, samples must not have any.
    """

    def __init__(self, path: Path, rows_per_group: int = 4096, with_areas: bool = False) -> None:
        self._schema = SCHEMA.append(AREA_COLUMN) if with_areas else SCHEMA
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, object]] = []
        self._rows_per_group = rows_per_group

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        assert not sample.areas_px2 or AREA_COLUMN.name in self._schema.names, "the file has no column for areas"
        row = {name: getattr(sample, name) for name in self._schema.names}
        row["boxes_xyxy_px"] = sample.boxes_xyxy_px.reshape(-1)
        self._rows.append(row)
        if len(self._rows) >= self._rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()


class SampleStore(Sequence[Sample]):
    """Random access to the samples of one split."""

    def __init__(self, path: Path) -> None:
        self._table = pq.read_table(verified(path), memory_map=True).combine_chunks()
        has_areas = AREA_COLUMN.name in self._table.column_names
        names = [*SCHEMA.names, AREA_COLUMN.name] if has_areas else SCHEMA.names
        self._columns = {name: self._table.column(name) for name in names}

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = {name: column[index] for name, column in self._columns.items()}
        return Sample(
            **{name: row[name].as_py() for name in SCHEMA.names[:7]},
            prompt_ids=_array(row["prompt_ids"], np.int32),
            answer_ids=_array(row["answer_ids"], np.int32),
            answer_roles=_array(row["answer_roles"], np.uint8),
            answer_objects=_array(row["answer_objects"], np.int16),
            descs=tuple(row["descs"].as_py()),
            boxes_xyxy_px=_array(row["boxes_xyxy_px"], np.float32).reshape(-1, 4),
            iscrowd=tuple(row["iscrowd"].as_py()),
            areas_px2=tuple(row[AREA_COLUMN.name].as_py()) if AREA_COLUMN.name in row else (),
            probe=row["probe"].as_py(),
            asked=tuple(row["asked"].as_py()),
        )

    def images(self) -> list[str]:
        """The image names of all samples, without building the samples."""
        return self._columns["image"].to_pylist()

    def lengths(self) -> NDArray[np.int32]:
        """The number of tokens of every sample (prompt with image, plus answer), without building the samples."""
        answer = self._table.column("answer_ids").combine_chunks().value_lengths().to_numpy()
        prompt = self._table.column("prompt_ids").combine_chunks().value_lengths().to_numpy()
        return (answer + prompt - 1 + self._table.column("n_image_tokens").to_numpy()).astype(np.int32)


def text_objects(descs: Sequence[str], bins_M4: NDArray[np.integer]) -> list[TextObject]:
    """Pair descriptions with their bins."""
    return [TextObject(desc, tuple(row)) for desc, row in zip(descs, bins_M4.tolist(), strict=True)]


class SampleSource:
    """Samples by (index, step) in the configured object order: as stored (top_left), or randomly permuted (random).

    The permutation depends only on (seed, step, index), so a resumed run repeats it. A permuted answer has the length
    of the original one, so the packing plan stays valid: every object keeps its tokens, and only the order changes.
    """

    def __init__(self, store: SampleStore, encoder: AnswerEncoder, object_order: str, seed: int) -> None:
        self.store = store
        self._encoder = encoder
        self._random = object_order == "random"
        self._seed = seed

    def get(self, index: int, step: int) -> Sample:
        """The sample as training step `step` uses it."""
        sample = self.store[index]
        if not self._random:
            return sample
        return permuted(sample, self._encoder, generator(self._seed, "train/object-order", step, index))


def permuted(sample: Sample, encoder: AnswerEncoder, rng: np.random.Generator) -> Sample:
    """The sample with its objects (crowd regions aside) in random order, in annotations and answer alike."""
    n_objects = len(sample.descs) - sum(sample.iscrowd)  # crowd regions come last and are not in the answer
    order = rng.permutation(n_objects)
    full_order = [*order.tolist(), *range(n_objects, len(sample.descs))]
    boxes = sample.boxes_xyxy_px[full_order]
    descs = tuple(sample.descs[i] for i in full_order)
    bins = encode_boxes(boxes[:n_objects], sample.width, sample.height)
    answer = encoder.encode(text_objects(descs[:n_objects], bins))
    return replace(
        sample,
        answer_ids=answer.ids,
        answer_roles=answer.roles,
        answer_objects=answer.object_index,
        descs=descs,
        boxes_xyxy_px=boxes,
        areas_px2=tuple(sample.areas_px2[i] for i in full_order) if sample.areas_px2 else (),
    )


def _array(scalar: pa.ListScalar, dtype: type) -> NDArray:
    return scalar.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
