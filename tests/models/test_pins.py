"""Only the pinned model is loaded; the pins that the product writes are accepted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from pipelines import decode, norm1000

from coordexp import cli
from coordexp.config.loading import load_profile
from coordexp.config.profile import ModelConfig, Profile
from coordexp.errors import CheckpointError
from coordexp.infra.provenance import answer_files
from coordexp.models import pins
from coordexp.models.pins import pinned_folder, write_pins
from coordexp.stage import stage_main

BASE = Path("models/qwen")


@pytest.fixture
def profile(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A production profile with a linked model, without pins, as it is distributed."""
    shutil.copytree(repository / "models" / "tiny-base", tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    (tmp_path / BASE).symlink_to(tmp_path / "elsewhere")
    text = (repository / "configs" / "coco-qwen3vl-4b.yaml").read_text()
    shutil.copytree(repository / "configs" / "base", tmp_path / "configs" / "base")
    file = tmp_path / "configs" / "mine.yaml"
    file.write_text(re.sub(r"(?m)^  path: \S+", f"  path: {BASE}", text))
    shutil.copy(repository / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return file


def model(profile: Path) -> ModelConfig:
    return load_profile(profile).model


@pytest.mark.parametrize("name", ["tiny", "smoke"])
def test_the_committed_profiles_pin_the_embedded_model(repository: Path, name: str, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    config = model(repository / "configs" / f"{name}.yaml")
    assert pinned_folder(config, name) == Path("models/tiny-base")


def test_pinning_changes_only_the_pins_and_they_are_valid(profile: Path) -> None:
    before = profile.read_text().splitlines()
    assert model(profile).files is None
    write_pins(profile)
    after = profile.read_text().splitlines()
    at = next(i for i, line in enumerate(before) if line.startswith("  path:")) + 1
    assert after[:at] == before[:at]
    assert [line for line in after[at:] if not line.startswith("  ")] == before[at:]
    assert after[at] == "  files:"
    assert pinned_folder(model(profile), "mine") == BASE
    write_pins(profile)
    assert profile.read_text().splitlines() == after


def test_a_profile_with_an_inherited_model_pins_it_in_its_own_file(profile: Path) -> None:
    child = profile.with_name("child.yaml")
    child.write_text("extends: mine\nstage1:\n  steps: 1000\n")
    write_pins(child)
    assert model(profile).files is None
    assert pinned_folder(model(child), "child") == BASE


def edited(name: str) -> Callable[[], None]:
    """An edit of the same size, which only the hash detects."""
    return lambda: (BASE / name).write_bytes((BASE / name).read_bytes()[:-1] + b"~")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edited("model.safetensors"), r"qwen/model\.safetensors: found sha256 [0-9a-f]{64}, expected 5,770,872 bytes"),
        (edited("tokenizer.json"), r"qwen/tokenizer\.json: found sha256"),
        (edited("chat_template.jinja"), r"qwen/chat_template\.jinja: found sha256"),
        (lambda: (BASE / "config.json").write_text("{}"), r"qwen/config\.json: found 2 bytes, expected [\d,]+ bytes"),
        (lambda: (BASE / "generation_config.json").unlink(), r"qwen/generation_config\.json: found no file"),
        (lambda: (BASE / "adapter_config.json").write_text("{}"), r"adapter_config\.json: found a file .* no pin"),
        (lambda: (BASE / "model-2.safetensors").write_text(""), r"model-2\.safetensors: found a file .* no pin"),
        (lambda: shutil.rmtree(BASE.resolve()), r"models/qwen: no such folder"),
    ],
)
def test_another_model_is_refused_with_instructions(profile: Path, change, words: str) -> None:
    write_pins(profile)
    change()
    with pytest.raises(CheckpointError, match=words) as caught:
        pinned_folder(model(profile), "mine")
    assert "coordexp doctor --pin --profile mine" in str(caught.value) or "set model.path" in str(caught.value)


def test_files_that_do_not_affect_answers_may_change(profile: Path) -> None:
    write_pins(profile)
    (BASE / "README.md").write_text("a note")
    (BASE / "train_loss.tsv").unlink()
    (BASE / "._model.safetensors").write_text("left by a file manager")
    assert pinned_folder(model(profile), "mine") == BASE


@pytest.mark.parametrize(("stage", "names"), [(norm1000, ()), (decode, ("base",))])
def test_the_stages_that_load_the_model_stop(
    profile: Path, stage: ModuleType, names: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*names, "--profile", "mine"]
    assert stage_main(stage.run, arguments, names) == 2
    assert "model.files is null" in capfd.readouterr().err
    write_pins(profile)
    edited("model.safetensors")()
    assert stage_main(stage.run, arguments, names) == 2
    error = capfd.readouterr().err
    assert "model.safetensors: found sha256" in error
    assert "`coordexp doctor --pin --profile mine`" in error


def doctor(*options: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--profile", "mine", *options])
    return int(stopped.value.code or 0)


def test_the_doctor_stops_at_another_model_and_pins_on_demand(profile: Path, capfd) -> None:
    assert doctor() == 2
    assert "STOP: model: configs/mine.yaml: model.files is null" in capfd.readouterr().out
    doctor("--pin")
    shown = capfd.readouterr()
    assert "STOP: model" not in shown.out
    assert f"pinned {len(answer_files(BASE))} files of the model in configs/mine.yaml" in shown.err
    edited("tokenizer.json")()
    assert doctor() == 2
    assert "tokenizer.json: found sha256" in capfd.readouterr().out
    shutil.rmtree(BASE.resolve())
    assert doctor("--pin") == 2
    assert "there is no model to pin" in capfd.readouterr().err


def test_the_temporary_copy_of_an_experiment_finds_the_model_of_the_repository(
    profile: Path, tmp_path, monkeypatch
) -> None:
    write_pins(profile)
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert pinned_folder(model(profile), "mine") == tmp_path / BASE


def test_a_large_file_is_hashed_again_only_after_a_change(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = pins.file_sha256
    monkeypatch.setattr(pins, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    monkeypatch.setattr(pins, "_REMEMBERED_BYTES", 1 << 20)  # the weights are bigger
    monkeypatch.setattr(pins, "_SETTLED_SECONDS", -1.0)
    write_pins(profile)
    assert hashed.count("model.safetensors") == 1
    pinned_folder(model(profile), "mine")
    assert hashed.count("model.safetensors") == 1
    edited("model.safetensors")()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: found sha256"):
            pinned_folder(model(profile), "mine")
    assert hashed.count("model.safetensors") == 2
    [memory] = Path(".resume").iterdir()
    memory.write_text("[broken")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found sha256"):
        pinned_folder(model(profile), "mine")


@pytest.mark.parametrize("files", [{}, {"../config.json": {"bytes": 1, "sha256": "0" * 64}}, {"a": {"bytes": 1}}])
def test_invalid_pins_are_refused(repository: Path, files) -> None:
    tree = load_profile(repository / "configs" / "smoke.yaml").model_dump()
    tree["model"]["files"] = files
    with pytest.raises(ValueError, match="files"):
        Profile.model_validate(tree)
