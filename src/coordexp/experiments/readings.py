"""Readings of a run: numbers that need its checkpoint, its kept steps, or its log, not only its answers on val.

Like a metric, a reading is one number of one checkpoint, and the same number in every resample of the images, so the
same rule gives verdicts. Answers that a reading generates are stored, so that it generates them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coordexp.config.paths import CONTEXT_ROWS, KEPT_STEPS, ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.run import RunConfig
from coordexp.config.schema import Params
from coordexp.errors import DataError
from coordexp.evaluation.best_of_k import oracle_k, vote
from coordexp.evaluation.bootstrap import resample_weights
from coordexp.evaluation.comparison import Reading, reading
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.f1 import greedy_pairs
from coordexp.evaluation.measures import Statistic, ratio
from coordexp.experiments.runs import KEPT, WORKSPACE, Repository
from coordexp.experiments.sides import categories_path, read_answers
from coordexp.experiments.trajectory import evaluate_steps
from coordexp.geometry.bins import decode_norm
from coordexp.geometry.boxes import pairwise_iou
from coordexp.infra.artefacts import write_sealed
from coordexp.infra.code_hash import code_hash
from coordexp.infra.foreign import Gate
from coordexp.infra.logs import diagnostic_sums, read_rows
from coordexp.infra.provenance import fingerprint
from coordexp.infra.random_streams import generator
from coordexp.models.loading import load_format
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.categories import read_categories
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult, Prediction, own_lines
from coordexp.reporting.training import MEANINGS, SHAPES
from coordexp.rollout.engine import Generation
from coordexp.rollout.opening import generate_answers
from coordexp.rollout.stages import decode_kept, decode_request, make_reader
from coordexp.text.codecs import AnswerEncoder, Role, TextObject, get_codec

SAME_IOU = 0.5  # minimum IoU at which two answers have an object of one name in common
PROBE = Gate("stored counts of common objects by image", DataError, "Delete it: the answers are generated again.")
FEWEST_OBJECTS = 3  # minimum objects in an answer: two to permute and one as the rest


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run: its revision, parameters and profile; `draws` holds the parameters of the resampling."""

    repository: Repository
    revision: str
    params: Params
    profile: Profile
    draws: Params

    @property
    def paths(self) -> ProfilePaths:
        """Paths in the graph."""
        return ProfilePaths(self.params.profile)

    @property
    def root(self) -> Path:
        """The folder that holds the files of the revision, at their paths in the graph."""
        root = self.repository.root
        return root if self.revision == WORKSPACE else root / KEPT / self.revision

    def fetch(self, path: Path) -> Path:
        """Fetch a file or folder of the graph; raises DataError."""
        return self.repository.fetch(self.revision, path.as_posix())

    def config(self) -> RunConfig:
        """The run configuration for the fetched files, including the images."""
        place = self.paths.raw
        if not (self.root / place).exists():
            ours, theirs = (self.repository.past(r).made(place.as_posix()) for r in (WORKSPACE, self.revision))
            if ours and ours == theirs and (self.repository.root / place).is_dir():
                (self.root / place).parent.mkdir(parents=True, exist_ok=True)
                (self.root / place).symlink_to((self.repository.root / place).resolve())
            else:
                self.fetch(place)
        paths = ProfilePaths(self.params.profile, self.root)
        return RunConfig(params=self.params, profile=self.profile, paths=paths)

    def reading(self, statistic: Statistic, n_images: int) -> Reading | None:
        """The value of a statistic of images, with its resamples."""
        weights_BI = resample_weights(n_images, self.draws.eval.bootstrap_resamples, self.draws.seed)
        value = float(statistic(np.ones((1, n_images)))[0])
        return None if np.isnan(value) else Reading(value, statistic(weights_BI), n_images)


@dataclass(frozen=True, slots=True)
class RunReading:
    """One kind of reading, of the images of a split; `paths` are the stage outputs that it needs.

    Faults of the answers invalidate a reading that is `of_answers`.
    """

    split: Literal["val", "dev"]
    meaning: str
    unit: str
    better: Literal["higher", "lower", "neither"]
    paths: Callable[[ProfilePaths, str], Sequence[str]]
    compute: Callable[[RunFiles, str], Reading | None]  # of a checkpoint, from the fetched outputs
    of_answers: bool = True

    def read(self, files: RunFiles, checkpoint: str) -> Reading | None:
        """The reading of a checkpoint; raises DataError if an output that it needs cannot be fetched."""
        for path in self.paths(files.paths, checkpoint):
            files.fetch(Path(path))
        return self.compute(files, checkpoint)


