"""A trained checkpoint as an object detector: pictures in, named and scored boxes out.

    detector = Detector.from_pretrained("runs/tiny/stage2")
    found = detector.predict("photo.jpg")
    for desc, box_xyxy_px, score in zip(found.descs, found.boxes_xyxy_px, found.scores): ...

The model writes text; boxes come from the strict parser and scores from its own probabilities, as in evaluation.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from coordexp.errors import DataError, PictureError
from coordexp.geometry.boxes import Boxes, as_boxes
from coordexp.infra.device import AUTO
from coordexp.infra.prefetch import ahead
from coordexp.infra.provenance import answer_files, fingerprint
from coordexp.models.loading import ModelFormat, load_format, place_for_inference, vocabulary_size
from coordexp.packing.prepare import SamplePreparer
from coordexp.packing.samples import Sample
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult, ParseReport
from coordexp.records.images import read_rgb, to_rgb
from coordexp.records.prediction_log import AnswerSource
from coordexp.records.schema import Record
from coordexp.rollout.engine import DecodeRequest, Generation, Journal, greedy
from coordexp.rollout.hf_engine import GROUP_BATCHES, GroupEngine, HfEngine
from coordexp.rollout.scoring import readable, scored
from coordexp.rollout.stages import make_reader, read_answers
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_command import Weights
from coordexp.rollout.vllm_engine import VllmEngine
from coordexp.rollout.worker_engine import WorkerEngine, decode_devices
from coordexp.text.codecs import get_codec
from coordexp.text.prompts import question

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

MAX_NEW_TOKENS = 512
BATCH_IMAGES = 16
SERVER_TIMEOUT_SECONDS = 300.0
SERVER_TRIES = 4
REQUESTS_PER_SERVER = 16


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What was found in one picture, N objects in the order in which the model named them.

    Attributes:
        boxes_xyxy_px: (N, 4) float64, pixels of the picture as given (turned upright if its EXIF data say so).
        descs: N names, free text.
        scores: (N,) in [0, 1], higher is surer: the IoU that the model expects of the box, times the geometric mean of
            the probabilities of its name's tokens ("quality" in rollout/confidence.py). A model that writes digits has
            no distribution over bins: there, the geometric mean of the coordinates' probabilities.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        raw_text: the model's whole answer.
        parse: what the strict parser kept and dropped of it.
    """

    boxes_xyxy_px: Boxes
    descs: tuple[str, ...]
    scores: NDArray[np.float64]
    width: int
    height: int
    raw_text: str
    parse: ParseReport

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.descs)

    def named(self, names: Iterable[str]) -> Detections:
        """Only the objects of these names; case, '_' and parentheses do not count. The answer stays whole."""
        wanted = {normalise_desc(name) for name in names}
        keep = [i for i, desc in enumerate(self.descs) if normalise_desc(desc) in wanted]
        descs = tuple(self.descs[i] for i in keep)
        return replace(self, boxes_xyxy_px=self.boxes_xyxy_px[keep], descs=descs, scores=self.scores[keep])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value: `width`, `height`, `objects` (`desc`, `bbox_xyxy_px`, `score`), `parse`, `raw_text`."""
        rows = zip(self.descs, self.boxes_xyxy_px.tolist(), self.scores.tolist(), strict=True)
        objects = [{"desc": desc, "bbox_xyxy_px": box, "score": score} for desc, box, score in rows]
        size = {"width": self.width, "height": self.height}
        return size | {"objects": objects, "parse": asdict(self.parse), "raw_text": self.raw_text}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Detections:
        """The inverse of `to_json`; keys of other kinds do not matter.

        Raises:
            DataError: something of it is missing or of another type.
        """
        try:
            objects = row["objects"]
            return cls(
                boxes_xyxy_px=as_boxes([obj["bbox_xyxy_px"] for obj in objects]),
                descs=tuple(str(obj["desc"]) for obj in objects),
                scores=np.array([obj["score"] for obj in objects], dtype=np.float64),
                width=int(row["width"]),
                height=int(row["height"]),
                raw_text=str(row["raw_text"]),
                parse=ParseReport(**row["parse"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no answer as `Detections.to_json` writes it ({error!r}).") from error

    def to_supervision(self, class_names: Sequence[str] | None = None) -> Any:
        """The same objects as `supervision.Detections`, with the names in `data["class_name"]`.

        Args:
            class_names: `class_id` is the place in this list; case, '_' and parentheses do not count. Give the same
                list for all pictures of a metric. None: the place among the names of this answer, sorted.

        Raises:
            ImportError: that package is not installed.
            DataError: the list holds a name twice, or lacks one of the answer.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs the package supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy_px.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=class_ids(self.descs, class_names),
            data={"class_name": np.array(self.descs, dtype=str)},
        )


