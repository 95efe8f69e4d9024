"""A trained checkpoint as an object detector: images in, labeled and scored boxes out.

    detector = Detector.from_pretrained("runs/tiny/stage2")
    found = detector.predict("photo.jpg")
    for desc, box_xyxy_px, score in zip(found.descs, found.boxes_xyxy_px, found.scores): ...

The model generates text. The strict parser reads the boxes, and the scores come from the model's own probabilities,
exactly as in evaluation.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from glob import has_magic
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
from PIL import Image

from coordexp.detections import Detections, Picture, describe, detections_of, open_picture
from coordexp.errors import CheckpointError, DataError, PictureError
from coordexp.infra.device import AUTO
from coordexp.infra.prefetch import ahead
from coordexp.infra.provenance import answer_files, fingerprint
from coordexp.models.loading import ModelFormat, load_format, place_for_inference, vocabulary_size
from coordexp.packing.prepare import SamplePreparer
from coordexp.packing.samples import Sample
from coordexp.records.fetched import fetched_rgb, is_address
from coordexp.records.image_files import expand_images
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

Prompt = dict[str, Any] | None  # as `metadata.prompt` of a record
_Staged = tuple[Picture, Sample | PictureError]  # the input, and the sample that the model gets
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

MAX_NEW_TOKENS = 512
BATCH_IMAGES = 16
SERVER_TIMEOUT_SECONDS = 300.0
SERVER_TRIES = 4
REQUESTS_PER_SERVER = 16


def _pool(servers: Sequence[str], folder: Path) -> ServerPool:
    return ServerPool(servers, SERVER_TIMEOUT_SECONDS, SERVER_TRIES, Weights.of(folder))


class Detector:
    """An object detector from one checkpoint, decoded greedily; build it with `from_pretrained`."""

    def __init__(
        self,
        form: ModelFormat,
        folder: Path,
        max_new_tokens: int,
        batch_images: int,
        servers: Sequence[str] = (),
        engine: GroupEngine | None = None,
    ) -> None:
        """Servers or the engine generate. With servers, `form` is a `Checkpoint`: their answers are scored here."""
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
        """Load a checkpoint folder; `from_pretrained` is an alias.

        The folder defines the image size, the prompt, and how answers are read: in the processor files of transformers
        and in coordexp.json.

        Args:
            folder: a Hugging Face checkpoint that a training stage wrote, or a base model (it answers in digits); or
                the id of one on the Hub, "user/name", which is downloaded if it is not in the cache.
            max_new_tokens: maximum number of tokens per answer; a longer answer is truncated (`parse.truncated`).
            batch_images: number of images decoded together; it bounds the memory.
            servers: URLs of vLLM servers of this checkpoint that generate the answers; scores are computed here.
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; bfloat16 on GPUs.
            processes: number of worker processes, spread over the GPUs; 0: one per GPU. The answers do not depend on
                it. Above 1, a script must create its detector under `if __name__ == "__main__":`.

        Raises:
            CheckpointError: the folder is not a usable checkpoint.
            ConfigError: the device does not exist.
        """
        path, devices = _local(folder), decode_devices(processes, device)
        form = load_format(path)
        if not servers and len(devices) > 1:
            workers = WorkerEngine(path, form, Path(), batch_images, devices)
            return cls(form, path, max_new_tokens, batch_images, engine=workers)
        checkpoint = place_for_inference(path, form, devices[0])
        engine = None if servers else HfEngine(checkpoint, Path(), batch_images)
        return cls(checkpoint, path, max_new_tokens, batch_images, servers, engine)

    from_pretrained = from_checkpoint

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is one file name
        self,
        images: Picture,
        *,
        find: Sequence[str] = (),
        phrase: str = "",
        threshold: float = 0.0,
        fetch: bool = False,
    ) -> Detections: ...

    @overload
    def predict(
        self,
        images: Iterable[Picture],
        *,
        find: Sequence[str] = (),
        phrase: str = "",
        threshold: float = 0.0,
        fetch: bool = False,
    ) -> list[Detections]: ...

    def predict(
        self,
        images: Picture | Iterable[Picture],
        *,
        find: Sequence[str] = (),
        phrase: str = "",
        threshold: float = 0.0,
        fetch: bool = False,
    ) -> Detections | list[Detections]:
        """Detect the objects in one image, or in each of several images.

        Args:
            images: a file name, a PIL image, or a uint8 RGB array (H, W, 3): returns one `Detections`. Or a list (or
                another iterable) of these, a folder, or a pattern such as "photos/*.jpg": returns a list. Images are
                read as in training: EXIF orientation applied, 16-bit gray scaled, transparency put on white.
            find: labels to look for. They are in the prompt if the checkpoint was trained with label lists; the result
                contains no other labels. Empty: the prompt that the checkpoint was trained with.
            phrase: a referring expression to look for instead, if the checkpoint was trained with phrases.
            threshold: minimum score of an object.
            fetch: download images that are given as URLs; without it, a URL is an error.

        Raises:
            ConfigError: the checkpoint was not trained with this kind of prompt.
            DataError: an input cannot be read or is not an image; the message names it.
        """
        if isinstance(images, str | os.PathLike) and _means_several(images):
            images = expand_images([os.fspath(images)])
        if fetch:
            images = fetched_rgb(images) if is_address(images) else _fetched(images)
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            return next(self.stream([images], find=find, phrase=phrase)).above(threshold)
        if not isinstance(images, Iterable):
            raise DataError(f"{describe(images)}: expected a file name, a PIL image, an RGB array, or a list of them.")
        return [found.above(threshold) for found in self.stream(images, find=find, phrase=phrase)]

    def stream(self, images: Iterable[Picture], *, find: Sequence[str] = (), phrase: str = "") -> Iterator[Detections]:
        """Detect in any number of images and yield the results in order, as they are ready; inputs as in `predict`.

        A thread takes and reads images ahead, slightly more than are decoded at a time. The error of an image is raised
        after the results of the images before it.
        """
        with closing(self.attempt(images, find=find, phrase=phrase)) as answers:
            for found in answers:
                if isinstance(found, PictureError):
                    raise found
                yield found.named(find) if find else found

    def attempt(
        self, images: Iterable[Picture], *, find: Sequence[str] = (), phrase: str = ""
    ) -> Generator[Detections | PictureError, None, None]:
        """As `stream`, but with complete answers; an image that cannot be read yields its error in place of one."""
        prompt = self._checkpoint.detection.prompt_for(find, phrase)
        # Engines read image files, so that an engine in another process gets the same input. The files hold what the
        # model sees: upright, lossless, and already resized.
        with TemporaryDirectory(prefix="coordexp-") as name:
            folder, asked = Path(name), deque[list[_Staged]]()
            with closing(ahead(self._parts(images, prompt, folder, asked))) as parts:
                for generations in self._answers(parts, folder):
                    yield from self._given(asked.popleft(), generations, folder)
            while asked:  # errors after the last readable image
                yield from self._given(asked.popleft(), (), folder)

    def close(self) -> None:
        """Stop the worker processes, if there are any."""
        if self._engine:
            self._engine.close()

    @property
    def takes_labels(self) -> bool:
        """Whether labels go into the prompt: the checkpoint was trained with label lists."""
        return bool({"listed", "closed"} & set(self._checkpoint.detection.prompts))

    @property
    def takes_phrases(self) -> bool:
        """Whether it accepts a phrase: the checkpoint was trained with phrases."""
        return "phrase" in self._checkpoint.detection.prompts

    def identity(self, find: Sequence[str] = (), phrase: str = "") -> AnswerSource:
        """What determines its answers besides the image: the checkpoint's files, the prompt, and the settings."""
        asked = question(self._checkpoint.detection.prompt_for(find, phrase) or {"kind": "open"})
        settings = {"question": asked, **self._request.params.model_dump(), "seed": self._request.seed}
        return AnswerSource(fingerprint({}, answer_files(self._folder)), settings)

    def _parts(
        self, images: Iterable[Picture], prompt: Prompt, folder: Path, asked: deque[list[_Staged]]
    ) -> Iterator[list[Sample]]:
        """Groups of samples to decode together, written to `folder`; the first ones are small for a fast first answer.

        `asked` gets the same groups, with errors in place of the images that cannot be read.
        """
        numbered, staged = enumerate(images), list[_Staged]()
        for part in count():
            # Servers process many images at a time, and each group waits for its slowest image.
            wanted = (4 * self._n_servers or min(2**part, GROUP_BATCHES)) * self._batch_images
            before, fault = len(staged), None
            try:
                for number, image in islice(numbered, wanted):
                    staged.append((image, self._attempt(image, prompt, folder, number)))
            except (DataError, OSError) as error:
                fault = error
            ended = len(staged) < before + wanted
            samples = [one for _, one in staged if isinstance(one, Sample)]
            if samples or (ended and staged):
                asked.append(staged)
                staged = []
            if samples:
                yield samples
            if fault:
                raise fault
            if ended:
                return

    def _attempt(self, image: Picture, prompt: Prompt, folder: Path, index: int) -> Sample | PictureError:
        try:
            return self._stage(image, prompt, folder, index)
        except PictureError as error:
            return error

    def _given(
        self, staged: Sequence[_Staged], generations: Sequence[Generation], folder: Path
    ) -> Iterator[Detections | PictureError]:
        """The answers and errors of one group in input order; removes its image files."""
        samples = [one for _, one in staged if isinstance(one, Sample)]
        found = iter(self._read(samples, generations, folder) if samples else ())
        for image, one in staged:
            yield replace(next(found), picture=image) if isinstance(one, Sample) else one
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
        return (detections_of(scored(answer, self._request.params)) for answer in answers)

    def _stage(self, image: Picture, prompt: Prompt, folder: Path, index: int) -> Sample:
        picture, name = open_picture(image), f"{index}.png"
        metadata = {"image_id": index} | ({"prompt": prompt} if prompt else {})
        record = Record(name, picture.width, picture.height, objects=(), metadata=metadata)
        try:
            sample = self._preparer.prepare(record)
        except DataError as error:
            raise PictureError(f"{describe(image)}: {error}") from error
        resized = picture.resize((sample.resized_width, sample.resized_height), Image.Resampling.BICUBIC)
        resized.save(folder / name, compress_level=1)
        return sample


def _means_several(images: str | os.PathLike[str]) -> bool:
    """Whether a name means a folder or a glob pattern, not one file."""
    return os.path.isdir(images) or (not os.path.exists(images) and not is_address(images) and has_magic(str(images)))


def _fetched(images: Picture | Iterable[Picture]) -> Picture | Iterable[Picture]:
    """Pass inputs through; in an iterable, URLs are downloaded when they are reached."""
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) or not isinstance(images, Iterable):
        return images
    return (fetched_rgb(one) if is_address(one) else one for one in images)


def _local(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the cached folder of a Hub model; raises CheckpointError if it cannot be downloaded."""
    path, name = Path(folder), str(folder)
    if path.exists() or not _HUB_ID.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.txt"]))
    except (OSError, ValueError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no such folder, and not available from the Hub ({reason}).") from error
