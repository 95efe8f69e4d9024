"""`check` and the files in `inputs/`: parameters and code of each stage. That it reads just these: test_cuts.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pipelines import check, pack
from ruamel.yaml import YAML

from coordexp.config.loading import load_params, load_profile, read_yaml
from coordexp.config.paths import ProfilePaths
from coordexp.config.run import RunConfig
from coordexp.errors import ConfigError
from coordexp.infra.code_hash import Modules
from coordexp.inputs import PARAMS_FILE, StageTable, declarations
from coordexp.stage import stage_main
from source_tree import ROOT

STAGES = {stage.stage: stage for stage in declarations(ROOT)}
COMMITTED = sorted(path.name for path in (ROOT / "inputs").iterdir())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parameters, entries and sources of this repository, with the smoke profile chosen, as working directory."""
    no_caches = shutil.ignore_patterns("__pycache__", "base")
    for folder in ("configs", "pipelines", "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=no_caches)
    params = (ROOT / PARAMS_FILE).read_text()
    (tmp_path / PARAMS_FILE).write_text(re.sub(r"(?m)^profile: \S+", "profile: smoke", params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def told(root: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (root / "inputs" / "smoke").iterdir()}


@pytest.mark.parametrize("profile", COMMITTED)
def test_committed_inputs_match_sources_and_parameters(profile: str) -> None:
    params = load_params(ROOT / PARAMS_FILE).model_copy(update={"profile": profile})
    now = StageTable.of(ROOT).inputs(params, load_profile(ROOT / "configs" / f"{profile}.yaml"))
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / "inputs" / profile).iterdir()}
    assert found == now, "stale: `dvc repro --single-item check`, then see with `dvc status` what else is"


def test_no_file_contains_a_path_of_this_machine(root: Path) -> None:
    profile = read_yaml(root / "configs" / "smoke.yaml")
    profile["model"]["path"] = str(ROOT / "models" / "tiny-base")
    YAML().dump(profile, root / "configs" / "smoke.yaml")
    assert stage_main(check.run, []) == 0
    assert not [name for name, text in told(root).items() if str(ROOT).encode() in text or str(root).encode() in text]


def test_only_changed_files_are_written(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stage_main(check.run, []) == 0
    before, folder = told(root), root / "inputs" / "smoke"
    assert before.keys() == STAGES.keys()
    (folder / "gone.json").write_text("{}")  # of a stage that there was once
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.stem in STAGES}
    params = (root / PARAMS_FILE).read_text()
    (root / PARAMS_FILE).write_text(params.replace("softce_weight: 1.0", "softce_weight: 0.2", 1) + "# a comment\n")
    assert stage_main(check.run, []) == 0
    assert {name for name, text in told(root).items() if text != before[name]} == {"stage2", "report"}
    touched = {path.stem for path in folder.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert touched == {"stage2", "report"}


def test_a_comment_or_a_docstring_in_every_file_changes_nothing(root: Path) -> None:
    before = StageTable.of(root).code
    for file in [*root.glob("src/**/*.py"), *root.glob("pipelines/*.py")]:
        text = re.sub(r'(:\n +""")', r"\1Edited. ", file.read_text()).replace(
            " -> None:\n", " -> None:\n    # edited\n\n"
        )
        file.write_text(f"# edited\n\n{text}\n")
    assert StageTable.of(root).code == before


@pytest.mark.parametrize(
    ("module", "reached"),
    [
        ("coordexp.reporting.gallery", {"report"}),
        ("coordexp.evaluation.coco", {"coco-eval", "report"}),
        ("coordexp.rollout.rescore", {"rollout", "decode", "stage1", "stage2", "stage1-control"}),
        ("coordexp.rollout.confidence", {*STAGES} - {"raw", "convert", "norm1000", "pack"}),
        ("coordexp.training.stage2", {"stage2"}),
        ("coordexp.training.loop", {"stage1", "stage2", "stage1-control"}),
        ("coordexp.config.removed", set()),
        ("coordexp.config.loading", set()),
        ("coordexp.cli", set()),
        ("coordexp.stage", set(STAGES)),
    ],
)
def test_an_edit_reaches_the_stages_that_import_the_module(root: Path, module: str, reached: set[str]) -> None:
    before = StageTable.of(root).code
    file = Modules.below(root / "src").files[module]
    file.write_text(file.read_text() + "\nEDITED = 1\n")
    after = StageTable.of(root).code
    assert {stage for stage in STAGES if before[stage] != after[stage]} == reached


def test_the_hash_sees_every_import() -> None:
    # What the package loads on demand; is a library there.
    allowed = {"coordexp", "coordexp.evaluation.categories", "coordexp.losses.vocabulary_terms"}
    for name, file in Modules.below(ROOT / "src").files.items():
        if name not in allowed:
            assert not re.search(r"import_module|__import__|importlib\.util", file.read_text()), name


def test_a_stage_refuses_parameters_or_code_that_differ_from_its_inputs(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert stage_main(check.run, []) == 0
    profile = (root / "configs" / "smoke.yaml").read_text()
    (root / "configs" / "smoke.yaml").write_text(profile.replace("pack_tokens: 256", "pack_tokens: 512"))
    assert stage_main(pack.run, []) == 2
    error = capfd.readouterr().err
    assert (
        "inputs/smoke/pack.json: configs/smoke.yaml:packing.pack_tokens is 256 in this file, but now it is 512."
        in error
    )
    assert "dvc repro --single-item check" in error
    (root / "configs" / "smoke.yaml").write_text(profile.replace("steps: 4", "steps: 5"))  # not of this stage
    with pytest.raises(FileNotFoundError, match=r"train\.parquet"):  # it began
        stage_main(pack.run, [])
    with (root / "src" / "coordexp" / "packing" / "planner.py").open("a") as file:
        file.write("\nEDITED = 1\n")
    assert stage_main(pack.run, []) == 2
    assert "inputs/smoke/pack.json: code is" in capfd.readouterr().err


def test_a_table_with_unknown_stages_or_keys_is_refused(root: Path) -> None:
    table = root / "pipelines" / "inputs.yaml"
    text = table.read_text()
    for old, new, words in (
        ("pack:", "packs:", r"inputs\.yaml: packs: there is no module 'pipelines\.packs'"),
        ("[packing]", "[packings]", r"pack: configs/smoke\.yaml has no 'packings'\."),
        (
            "[seed, text]",
            "[seed, texts]",
            r"norm1000: params\.yaml has no 'texts'\.",
        ),
    ):
        table.write_text(text.replace(old, new, 1))
        context = RunConfig(
            params=load_params(root / PARAMS_FILE),
            profile=load_profile(root / "configs" / "smoke.yaml"),
            paths=ProfilePaths("smoke"),
        )
        with pytest.raises(ConfigError, match=words):
            check.run(context)


def test_check_does_not_load_the_tensor_library(root: Path) -> None:
    program = (
        "import sys; from pipelines import check; from coordexp.stage import stage_main; "
        "stage_main(check.run, []); sys.exit(bool({'torch', 'transformers', 'numpy', 'pandas'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=root, env={"PYTHONPATH": f"src:{root}"}, check=True)
