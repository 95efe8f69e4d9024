"""The report as a reader gets it: true numbers, real pictures, the same bytes again, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from coordexp.config.paths import CHECKPOINTS
from coordexp.errors import DataError
from coordexp.evaluation.bootstrap import interval
from coordexp.evaluation.comparison import reading
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.measures import MEASURES
from coordexp.evaluation.registry import VIEWS
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import read_results
from coordexp.reporting.asked import ASKED
from coordexp.reporting.decision import DIFFERENCES, EXAMPLES, MAX_BYTES, MAX_FILES, MAX_LINES
from coordexp.reporting.inputs import TRAINED, Baseline, ReportInputs
from coordexp.reporting.method import METHOD
from coordexp.reporting.questions import ANSWERS
from coordexp.reporting.report import DETAILS, FOLDERS, PAGE, SUBJECTS, Content, build_report
from reporting.synthetic import changed, everything_to_say, write_json, write_record

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def rows_of(markdown: str, first_header: str) -> list[list[str]]:
    """Body cells of every pipe table whose header row starts with a cell."""
    rows: list[list[str]] = []
    inside = False
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if cells and cells[0].strip() == first_header:
            inside = True
        elif not cells:
            inside = False
        elif inside and not cells[0].startswith(":"):
            rows.append(cells)
    return rows


def rounds_to(cell: str, values: list[float]) -> bool:
    """Whether a cell shows these numbers, each rounded to the digits that it is shown with."""
    shown = NUMBER.findall(cell)
    return len(shown) == len(values) and all(is_rounded(text, value) for text, value in zip(shown, values, strict=True))


def is_rounded(text: str, value: float) -> bool:
    return abs(float(text) - value) <= 0.5001 * 10.0 ** -len(text.partition(".")[2])


def test_every_number_of_the_metric_tables_is_that_of_metrics_json(text: str, metrics: dict[str, Any]) -> None:
    rows = rows_of(text, "metric")
    checked = 0
    for key_cell, _meaning, *cells in rows:
        area, name = re.match(r"`([a-z0-9_]+)\.(\w+)`", key_cell).groups()
        for checkpoint, cell in zip(CHECKPOINTS, cells, strict=True):
            evaluated = metrics[checkpoint]["eval"]
            bounds = evaluated["interval"].get(f"{area}.{name}") or []
            value = evaluated[area][name]
            expected = ([] if value is None else [value]) + bounds
            assert rounds_to(cell, expected), (key_cell, checkpoint, expected)
            checked += 1
    assert checked >= 4 * 35


def test_measures_are_those_of_questions(inputs: ReportInputs, text: str) -> None:
    """The same statistic on the same resamples as an A/B test reads it."""
    params, categories = inputs.run.params, read_categories(inputs.categories)
    shown = {re.match(r"`(.+?)`", row[0]).group(1): row[2:] for row in rows_of(text, "measure")}
    assert shown.keys() == MEASURES.keys()
    results = list(read_results(inputs.evaluations / "stage2" / "gt_vs_pred.jsonl"))
    found = evaluate(results, categories, params.eval, params.matching, params.seed)
    for key, cells in shown.items():
        one = reading(found, key)
        bounds = one and interval(one.samples_B, one.value, is_share=MEASURES[key].unit == "0..1")
        assert rounds_to(cells[CHECKPOINTS.index("stage2")], [one.value, *(bounds or [])] if one else []), key


def test_every_number_of_the_comparison_table_is_that_of_metrics_json(text: str, metrics: dict[str, Any]) -> None:
    names = {"stage2 - stage1": "stage2_vs_stage1", "stage2 - stage1-control": "stage2_vs_control"}
    rows = [row for row in rows_of(text, "difference") if row[0] in names and "`" in row[1]]
    assert len(rows) == 2 * len(VIEWS["compared"])
    for pair, key, difference, chance, _reach, verdict in rows:
        compared = metrics["comparison"][names[pair]][key.strip("`")]
        assert rounds_to(difference, [compared[field] for field in ("delta", "lo", "hi")])
        assert rounds_to(chance, [compared["p_superior"]])
        excludes_zero = compared["lo"] > 0 or compared["hi"] < 0
        assert (verdict == "no difference shown") != excludes_zero


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_time_commit_and_machine_do_not_change_the_bytes_and_no_old_figure_stays(
    inputs: ReportInputs, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "12345.png").write_bytes(b"old")
    subprocess.run(["git", "init", "-q", tmp_path / "elsewhere"], check=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # a repository without a commit
    before = {stage: inputs.run.paths.run_record(stage).read_bytes() for stage in TRAINED}
    write_record(inputs, "stage1", commit="f" * 40, machine="aarch64", finished="2031-01-01T00:00:00")
    inputs.run.paths.run_record("stage2").unlink()
    build_report(inputs, tmp_path / "report")
    for stage, content in before.items():
        inputs.run.paths.run_record(stage).write_bytes(content)
    first, second = files_of(report.parent), files_of(tmp_path / "report")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_the_text_contains_no_time_machine_or_commit(text: str) -> None:
    for told in ("0123456789ab", "x86_64", "3.11.9", "210.5", "400.1", "2026-01-02", "seconds"):
        assert told not in text, told


def test_every_link_resolves_and_every_figure_is_shown(report: Path) -> None:
    """Page one shows what git holds, and nothing else; the rest is behind links, in what DVC holds."""
    shown: dict[bool, list[Path]] = {True: [], False: []}
    details = [report.parent / DETAILS / f"{subject}.md" for subject in SUBJECTS]
    for page in (report, *details):
        for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            found = (page.parent / target.partition("#")[0]).exists()
            assert found or (target == "../answers/" and ANSWERS.is_dir()), target  # the repository's, not of a profile
            if picture:
                shown[page == report].append((page.parent / target).resolve())
    present = {path.resolve() for path in report.parent.rglob("*.png")}
    assert set(shown[True]) == {path for path in present if path.parent.name == "pictures"}
    assert set(shown[False]) == present - set(shown[True])
    assert sum(path.parent.name == "gallery" for path in present) == 8
    assert {path.name for path in report.parent.iterdir()} == {PAGE, *FOLDERS}
    assert sorted(details) == sorted((report.parent / DETAILS).iterdir())
    assert {f"{DETAILS}/{name}.md" for name in SUBJECTS} <= set(re.findall(r"\]\(([^)#]+)", report.read_text()))


def test_files_in_git_are_small_and_keep_their_names(report: Path) -> None:
    pictures = list((report.parent / "pictures").iterdir())
    assert {DIFFERENCES, METHOD} <= {path.name for path in pictures} <= {DIFFERENCES, METHOD, ASKED, *EXAMPLES.values()}
    assert len(pictures) >= 4  # a rule may find no image of its kind
    assert len(pictures) <= MAX_FILES
    assert sum(path.stat().st_size for path in pictures) <= MAX_BYTES
    assert report.stat().st_size <= 10_000
    assert (report.parent / "pictures" / METHOD).stat().st_size <= 150_000  # the README shows it
    assert len(report.read_text(encoding="utf-8").splitlines()) <= MAX_LINES - 10  # for what may go wrong in a run


def test_every_number_of_page_one_is_in_the_details_or_metrics(report: Path, metrics: dict[str, Any]) -> None:
    """In the details, or in metrics.json, in as many digits or more."""
    details = "\n".join(path.read_text(encoding="utf-8") for path in (report.parent / DETAILS).iterdir())
    known = {float(n) for n in NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", details))}
    known |= {float(n) for n in NUMBER.findall(json.dumps(metrics))}
    page = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`|(?<=\d),(?=\d{3})", "", report.read_text(encoding="utf-8"))
    shown = [n for n in NUMBER.findall(page) if "." in n or len(n) > 2]
    assert len(shown) > 80
    assert [n for n in shown if not any(is_rounded(n, value) for value in known)] == []


def test_figures_are_small(report: Path) -> None:
    for path in report.parent.rglob("*.png"):
        with Image.open(path) as picture:
            assert max(picture.size) <= 2000
        assert path.stat().st_size <= 150_000, path.name


def test_the_first_line_of_an_experiment_gives_its_change_and_the_command(inputs: ReportInputs, report: Path) -> None:
    settings = changed(inputs.run.params, softce_weight=0.25).model_dump()
    baseline = Baseline("0123456789abcdef", "heavy-coat", settings)
    lines = Content.of(dataclasses.replace(inputs, baseline=baseline)).texts()[PAGE].splitlines()
    assert lines[0].startswith("**Experiment heavy-coat on 0123456**: `softce_weight` 0.25 -> 1.")
    assert "`coordexp compare 0123456 heavy-coat`" in lines[0]
    assert lines[2:] == report.read_text(encoding="utf-8").splitlines()


def test_the_markdown_is_well_formed(text: str) -> None:
    assert "{{" not in text
    assert "{%" not in text
    assert "nan" not in re.findall(r"[a-z]+", text)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<table>") >= 18
    assert "<p>|" not in html  # a table that did not parse is a paragraph of pipes
    titles = re.findall(r"^# (.*)$", text, flags=re.MULTILINE)
    assert len(titles) == len(set(titles)) == 1 + len(SUBJECTS)


class TestRefusals:
    """What is missing is named, with the stage that makes it; nothing is written."""

    def refused(self, inputs: ReportInputs, out: Path, **changes: Path) -> str:
        with pytest.raises(DataError) as caught:
            build_report(dataclasses.replace(inputs, **changes), out)
        assert not list(out.rglob("*"))
        return str(caught.value)

    def test_a_checkpoint_without_metrics(self, inputs: ReportInputs, metrics: dict[str, Any], tmp_path: Path) -> None:
        broken = tmp_path / "metrics.json"
        write_json(broken, {("stage-2" if name == "stage2" else name): value for name, value in metrics.items()})
        message = self.refused(inputs, tmp_path / "out", metrics=broken)
        assert str(broken) in message
        assert "'stage2'" in message
        assert "Did you mean 'stage-2'?" in message
        assert "dvc repro coco-eval" in message

    def test_a_metric_area_that_is_missing(self, inputs: ReportInputs, metrics: dict[str, Any], tmp_path: Path) -> None:
        cut = json.loads(json.dumps(metrics))
        del cut["base"]["eval"]["confidence"]
        write_json(tmp_path / "metrics.json", cut)
        message = self.refused(inputs, tmp_path / "out", metrics=tmp_path / "metrics.json")
        assert "base.eval lacks confidence" in message

    def test_predictions_that_are_missing(self, inputs: ReportInputs, tmp_path: Path) -> None:
        evaluations = tmp_path / "eval"
        shutil.copytree(inputs.evaluations, evaluations)
        shutil.rmtree(evaluations / "stage1-control")
        message = self.refused(inputs, tmp_path / "out", evaluations=evaluations)
        assert "stage1-control/gt_vs_pred.jsonl: no such file; the stage `coco-eval` writes it" in message

    def test_a_training_log_that_was_cut(self, inputs: ReportInputs, tmp_path: Path) -> None:
        runs = tmp_path / "runs"
        shutil.copytree(inputs.runs, runs, ignore=shutil.ignore_patterns("eval"))
        log = runs / "stage1" / "train_log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines()
        log.write_text("\n".join([*lines[:3], lines[3][:20]]), encoding="utf-8")
        assert f"{log}:4: not valid JSON" in self.refused(inputs, tmp_path / "out", runs=runs)

    def test_an_image_that_is_missing(self, inputs: ReportInputs, tmp_path: Path) -> None:
        message = self.refused(inputs, tmp_path / "out", image_root=tmp_path)
        assert re.search(r"images/val/\d+\.jpg: no such file", message)


def test_published_numbers_are_shown_only_with_the_data_they_cover(
    inputs: ReportInputs, text: str, metrics: dict[str, Any]
) -> None:
    assert "Rex-Omni" not in text
    source = inputs.run.profile.source.model_copy(update={"kind": "datasets"})
    run = dataclasses.replace(inputs.run, profile=changed(inputs.run.profile, source=source))
    text = everything_to_say(dataclasses.replace(inputs, run=run))
    ours = metrics["stage2"]["eval"]
    rows = [row for row in rows_of(text, "system") if row[0] == "**this run, stage2**"]
    by_protocol = {row[4]: row for row in rows[:2]}
    oracle, full = by_protocol["oracle-class"], by_protocol["full-vocabulary"]
    assert oracle[1:4] == [f"{ours['protocol'][f'positive_full_{k}']:.4f}" for k in ("50", "95", "mean")]
    assert full[-3:] == [f"{ours['coco'][k]:.4f}" for k in ("mAP", "AP50", "AP75")]
    assert oracle[-3:] == full[1:4] == [""] * 3, "no number under the other protocol"