def class_ids(descs: Sequence[str], class_names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """(N,) place of each name in `class_names`, which `Detections.to_supervision` explains; raises DataError."""
    names = [normalise_desc(name) for name in (sorted(set(descs)) if class_names is None else class_names)]
    if class_names is None:
        names = list(dict.fromkeys(names))
    elif repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"class_names holds {', '.join(repeated)} more than once; expected each name once.")
    place = {name: number for number, name in enumerate(names)}
    if unknown := sorted({desc for desc in descs if normalise_desc(desc) not in place}):
        raise DataError(
            f"class_names lacks {', '.join(unknown[:5])} ({len(unknown)} of the names found); expected every name of "
            "the answer. Add them, or keep only the others: found.named(class_names)."
        )
    return np.array([place[normalise_desc(desc)] for desc in descs], dtype=np.int64)


def _pool(servers: Sequence[str], folder: Path) -> ServerPool:
    return ServerPool(servers, SERVER_TIMEOUT_SECONDS, SERVER_TRIES, Weights.of(folder))


class Detector:
    """Answers of one checkpoint, decoded greedily; build it with `from_pretrained`."""

    def __init__(
        self,
        form: ModelFormat,
        folder: Path,
        max_new_tokens: int,
        batch_images: int,
        servers: Sequence[str] = (),
        engine: GroupEngine | None = None,
    ) -> None:
        """Servers or the engine generate; `form` is a `Checkpoint` for answers of servers, which are scored here."""
        self._checkpoint = form
        self._folder = folder
        self._preparer = SamplePreparer(form.tokenizer, get_codec(form.codec), form.pixels)
        says = form.detection
        decode = readable(greedy(max_new_tokens, says.box, says.score), form.codec != "digits")
        self._reader = make_reader(form)
        self._request = DecodeRequest(params=decode, codec=form.codec, seed=0)
        self._n_servers = len(servers)
        self._pool = _pool(servers, folder) if servers else None
        self._engine = engine
        self._batch_images = batch_images

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_images: int = BATCH_IMAGES,
        servers: Sequence[str] = (),
        device: str = AUTO,
        processes: int = 1,
    ) -> Detector:
        """Load a checkpoint folder; `from_pretrained` is another name of this.

        How large pictures are given to it, what it is asked, and how its answers are read stands in the folder: in the
        processor files of transformers and in coordexp.json.

        Args:
            folder: a Hugging Face checkpoint, as the training stages write it, or a base model (it answers in digits).
            max_new_tokens: token budget of one answer; a longer one is cut (`parse.truncated`).
            batch_images: pictures decoded together, which bounds the memory.
            servers: URLs of vLLM servers of this checkpoint that generate in its place; the scores are computed here.
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; bfloat16 on GPUs.
            processes: that answer side by side, on the GPUs in turn; 0 is one for each GPU. The answers are the same.
                Above 1, the code of a script that makes a detector stands under `if __name__ == "__main__":`.

        Raises:
            CheckpointError: the folder is no usable checkpoint.
            ConfigError: there is no such device.
        """
        path, devices = Path(folder), decode_devices(processes, device)
        form = load_format(path)
        if not servers and len(devices) > 1:
            workers = WorkerEngine(path, form, Path(), batch_images, devices)
            return cls(form, path, max_new_tokens, batch_images, engine=workers)
        checkpoint = place_for_inference(path, form, devices[0])
        engine = None if servers else HfEngine(checkpoint, Path(), batch_images)
        return cls(checkpoint, path, max_new_tokens, batch_images, servers, engine)

    from_pretrained = from_checkpoint

    @overload
    def predict(self, images: Picture) -> Detections: ...  # type: ignore[overload-overlap]  # a str is one file name

    @overload
    def predict(self, images: Iterable[Picture]) -> list[Detections]: ...

    def predict(self, images: Picture | Iterable[Picture]) -> Detections | list[Detections]:
        """Detect the objects of one picture, or of each of several.

        Args:
            images: a file name, a PIL image, or an RGB array (H, W, 3) of uint8: the answer is one `Detections`. Or any
                number of them in a list (or another iterable): the answer is a list. Pictures are read as in training:
                upright by their EXIF orientation, 16-bit grey scaled, transparency on white.

        Raises:
            DataError: naming the picture that cannot be read, or is no picture.
        """
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            return next(self.stream([images]))
        if not isinstance(images, Iterable):
            raise DataError(f"{_describe(images)}: expected a file name, a PIL image, an RGB array, or a list of them.")
        return list(self.stream(images))

    def stream(self, images: Iterable[Picture]) -> Iterator[Detections]:
        """The answers to any number of pictures, in order, as they are ready; each picture as of `predict`.

        Pictures are taken and read in a thread, while those before them are answered: a few more than are answered at a
        time. What a picture raises, comes after the answers to those before it.
        """
        with closing(self.attempt(images)) as answers:
            for found in answers:
                if isinstance(found, PictureError):
                    raise found
                yield found

    def attempt(self, images: Iterable[Picture]) -> Generator[Detections | PictureError, None, None]:
        """As `stream`; a picture that cannot be read has its error in the answer's place."""
        # Engines read image files, so that one in another process is fed in the same way. The files hold what the model
        # sees: upright, losslessly, and already at its size.
        with TemporaryDirectory(prefix="coordexp-") as name:
            folder, asked = Path(name), deque[list[Sample | PictureError]]()
            with closing(ahead(self._parts(images, folder, asked))) as parts:
                for generations in self._answers(parts, folder):
                    yield from self._given(asked.popleft(), generations, folder)
            while asked:  # what comes after the last picture that could be read
                yield from self._given(asked.popleft(), (), folder)

    def close(self) -> None:
        """End the processes that answer, if there are any beside this one."""
        if self._engine:
            self._engine.close()

    def identity(self) -> AnswerSource:
        """What decides its answers besides the picture: the checkpoint's files, the question, and the settings."""
        asked = question(self._checkpoint.detection.prompt or {"kind": "open"})
        settings = {"question": asked, **self._request.params.model_dump(), "seed": self._request.seed}
        return AnswerSource(fingerprint({}, answer_files(self._folder)), settings)

    def _parts(
        self, images: Iterable[Picture], folder: Path, asked: deque[list[Sample | PictureError]]
    ) -> Iterator[list[Sample]]:
        """Samples that are answered together, written to `folder`: few at first, so that answers come soon.

        `asked` gets the same parts with the errors of pictures that cannot be read in their places.
        """
        numbered, staged = enumerate(images), list[Sample | PictureError]()
        for part in count():
            # Servers take many pictures at a time, and each part waits for its slowest.
            wanted = (4 * self._n_servers or min(2**part, GROUP_BATCHES)) * self._batch_images
            before, fault = len(staged), None
            try:
                for number, image in islice(numbered, wanted):
                    staged.append(self._attempt(image, folder, number))
            except (DataError, OSError) as error:
                fault = error
            ended = len(staged) < before + wanted
            samples = [one for one in staged if isinstance(one, Sample)]
            if samples or (ended and staged):
                asked.append(staged)
                staged = []
            if samples:
                yield samples
            if fault:
                raise fault
            if ended:
                return

    def _attempt(self, image: Picture, folder: Path, index: int) -> Sample | PictureError:
        try:
            return self._stage(image, folder, index)
        except PictureError as error:
            return error

    def _given(
        self, staged: Sequence[Sample | PictureError], generations: Sequence[Generation], folder: Path
    ) -> Iterator[Detections | PictureError]:
        """The answers of one part, errors in their places; the pictures on disk go."""
        samples = [one for one in staged if isinstance(one, Sample)]
        found = iter(self._read(samples, generations, folder) if samples else ())
        for one in staged:
            yield next(found) if isinstance(one, Sample) else one
        for sample in samples:
            (folder / sample.image).unlink()

    def _answers(self, parts: Iterable[Sequence[Sample]], folder: Path) -> Iterator[list[Generation]]:
        if self._pool:
            journal, workers = Journal(folder / "generations.jsonl"), REQUESTS_PER_SERVER * self._n_servers
            rows = vocabulary_size(self._folder)
            servers = VllmEngine(self._pool, self._checkpoint.tokenizer, folder, workers, journal, vocabulary_size=rows)
            yield from (servers.generate(part, self._request) for part in parts)
        elif self._engine:
            yield from self._engine.stream(parts, self._request, folder)

    def _read(self, samples: Sequence[Sample], generations: Sequence[Generation], folder: Path) -> Iterator[Detections]:
        answers = read_answers(self._checkpoint, self._reader, samples, generations, folder, self._batch_images)
        return (_detections(scored(answer, self._request.params)) for answer in answers)

    def _stage(self, image: Picture, folder: Path, index: int) -> Sample:
        picture, name = open_picture(image), f"{index}.png"
        prompt = self._checkpoint.detection.prompt
        metadata = {"image_id": index} | ({"prompt": prompt} if prompt else {})
        record = Record(name, picture.width, picture.height, objects=(), metadata=metadata)
        try:
            sample = self._preparer.prepare(record)
        except DataError as error:
            raise PictureError(f"{_describe(image)}: {error}") from error
        resized = picture.resize((sample.resized_width, sample.resized_height), Image.Resampling.BICUBIC)
        resized.save(folder / name, compress_level=1)
        return sample