# Coordinate errors in the model's own context compared with the annotated context.


def _context_paths(paths: ProfilePaths, checkpoint: str) -> Sequence[str]:
    return [(paths.run(checkpoint) / CONTEXT_ROWS).as_posix()]


def _context_drift(files: RunFiles, checkpoint: str) -> Reading | None:
    """Error in bins of the last forward of channel A minus the first, over the objects of dev, after the last step.

    The first forward has the annotated coordinates as context, each later one the predictions of the previous forward.
    Slots, images and weights are the same.
    """
    last = _last_rows(files, checkpoint, "A1")
    names = sorted(name for name in last[0] if name[:1] == "A" and name[1:].isdigit())
    if len(names) < 2:
        return None
    sums_IC = np.array([[sum(row[name]) for name in (names[0], names[-1])] for row in last], np.float64).reshape(-1, 2)
    n_I = np.array([len(row["A1"]) for row in last])
    return files.reading(ratio(sums_IC[:, 1] - sums_IC[:, 0], n_I), len(last))


def _last_rows(files: RunFiles, checkpoint: str, *columns: str) -> list[dict[str, Any]]:
    """The rows of the eval callback for each dev image after the last step."""
    rows = read_rows(files.fetch(files.paths.run(checkpoint) / CONTEXT_ROWS), {*columns})
    return [row for row in rows if row["step"] == max(other["step"] for other in rows)]


def _coordinates(name: str, files: RunFiles, checkpoint: str) -> Reading | None:
    """The mean of a diagnostic over the annotated coordinates of dev, in the annotated context, after the last step."""
    last = _last_rows(files, checkpoint, "A1", "coord_diag")
    sums_I, counts_I = map(np.array, diagnostic_sums(last, "A1", name))
    return files.reading(ratio(sums_I, counts_I), len(last))


# Whether F1 and mAP rise together while a stage trains.


def _step_paths(paths: ProfilePaths, checkpoint: str) -> Sequence[str]:
    return [paths.run(checkpoint).as_posix(), (paths.norm1000 / "dev.parquet").as_posix(), categories_path(paths)]


def _f1_with_map(files: RunFiles, checkpoint: str) -> Reading | None:
    """The correlation of F1 and mAP on dev over the kept steps of a stage."""
    run = files.config()
    if not (run.paths.run(checkpoint) / KEPT_STEPS).is_dir():
        raise DataError(
            f"{run.paths.run(checkpoint)}: no checkpoints of earlier steps. Set monitor.keep_every_steps, and train "
            "again."
        )
    points = evaluate_steps(run, checkpoint, files.root / "steps" / checkpoint, files.repository.say, files.draws)
    pairs = ("f1.full_50", "coco.mAP")
    values = [[point.evaluation.value(key) for key in pairs] for point in points]
    known = [[0.0 if v is None else v for v in row] for row in values]
    samples_SBK = np.stack([np.stack([point.evaluation.samples[key] for key in pairs], -1) for point in points])
    value = _correlation(np.array(known)[:, None])
    n_images = points[0].evaluation.table.n_images
    return None if np.isnan(value[0]) else Reading(float(value[0]), _correlation(samples_SBK), n_images)


def _correlation(values_SB2: np.ndarray) -> np.ndarray:
    """(B,) Pearson correlation of two values over S steps; NaN if one of them is constant."""
    centred = values_SB2 - values_SB2.mean(axis=0)
    product_B = (centred[..., 0] * centred[..., 1]).sum(axis=0)
    norm_B = np.sqrt((centred**2).sum(axis=0).prod(axis=-1))
    return np.divide(product_B, norm_B, out=np.full_like(product_B, np.nan), where=norm_B > 0)


# Whether the rest of an answer depends on the order of the objects at its beginning.


def _answer_paths(paths: ProfilePaths, checkpoint: str) -> Sequence[str]:
    return [paths.run(checkpoint).as_posix(), (paths.norm1000 / "val.parquet").as_posix()]


