"""A production profile over a COCO folder with all its oddities: the real tokenizer, Qwen3-VL shrunken, every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pipelines import coco_eval, convert, decode, norm1000, pack, raw, report, rollout, stage1, stage1_control, stage2
from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

from coco_oddities import (
    CATEGORIES,
    CMYK,
    EMPTY,
    GRAYSCALE,
    LOSSES,
    TRAIN,
    TURNED_BY_EXIF,
    UPRIGHT_BY_EXIF,
    VAL,
    write_coco,
)
from coordexp import cli
from coordexp.config.loading import profile_tree, read_yaml
from coordexp.config.paths import CHECKPOINTS, ProfilePaths
from coordexp.models import loading
from coordexp.models.loading import TOKENIZER_FILES, load_checkpoint
from coordexp.models.pins import write_pins
from coordexp.models.sizes import build_shrunken, qwen3_vl_config
from coordexp.packing.samples import SampleStore
from coordexp.records.gt_vs_pred import read_results
from coordexp.records.schema import Record, read_records
from coordexp.stage import stage_main
from coordexp.text.vocabulary import has_coord_tokens
from helpers import save_model
from qwen import qwen3_tokenizer
from workspaces import content_hash

pytestmark = pytest.mark.slow
PROFILE = "coco-qwen3vl-2b"
STAGES = (raw, convert, norm1000, pack, stage1, rollout, stage2, stage1_control, decode, coco_eval, report)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[ProfilePaths]:
    """The folders of the profile after all stages ran in order."""
    root = tmp_path_factory.mktemp("production")
    write_coco(root / "datasets" / "coco")
    write_profile(repository, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(root))
        patch.chdir(root)
        patch.setattr(loading, "_load_tokenizer", tokenizers_kept(loading._load_tokenizer))
        write_base(Path(profile_tree(root / "configs" / f"{PROFILE}.yaml")["model"]["path"]))
        write_pins(root / "configs" / f"{PROFILE}.yaml")
        (root / "data").mkdir()
        for stage in STAGES:
            for name in CHECKPOINTS if stage is decode else ("",):
                assert stage_main(stage.run, [name] if name else [], CHECKPOINTS if name else ()) == 0, (
                    f"{stage.__name__} {name}"
                )
        yield ProfilePaths(PROFILE, root)


Load = Callable[[Path, Qwen3VLConfig], PreTrainedTokenizerBase]


def tokenizers_kept(load: Load) -> Load:
    """A loader that reads the same files once: for 150,000 tokens it takes seconds, in most stages several times.

    A base model's tokenizer is always read: stages add tokens to it.
    """
    kept: dict[str, PreTrainedTokenizerBase] = {}

    def loaded(folder: Path, config: Qwen3VLConfig) -> PreTrainedTokenizerBase:
        paths = (folder / name for name in ("tokenizer.json", *TOKENIZER_FILES))
        files = " ".join(content_hash(path) for path in paths if path.exists())
        if files in kept:
            return kept[files]
        tokenizer = load(folder, config)
        if has_coord_tokens(tokenizer):
            kept[files] = tokenizer
        return tokenizer

    return loaded


def write_base(folder: Path) -> None:
    """A random Qwen3-VL of the real family with the real vocabulary."""
    tokenizer = qwen3_tokenizer()
    model = build_shrunken(qwen3_vl_config("2b"), seed=3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_model(folder, model, tokenizer, 65_536, 16_777_216)  # Qwen3-VL's own limits, not those of the profile


def write_profile(repository: Path, root: Path) -> None:
    """The committed profile with sizes cut down; images that have another size than annotated are dropped."""
    profile = profile_tree(repository / "configs" / f"{PROFILE}.yaml")
    profile["model"] |= {"min_pixels": 4096, "max_pixels": 9216}
    profile["records"] |= {"dev_images": 6, "bad_images": "drop"}
    profile["packing"]["pack_tokens"] = 512
    profile["stage1"] |= {"steps": 2, "packs_per_step": 2, "warmup_steps": 1}
    profile["stage2"] |= {"steps": 4, "samples_per_step": 4, "warmup_steps": 1}
    profile["rollout"] |= {"images": 8, "batch_images": 8}
    profile["report"]["gallery_images"] = 4
    profile["launch"]["threads"] = 1
    params = read_yaml(repository / "params.yaml")
    params |= {"profile": PROFILE, "decode": params["decode"] | {"max_new_tokens": 24}}
    params["eval"] |= {"bootstrap_resamples": 100}
    (root / "configs").mkdir()
    YAML().dump(profile, root / "configs" / f"{PROFILE}.yaml")
    YAML().dump(params, root / "params.yaml")


def records(paths: ProfilePaths, split: str) -> list[Record]:
    return list(read_records(paths.records / f"{split}.jsonl"))


def test_every_loss_is_explained(paths: ProfilePaths) -> None:
    assert json.loads((paths.records / "drops.json").read_text()) == LOSSES
    lost = [json.loads(line) for line in (paths.records / "dropped.jsonl").read_text().splitlines()]
    assert len(lost) == sum(sum(reasons.values()) for reasons in LOSSES.values())
    assert all(row["file"].endswith(".json") and row["key"] for row in lost)
    counts = {split: len(records(paths, split)) for split in ("train", "dev", "val")}
    assert counts == {"train": TRAIN - 1 - 6, "dev": 6, "val": VAL}


def test_unusual_images_become_records_in_the_displayed_frame(paths: ProfilePaths) -> None:
    by_id = {r.metadata["image_id"]: r for split in ("train", "dev") for r in records(paths, split)}
    place_of = {9 + 31 * i: i for i in range(TRAIN)}
    by_place = {place_of[image_id]: record for image_id, record in by_id.items()}
    assert {GRAYSCALE, CMYK, UPRIGHT_BY_EXIF} <= by_place.keys()
    assert TURNED_BY_EXIF not in by_place
    assert by_place[EMPTY].objects == ()
    regions = [o for r in by_place.values() for o in r.objects if o.metadata.get("iscrowd")]
    assert sum("lost" not in o.metadata for o in regions) == 2  # the others are objects that could not be kept
    for record in by_place.values():
        for x1, y1, x2, y2 in (o.bbox_xyxy_px for o in record.objects):
            assert 0 <= x1 < x2 <= record.width
            assert 0 <= y1 < y2 <= record.height


def test_categories_keep_the_ids_of_the_source(paths: ProfilePaths) -> None:
    rows = json.loads((paths.records / "categories.json").read_text())
    assert {row["id"]: row["name"] for row in rows} == CATEGORIES
    assert [row["name"] for row in rows if row["split"] == "held_out"] == ["toothbrush"]


def test_the_vocabulary_is_that_of_qwen3_with_1000_more(paths: ProfilePaths) -> None:
    trained = load_checkpoint(paths.run("stage2"))
    assert trained.coord is not None
    assert (trained.coord.first_id, len(trained.tokenizer)) == (151_669, 152_669)
    rows = trained.model.get_input_embeddings().weight.shape[0]
    assert (rows % 128, rows >= 152_669, trained.model.config.tie_word_embeddings) == (0, True, True)
    assert trained.model.lm_head.weight is trained.model.get_input_embeddings().weight
    store = SampleStore(paths.norm1000 / "train.parquet")
    sample = next(s for s in store if s.descs)
    text = trained.tokenizer.decode(sample.answer_ids)
    assert text.startswith('{"objects": [{"desc": ')
    assert "<|coord_" in text


def test_every_checkpoint_is_evaluated_on_every_val_image(paths: ProfilePaths) -> None:
    metrics = json.loads(paths.metrics.read_text())
    for name in CHECKPOINTS:
        results = list(read_results(paths.evaluation(name) / "gt_vs_pred.jsonl"))
        assert {r.image_id for r in results} == {139 + 31 * i for i in range(VAL)}
        assert metrics[name]["eval"]["coco"]["n_images"] == VAL
    assert (paths.reports / "progress.md").read_text().strip()


def test_the_run_can_be_published(paths: ProfilePaths, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "published"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", "--params", str(paths.root / "params.yaml"), "--out", str(out)])
    assert not stopped.value.code, capfd.readouterr().err
    loaded = load_checkpoint(out)
    assert loaded.coord is not None
    results = json.loads((out / "coco_results.json").read_text())
    assert {row["image_id"] for row in results} <= {139 + 31 * i for i in range(VAL)}
    assert {row["category_id"] for row in results} <= CATEGORIES.keys()
    _, header, card = (out / "README.md").read_text().split("---\n", 2)
    assert YAML(typ="safe").load(header)["pipeline_tag"] == "image-text-to-text"
    assert f"On {VAL} images with" in card
    assert "coco (coco)" in card
    assert not list(out.glob("*.jsonl"))
