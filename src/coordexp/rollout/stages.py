"""The decoding stages: rollouts on the training split, and the answers of a checkpoint on val."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coordexp.config.paths import model_folder
from coordexp.config.run import RunConfig
from coordexp.infra.artefacts import sealing, write_sealed
from coordexp.infra.code_hash import code_hash
from coordexp.infra.provenance import add_to_run_record, answer_files, fingerprint
from coordexp.infra.random_streams import generator
from coordexp.infra.resume import holding, resume_folder
from coordexp.models.loading import Checkpoint, ModelFormat, load_format, place_for_inference
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult
from coordexp.rollout.decode import AnswerReader, coord_positions
from coordexp.rollout.engine import READOUT_KEYS, DecodeRequest, Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.opening import generate_answers
from coordexp.rollout.records import warn_of_unusable, write_generations
from coordexp.rollout.rescore import Rescored, kept_while_generating, rescore
from coordexp.rollout.scoring import Decoded, read_decoded, scored, write_decoded
from coordexp.text.symbols import TokenTable

log = logging.getLogger(__name__)

RESCORE_TOKENS = 512  # row length for re-scoring


def decode_request(run: RunConfig, codec: str) -> DecodeRequest:
    """The request of a run to an engine; for the closed grammar, with the category names of the data set."""
    return DecodeRequest(params=run.params.decode, codec=codec, seed=run.params.seed, names=allowed_names(run))


def allowed_names(run: RunConfig) -> tuple[str, ...]:
    """For the closed grammar all category names of the data set, including those unseen in training; otherwise none."""
    if run.params.decode.grammar != "closed":
        return ()
    return tuple(category.name for category in read_categories(run.paths.records / "categories.json"))


def asked_format(run: RunConfig, folder: Path) -> ModelFormat:
    """The format of a checkpoint of the run, with the image limits of the run.

    The base model has limits of its own, but gets images of the size that norm1000 determined.
    """
    model = run.profile.model
    is_base = folder.resolve() == model_folder(model.path).resolve()
    return load_format(folder, model.min_pixels, model.max_pixels) if is_base else load_format(folder)


def make_reader(checkpoint: ModelFormat, identity: dict[str, str] | None = None) -> AnswerReader:
    """The reader of this checkpoint's answers."""
    table = TokenTable.from_tokenizer(checkpoint.tokenizer, checkpoint.coord)
    return AnswerReader(table, checkpoint.codec, identity or {})


def decode_identity(folder: Path, sample: Sample, request: DecodeRequest) -> dict[str, str]:
    """Short hashes of weights, prompt and decode request; files with equal identities are comparable."""
    prompt = hashlib.sha256(sample.prompt_ids.tobytes()).hexdigest()[:16]
    decode = hashlib.sha256(request.identity().encode()).hexdigest()[:16]
    return {"model": fingerprint({}, answer_files(folder)), "prompt": prompt, "decode": decode}


def predict_samples(
    checkpoint: Checkpoint,
    reader: AnswerReader,
    samples: Sequence[Sample],
    image_root: Path,
    request: DecodeRequest,
    batch_images: int,
) -> list[tuple[ImageResult, Generation]]:
    """Generate, parse and score with the model in memory; results in the order of the samples."""
    generations = HfEngine(checkpoint, image_root, batch_images).generate(samples, request)
    decoded = read_answers(checkpoint, reader, samples, generations, image_root, batch_images)
    results = [scored(answer, request.params) for answer in decoded]
    return list(zip(results, generations, strict=True))


def read_answers(
    form: ModelFormat,
    reader: AnswerReader,
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    image_root: Path,
    batch_images: int,
) -> list[Decoded]:
    """Parse the answers of any engine, in the order of the samples.

    Answers without probabilities are re-scored, for which `form` must be a `Checkpoint`.
    """
    positions = [coord_positions(reader.parse(g)) for g in generations]
    bare = [i for i, generation in enumerate(generations) if generation.probs is None]
    rescored: dict[int, Rescored] = {}
    if bare:
        assert isinstance(form, Checkpoint)
        again = rescore(
            form,
            form.collator(image_root, RESCORE_TOKENS),
            [samples[i] for i in bare],
            [generations[i] for i in bare],
            [positions[i] for i in bare],
            batch_images,
        )
        rescored = dict(zip(bare, again, strict=True))
    texts = form.tokenizer.batch_decode([g.ids.tolist() for g in generations], skip_special_tokens=False)
    return [
        reader.decoded(sample, generation, rescored.get(i) or kept_while_generating(form, generation, where), text)
        for i, (sample, generation, where, text) in enumerate(zip(samples, generations, positions, texts, strict=True))
    ]


