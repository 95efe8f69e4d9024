"""The GPU check: independent sections, no lost results, and few required packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_check import run as runner
from benchmarks.gpu_check.__main__ import NO_GPU, SECTIONS, main
from benchmarks.gpu_check.predictions import Prediction, predictions
from benchmarks.gpu_check.results import RESULTS, TABLE, Result, markdown, read
from benchmarks.gpu_check.run import Check, Section
from benchmarks.gpu_check.shapes import build, config_of, criterion, pack_of, step_flops
from packaging.requirements import Requirement
from torch.utils.flop_counter import FlopCounterMode

from coordexp.models.attention import use_segment_attention
from coordexp.reporting import gpu_tables
from coordexp.training.step import micro_batch

CPU = torch.device("cpu")
# What the machine has, and the wheels that are carried to it at least (benchmarks/gpu_check/requirements.txt).
THERE = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy", "pyarrow", "pillow",
         "scipy", "matplotlib", "jinja2", "pyyaml", "pytest", "hypothesis")  # fmt: skip
CARRIED = ("pydantic", "ruamel.yaml")


def check_of(tmp_path: Path, deadline: float = 60.0) -> Check:
    return Check(CPU, tmp_path, deadline, True, {("good", "speed"): Prediction(2.0, "guess")})


def section(name: str, run: Callable[[Check], None], seconds: float = 1.0) -> Section:
    return Section(name, seconds, run)


def good(check: Check) -> None:
    check.add("speed", 3.0, "s")


def raises(error: BaseException) -> Callable[[Check], None]:
    def run(check: Check) -> None:
        check.add("first part", 1.0, "s")
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such thing\nsecond line"), "ValueError: no such thing"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "OutOfMemoryError: CUDA out of mem"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_section_that_fails_is_a_line_and_the_next_one_runs(tmp_path, error, words):
    assert check_of(tmp_path).run([section("bad", raises(error)), section("good", good)]) == []
    first, failed, last = read(tmp_path)
    assert (first.name, first.value, first.is_fault) == ("first part", 1.0, False)
    assert failed.status == "failed"
    assert failed.note.startswith(words)
    assert failed.is_fault
    assert (last.section, last.value) == ("good", 3.0)


def test_parts_of_a_section_fail_by_themselves(tmp_path):
    def run(check: Check) -> None:
        with check.part("bad"):
            raise ValueError
        with check.part("of others", is_ours=False):
            raise ValueError
        good(check)

    check_of(tmp_path).run([section("parts", run)])
    found = [(r.name, r.status, r.is_fault) for r in read(tmp_path)]
    assert found == [("bad", "failed", True), ("of others", "skipped", False), ("speed", "measured", False)]


def test_sections_that_do_not_fit_before_the_deadline_are_skipped(tmp_path):
    check_of(tmp_path, deadline=5.0).run([section("long", good, seconds=6.0), section("short", good)])
    long, short = read(tmp_path)
    assert (long.status, short.status) == ("skipped", "measured")
    assert "6 s are needed" in long.note
    assert not long.is_fault


def test_a_section_is_stopped_at_the_deadline_and_keeps_its_results(tmp_path):
    def run(check: Check) -> None:
        good(check)
        with check.part("inner"):
            while True:
                time.sleep(0.01)

    check_of(tmp_path, deadline=0.3).run([section("endless", run, seconds=0.1), section("late", good)])
    found, cut, late = read(tmp_path)
    assert found.value == 3.0
    assert (cut.name, cut.status) == ("all", "failed")
    assert cut.note.startswith("cut after")
    assert late.status == "skipped"


def test_a_section_without_its_packages_is_skipped(tmp_path):
    check_of(tmp_path).run([Section("needy", 1.0, good, ("no_such_package", "torch"))])
    (found,) = read(tmp_path)
    assert (found.status, found.note) == ("skipped", "needs no_such_package")


def test_after_a_lost_device_another_process_runs_the_remaining_sections(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "is_usable", lambda _: False)
    others = [section("b", good), section("c", good)]
    assert check_of(tmp_path).run([section("a", raises(RuntimeError("illegal access"))), *others]) == others


def test_predictions_are_shown_only_with_figures_of_a_gpu(tmp_path):
    small, large = check_of(tmp_path / "small"), check_of(tmp_path / "large")
    large.small = False
    for check in (small, large):
        check.run([section("good", good)])
    assert [r.prediction for r in (*small.results, *large.results)] == [None, 2.0]
    assert "| good | speed | 3 | 2 (guess) | 1.50 | s |" in markdown(large.results)


@pytest.mark.parametrize(("value", "is_fault"), [(0.5, False), (1.0, False), (1.1, True), (float("nan"), True)])
def test_beyond_the_bound_is_a_fault(value, is_fault):
    assert Result(section="a", name="b", status="measured", value=value, at_most=1.0).is_fault == is_fault


def test_the_last_figure_of_a_name_counts(tmp_path):
    for value in (1.0, 2.0):
        check = check_of(tmp_path)
        check.run([section("good", lambda check, value=value: check.add("speed", value, "s"))])
    assert [r.value for r in read(tmp_path)] == [2.0]
    assert len((tmp_path / RESULTS).read_text().splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_reports_it(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == NO_GPU
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_prediction_belongs_to_a_section():
    assert {name for name, _ in predictions()} <= {section.name for section in SECTIONS}
    assert all(found.value > 0 for found in predictions().values())


def test_the_documents_show_figures_that_are_measured():
    shown = {(plan.step[0], f"{plan.step[1]}: step") for plan in gpu_tables._PLANS} | {gpu_tables._DECODED}
    shown |= {(name[0], f"{name[1]}: peak") for *_, name in gpu_tables._ONE_DEVICE if name}
    assert shown <= predictions().keys()


def test_operations_of_a_step_are_those_that_torch_counts():
    """With activations kept; torch counts masked halves of causal attention, and pads its segments to one length."""
    config = config_of("2b", small=True)
    model, pack = use_segment_attention(build(config, CPU)).train(), pack_of(config, 400, small=True)
    with FlopCounterMode(display=False) as counter:
        micro_batch(model, criterion(1), pack.batch, pack.counts).loss.backward()
    text = config.text_config
    masked = 6 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    masked *= sum(length**2 for length in pack.batch.segments)
    assert step_flops(model, pack.batch) + masked == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_it_runs_on_the_packages_of_the_machine(tmp_path, repository):
    """All other distributions of this environment are out of reach; sections that need more are left out."""
    site = tmp_path / "site"
    link_distributions(site, [*THERE, *CARRIED])
    environment = {"PYTHONPATH": f"{site}:{repository / 'src'}:{repository}", "PATH": os.environ["PATH"]}
    options = ["--cpu", "--out", str(tmp_path / "out"), "--only", "ceilings", "head-exact", "state", "graph"]
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_check", *options]
    done = subprocess.run(
        command, cwd=repository, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / RESULTS).read_text().splitlines()]
    assert {row["section"] for row in rows} == {"ceilings", "head-exact", "state", "graph"}, done.stderr
    (left_out,) = (row for row in rows if row["status"] != "measured")
    assert (left_out["section"], left_out["note"]) == (
        "graph", "needs pandas, skimage, pycocotools, faster_coco_eval"
    )  # fmt: skip
    assert done.returncode == 1  # on a CPU nothing may be left out
    assert (tmp_path / "out" / TABLE).read_text().startswith("# CPU")


def test_carried_packages_have_the_versions_of_the_lock(repository):
    carried = (repository / "benchmarks" / "gpu_check" / "requirements.txt").read_text().splitlines()
    locked = {line.split()[0] for line in (repository / "requirements.lock").read_text().splitlines()}
    assert {line for line in carried if not line.startswith("#")} <= locked


def link_distributions(site: Path, names: Iterable[str]) -> None:
    """A folder that holds what these distributions and all that they require have installed."""
    site.mkdir()
    root = Path(sysconfig.get_path("purelib"))
    for name in closure(names):
        tops = {file.parts[0] for file in distribution(name).files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(root / top)


def closure(names: Iterable[str]) -> set[str]:
    """The distributions and what they require, as far as it is installed, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            needs = [Requirement(text) for text in required]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found