def _order_agreement(files: RunFiles, checkpoint: str) -> Reading | None:
    """F1 between the rest of an answer and the rest that the model generates after a permuted beginning.

    The first half of each answer, at least two objects, is permuted and given as the beginning of a new answer. With
    the original order, greedy decoding would repeat the rest exactly, an agreement of 1. Images count in proportion to
    their number of objects.
    """
    results = own_lines(read_answers(files.repository, files.revision, files.paths, checkpoint, files.params.decode))
    told = {"decode": files.params.decode.model_dump(), "seed": files.draws.seed, "code": code_hash(__name__)}
    name = f"order-{checkpoint}-{fingerprint(told, [])}.json"
    kept = files.repository.root / KEPT / files.revision / "probes" / name
    if not kept.is_file():
        write_sealed(kept, _permuted_rests(files.config(), checkpoint, results, files.draws.seed))
    found = PROBE.read_sealed(kept)
    rows = [found.get(str(result.image_id), (0, 0)) for result in sorted(results, key=lambda r: r.image_id)]
    common_I, said_I = np.array(rows, np.float64).T
    return files.reading(ratio(2 * common_I, said_I), len(rows))


def _permuted_rests(
    run: RunConfig, checkpoint: str, results: Sequence[ImageResult], seed: int
) -> Mapping[str, tuple[int, int]]:
    """By image id, the objects common to both rests and the objects of both; for images with enough objects."""
    folder = run.paths.run(checkpoint)
    form = load_format(folder)
    if form.codec == "digits":
        raise DataError(
            f"{folder}: the answers have digits, expected coordinate tokens. Use text.codec json or tags for this "
            "reading."
        )
    encoder = AnswerEncoder(form.tokenizer, get_codec(form.codec))
    store = SampleStore(run.paths.norm1000 / "val.parquet")
    samples = {sample.image_id: sample for sample in (store[i] for i in range(len(store))) if not sample.probe}
    asked = [result for result in results if len(result.pred) >= FEWEST_OBJECTS]
    begun = [_begun(samples[result.image_id], result, encoder, seed) for result in asked]
    # The grammar walks an answer from its start, and servers build their own prompt, so neither can continue an answer.
    plain = {"grammar": "none", "corners": "any", "duplicate_iou": 1.0}
    request = decode_request(run, form.codec)
    request = replace(request, params=request.params.model_copy(update=plain), keep_probs=False)
    profile = run.profile.model_copy(update={"rollout": run.profile.rollout.model_copy(update={"engine": "hf"})})
    made, _, _ = generate_answers(
        profile, form, folder, run.paths.raw, profile.rollout.batch_images, [sample for sample, _ in begun], request
    )
    reader = make_reader(form)
    rows = {}
    for result, (_, beginning), rest in zip(asked, begun, made, strict=True):
        whole = reader.parse(Generation(np.concatenate([beginning, rest.ids]), rest.finish_reason))
        n_begun = _n_begun(result)
        before = [(p.desc, _bins(p)) for p in result.pred[n_begun:]]
        after = [(o.desc, o.bins) for o in whole.objects[n_begun:]]
        rows[str(result.image_id)] = (_in_common(before, after), len(before) + len(after))
    return rows


# The value of several sampled answers.

SAMPLES, SUPPORT = 8, 2  # sampled answers per image; minimum votes for an object
SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_p": 1.0, "beams": 1, "grammar": "any", "corners": "valid"}


def _vote_paths(paths: ProfilePaths, checkpoint: str) -> Sequence[str]:
    return [*_answer_paths(paths, checkpoint), categories_path(paths)]


def _sampled_answers(files: RunFiles, checkpoint: str) -> list[list[ImageResult]]:
    """K sampled answers per val image; kept, so that a second reading generates none."""
    run = files.config()
    decode = run.params.decode.model_copy(update=SAMPLED)
    run = replace(run, params=run.params.model_copy(update={"decode": decode}))
    return [own_lines(results) for results in decode_kept(run, checkpoint, SAMPLES)]


def _recall_gain(files: RunFiles, checkpoint: str) -> Reading | None:
    """Recall of an oracle that takes each object from any of K samples, minus the mean recall of one sample."""
    found = oracle_k(_sampled_answers(files, checkpoint))
    return files.reading(ratio(found.any_I - found.one_I, found.n_gt_I), len(found.n_gt_I))