def run_rollouts(run: RunConfig) -> int:
    """Generate and write the answers of stage 1 on training images; returns their number."""
    folder = run.paths.run("stage1")
    form = load_format(folder)
    store = SampleStore(run.paths.norm1000 / "train.parquet")
    count = min(run.profile.rollout.images, len(store))
    chosen = np.sort(generator(run.params.seed, "rollout/images").permutation(len(store))[:count])
    samples = [store[int(i)] for i in chosen]
    request = replace(decode_request(run, form.codec), keep_probs=False)
    batch_images = run.profile.rollout.batch_images
    generations, _, seconds = generate_answers(run.profile, form, folder, run.paths.raw, batch_images, samples, request)
    by_image = {sample.image_id: generation for sample, generation in zip(samples, generations, strict=True)}
    with sealing(run.paths.run("rollout")):
        write_generations(run.paths.rollouts, by_image)
    record_rate(run, "rollout", len(samples), seconds)
    reader = make_reader(form)
    warn_of_unusable([reader.parse(generation).report for generation in generations])
    return len(by_image)


def record_rate(run: RunConfig, stage: str, n_images: int, seconds: float) -> None:
    """Write the speed of generation to the run record, for time estimates of later runs."""
    facts = {"engine": run.profile.rollout.engine, "images": n_images, "generate_seconds": round(seconds, 2)}
    add_to_run_record(run.paths.run_record(stage), facts)


def decode_split(
    run: RunConfig, name: str, folder: Path, out: Path, draws: int = 1, split: Literal["val", "dev"] = "val"
) -> dict[str, Any]:
    """Write the answers of one checkpoint on a split to `out`, with the distributions that scores need.

    Several `draws` per image (at a temperature above 0) equal those of runs with several seeds; they go to `out`/0, /1,
    and so on. On val, `eval.images` limits the number of images.

    Returns the summary, which is also written, and the time of generation as `generate_seconds`.
    """
    form = asked_format(run, folder)
    store, request = SampleStore(run.paths.norm1000 / f"{split}.parquet"), decode_request(run, form.codec)
    images = store.images()
    most = run.profile.eval.images if split == "val" else 0
    chosen = set(list(dict.fromkeys(images))[: most or None])
    asked = [i for i, image in enumerate(images) if image in chosen]  # probes with their image
    samples = [store[i] for i in asked for _ in range(draws)]
    identity = decode_identity(folder, samples[0], request)
    batch_images = run.profile.rollout.batch_images
    generations, checkpoint, seconds = generate_answers(
        run.profile, form, folder, run.paths.raw, batch_images, samples, request
    )
    if checkpoint is None and any(generation.probs is None for generation in generations):
        checkpoint = place_for_inference(folder, form)  # our servers have stopped, so the model fits into memory
    decoded = read_answers(
        checkpoint or form, make_reader(form, identity), samples, generations, run.paths.raw, batch_images
    )
    summary = {
        "checkpoint": name,
        "codec": form.codec,
        "identity": identity,
        "settings": request.params.model_dump(exclude=READOUT_KEYS),
        "images": len(chosen),
        "tokens": sum(answer.result.n_generated_tokens for answer in decoded),
    }
    for draw in range(draws):
        write_decoded(out / str(draw) if draws > 1 else out, decoded[draw::draws], summary)
    return summary | {"generate_seconds": round(seconds, 2)}


def decode_kept(run: RunConfig, name: str, draws: int = 1) -> list[list[ImageResult]]:
    """The scored answers of a checkpoint of the run on val, one list per draw; for comparisons outside the graph.

    Answers are kept under everything that determines them. An interrupted comparison therefore resumes, and another
    readout generates nothing.
    """
    folder, decode = run.paths.run(name), run.params.decode
    asked = {"decode": decode.model_dump(exclude=READOUT_KEYS), "seed": run.params.seed, "draws": draws}
    asked["code"] = code_hash(__name__)
    key = fingerprint(asked, [*answer_files(folder), run.paths.norm1000 / "val.parquet"])
    kept = resume_folder("decoded", key)
    with holding(kept, f"answers of {name}"):
        if not (kept / "done.json").is_file():
            write_sealed(kept / "done.json", decode_split(run, name, folder, kept / "draws", draws))
    folders = [kept / "draws" / str(draw) for draw in range(draws)] if draws > 1 else [kept / "draws"]
    return [[scored(answer, decode) for answer in read_decoded(one)] for one in folders]