def open_picture(image: Picture) -> Image.Image:
    """A picture of any accepted kind as an upright RGB image: what training makes of the same file.

    Raises:
        PictureError: the file cannot be read (`records.images.read_rgb`), or the array is not (H, W, 3) of uint8.
        DataError: it is none of these kinds.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise PictureError(f"{_describe(image)}: expected an RGB array of shape (H, W, 3) and type uint8.")
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, str | os.PathLike):
        raise DataError(f"{_describe(image)}: expected a file name, a PIL image, or an RGB array.")
    return read_rgb(image)


def _describe(image: object) -> str:
    if isinstance(image, np.ndarray):
        return f"array of shape {image.shape} and type {image.dtype}"
    if isinstance(image, Image.Image):
        return "PIL image"
    return str(image) if isinstance(image, str | os.PathLike) else f"picture of type {type(image).__name__}"


def _detections(result: ImageResult) -> Detections:
    assert result.parse is not None  # the model answers in text
    return Detections(
        boxes_xyxy_px=as_boxes([p.bbox_xyxy_px for p in result.pred]),
        descs=tuple(p.desc for p in result.pred),
        scores=np.array([p.score for p in result.pred], dtype=np.float64),
        width=result.width,
        height=result.height,
        raw_text=result.raw_text,
        parse=result.parse,
    )