def _vote_gain(files: RunFiles, checkpoint: str) -> Reading | None:
    """mAP of the objects on which samples agree, minus that of the run's own answers."""
    voted = vote(_sampled_answers(files, checkpoint), SUPPORT)
    own = read_answers(files.repository, files.revision, files.paths, checkpoint, files.params.decode)
    categories = read_categories(files.config().paths.records / "categories.json")
    judged = files.params.eval.model_copy(update={"bootstrap_resamples": files.draws.eval.bootstrap_resamples})
    ours, theirs = (
        reading(evaluate(results, categories, judged, files.params.matching, files.draws.seed), "coco.mAP")
        for results in (voted, own)
    )
    if ours is None or theirs is None:
        return None
    return Reading(ours.value - theirs.value, ours.samples_B - theirs.samples_B, ours.n_images)


def _n_begun(result: ImageResult) -> int:
    return max(2, len(result.pred) // 2)


def _begun(sample: Sample, result: ImageResult, encoder: AnswerEncoder, seed: int) -> tuple[Sample, Any]:
    """The sample with the permuted first half of its answer at the end of its prompt; and the tokens of that half."""
    objects = [TextObject(p.desc, _bins(p)) for p in result.pred[: _n_begun(result)]]
    order = generator(seed, "probe/order", result.image_id).permutation(len(objects))
    if (np.diff(order) > 0).all():
        order = order[::-1]  # the original order would test nothing
    answer = encoder.encode([objects[i] for i in order])
    end = int(np.flatnonzero(answer.roles == Role.COORD)[-1]) + 1
    ids = answer.ids[:end]
    return replace(sample, prompt_ids=np.concatenate([sample.prompt_ids, ids])), ids


def _bins(prediction: Prediction) -> tuple[int, int, int, int]:
    if prediction.bins is None:
        raise DataError("the predictions have no bins, expected answers in coordinate tokens. Decode them again.")
    return prediction.bins


_Named = Sequence[tuple[str, tuple[int, int, int, int]]]


def _in_common(before: _Named, after: _Named) -> int:
    """The number of pairs with equal names and enough overlap, each object used once."""
    if not before or not after:
        return 0
    iou = pairwise_iou(*(decode_norm([bins for _, bins in side]) for side in (before, after)))
    names = [[normalise_desc(desc) for desc, _ in side] for side in (before, after)]
    same = np.array([[a == b for b in names[1]] for a in names[0]])
    return len(greedy_pairs(np.where(same, iou, 0.0), SAME_IOU)[0])


_COORDINATES: dict[str, tuple[str, Literal["higher", "lower", "neither"]]] = {
    "expected_bin_mae": ("bins", "lower"), "p_gt_mean": ("0..1", "higher"), "acc_top5": ("0..1", "higher"),
    "margin_mean": ("nats", "higher"), "coord_vocab_mass_mean": ("0..1", "higher"), "gate": ("nats", "lower"),
    "second_peak": ("0..1", "lower"), "mean_off_peak": ("0..1", "lower"),
    "coverage_50": ("0..1", "neither"), "coverage_90": ("0..1", "neither"),
}  # fmt: skip
READINGS = {
    **{
        f"coord.{name}": RunReading(
            "dev",
            f"{(MEANINGS | SHAPES)[name]}; mean over annotated coordinates of dev, after the last step",
            unit, better, _context_paths, partial(_coordinates, name), of_answers=False,
        )
        for name, (unit, better) in _COORDINATES.items()
    },
    "context.drift": RunReading(
        "dev",
        "error of coordinates on dev in the last forward of channel A minus the first, after the last step",
        "bins", "lower", _context_paths, _context_drift, of_answers=False,
    ),
    "trajectory.f1_with_map": RunReading(
        "dev",
        "correlation of F1 and mAP on dev over the kept steps of the stage", "-1..1", "neither", _step_paths,
        _f1_with_map,
    ),
    "order.agreement": RunReading(
        "val",
        "F1 between the rest of an answer and the rest generated after its first half in another order; IoU "
        f"{SAME_IOU:g}, names included",
        "0..1", "higher", _answer_paths, _order_agreement,
    ),
    "samples.recall_gain": RunReading(
        "val",
        f"recall at IoU .50 of an oracle over {SAMPLES} sampled answers per image minus the mean recall of one", "0..1",
        "higher", _answer_paths, _recall_gain,
    ),
    "samples.vote_gain": RunReading(
        "val",
        f"mAP of the objects that at least {SUPPORT} of {SAMPLES} sampled answers agree on minus mAP of the run's own "
        "answers",
        "0..1", "higher", _vote_paths, _vote_gain,
    ),
}  # fmt: skip
