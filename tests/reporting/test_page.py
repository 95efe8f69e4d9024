"""The page to browse predictions: complete data, no network, nothing that text could break; then a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browser import Browser, find_browser
from coordexp import cli
from coordexp.errors import DataError
from coordexp.evaluation.evaluator import evaluate
from coordexp.evaluation.protocol import STANDARD, STANDARD_MATCHING, STANDARD_SEED
from coordexp.records.categories import Category
from coordexp.records.gt_vs_pred import GroundTruth, ImageResult, ParseReport, Prediction
from coordexp.reporting.page import TOTALS, PageSettings, page_data, write_page

EVIL = "</script><img src=x onerror=alert(1)>"
BOX, OFF, FAR = (10.0, 10.0, 50.0, 50.0), (11.0, 10.0, 51.0, 50.0), (60.0, 5.0, 90.0, 30.0)
CATEGORIES = [Category(1, "cat"), Category(2, "dog"), Category(3, EVIL)]


def prediction(desc: str, box: Any, score: float = 0.5) -> Prediction:
    spread = {"coord_sd_bins": (12.0, 3.0, 40.0, 5.0), "boxes_xyxy_px": {"expectation": box}}
    return Prediction(desc, box, (100, 125, 500, 625), (-1.0, -2.0, -3.0, -0.5), -0.1, score, **spread)


def answer(image_id: int, gt: list[tuple[str, Any]], pred: list[Prediction], *, ok: bool = True) -> ImageResult:
    return ImageResult(
        image_id, f"images/{image_id}.png", 100, 80, tuple(GroundTruth(d, b) for d, b in gt), tuple(pred), "{}",
        ParseReport(ok, len(pred)), "stop", 9,
    )  # fmt: skip


def runs() -> dict[str, list[ImageResult]]:
    """Image 1 right, 2 a duplicate pair, 3 a wrong name, 4 missed and not parsed, 5 an evil name."""
    cat = [("cat", BOX)]
    first = [
        answer(1, cat, [prediction("cat", OFF)]),
        answer(2, cat, [prediction("cat", BOX), prediction("cat", OFF)]),
        answer(3, cat, [prediction("dog", BOX)]),
        answer(4, [*cat, ("dog", FAR)], [], ok=False),
        answer(5, [(EVIL, FAR)], [prediction(EVIL, FAR)]),
    ]
    second = [answer(r.image_id, [(g.desc, g.bbox_xyxy_px) for g in r.gt], []) for r in first]
    return {"one": first, "two": second}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "images").mkdir()
    for n in range(1, 6):
        Image.new("RGB", (100, 80), (40 * n, 90, 120)).save(folder / "images" / f"{n}.png")
    records = [{"stage": "stage2", "git": {"commit": "abc123", "dirty": True}, "wall_seconds": 61.4}, {"stage": EVIL}]
    write_page(runs(), CATEGORIES, folder, folder / "page.html", records=records)
    return folder / "page.html"


@pytest.fixture
def foreign(page: Path, tmp_path: Path) -> list[str]:
    """Options that name annotations, images and three files of other detectors, all of them right."""
    first = runs()["one"]
    images = [{"id": r.image_id, "file_name": r.image, "width": 100, "height": 80} for r in first]
    rows = [
        {"image_id": r.image_id, "category_id": 1, "bbox": [10, 10, 40, 40], "area": 900}
        for r in first for g in r.gt if g.desc == "cat"
    ]  # fmt: skip
    truth = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "t.json").write_text(json.dumps(truth))
    found = [{"desc": "Katze", "bbox_xyxy_px": [10, 10, 50, 50], "score": 0.5}]
    lines = [{"image": r.image, "objects": found} for r in first if any(g.desc == "cat" for g in r.gt)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("yolo", "rex"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**row, "score": 0.5} for row in rows]))
    (tmp_path / "labels.json").write_text('{"Katze": "cat"}')
    files = [str(tmp_path / name) for name in ("yolo.json", "rex.json", "raw.jsonl")]
    return ["--truth", str(tmp_path / "t.json"), "--labels", str(tmp_path / "labels.json"),
            "--images", str(page.parent), "--predictions", *files]  # fmt: skip


class Elements(HTMLParser):
    """Tags with their attributes, and the text of every script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


class TestWithoutABrowser:
    def test_the_data_give_the_error_type_of_every_box(self) -> None:
        data = page_data(runs(), CATEGORIES, STANDARD, limit=10)
        assert (data["labels"], data["names"]) == (["one", "two"], sorted(["cat", "dog", EVIL]))
        fates = [[p["cause"] for p in image["runs"][0]["pred"]] for image in data["images"]]
        assert fates == [["right"], ["right", "duplicate"], ["classification"], [], ["right"]]
        counts = [[image["runs"][0][key] for key in ("f1", "dup", "fp", "miss")] for image in data["images"]]
        assert counts == [[1, 0, 0, 0], [0.667, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 2], [1, 0, 0, 0]]
        wrong = data["images"][2]["runs"][0]["pred"][0]
        assert (wrong["object"], wrong["sd"], wrong["logprob"]) == (0, [12, 3, 40, 5], [-1, -2, -3, -0.5])
        assert [p["object"] for p in data["images"][1]["runs"][0]["pred"]] == [0, 0]

    def test_a_limit_keeps_the_lowest_f1_and_reports_the_total(self) -> None:
        data = page_data(runs(), CATEGORIES, STANDARD, limit=3)
        assert [image["id"] for image in data["images"]] == [2, 3, 4]
        assert data["n_all"] == 5

    def test_nothing_is_fetched_and_no_text_ends_the_script(self, page: Path) -> None:
        text = page.read_text(encoding="utf-8")
        elements = Elements(text)
        assert [tag for tag, _ in elements.tags].count("script") == len(elements.scripts) == 2
        assert not [a for _, a in elements.tags if {"src", "href"} & a.keys()]
        assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"http://www\.w3\.org/2000/svg", "", text))
        assert EVIL not in text
        data = json.loads(elements.scripts[0])
        assert EVIL in data["names"]
        assert data["provenance"][0] == ["stage2", "abc123, with uncommitted changes", "", "61", "", ""]
        assert all(image["src"].startswith("data:image/jpeg;base64,") for image in data["images"])

    def test_every_element_that_the_script_looks_up_is_there(self, page: Path) -> None:
        elements = Elements(page.read_text(encoding="utf-8"))
        ids = {attributes["id"] for _, attributes in elements.tags if "id" in attributes}
        assert set(re.findall(r'getElementById\("(\w+)"\)', elements.scripts[1])) <= ids
        assert "innerHTML" not in elements.scripts[1]

    def test_wrong_input_is_refused(self, page: Path, tmp_path: Path) -> None:
        one = runs()["one"]
        with pytest.raises(DataError, match="one to 6"):
            write_page({str(n): one for n in range(7)}, CATEGORIES, page.parent, tmp_path / "x.html")
        with pytest.raises(DataError, match=r"1\.png: no such file.* --images"):
            write_page({"one": one}, CATEGORIES, tmp_path, tmp_path / "x.html")
        with pytest.raises(DataError, match="different images"):
            write_page({"one": one, "few": one[:2]}, CATEGORIES, page.parent, tmp_path / "x.html")

    def test_totals_are_those_of_the_evaluator(self) -> None:
        data = page_data(runs(), CATEGORIES, STANDARD, limit=10)
        found = evaluate(runs()["one"], CATEGORIES, STANDARD, STANDARD_MATCHING, STANDARD_SEED)
        for key, (_, value, low, high) in zip(TOTALS, data["totals"][0], strict=True):
            assert [value, low, high] == [round(v, 3) for v in (found.value(key), *found.metrics["interval"][key])]

    def test_detectors_of_others_are_browsed_by_the_command(self, foreign: list[str], tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as done:
            cli.main(["report", "--html", str(tmp_path / "p.html"), *foreign])
        assert done.value.code == 0
        data = json.loads(Elements((tmp_path / "p.html").read_text(encoding="utf-8")).scripts[0])
        assert data["labels"] == ["yolo", "rex", "raw"]
        assert [totals[0][1] for totals in data["totals"]] == [1.0, 1.0, 1.0]

    def test_incomplete_options_are_refused(self, foreign: list[str], capfd: pytest.CaptureFixture[str]) -> None:
        truth = foreign.index("--truth")
        for words, arguments in {
            "together": foreign[:truth] + foreign[truth + 2 :],
            "add --truth": ["--form", "qwen3-vl", "--images", foreign[foreign.index("--images") + 1], foreign[-1]],
        }.items():
            with pytest.raises(SystemExit) as done:
                cli.main(["report", "--html", "p.html", *arguments])
            assert done.value.code == 2
            assert words in capfd.readouterr().err

    def test_images_are_no_larger_than_the_option_allows(self, page: Path, tmp_path: Path) -> None:
        small = write_page(
            {"one": runs()["one"]}, CATEGORIES, page.parent, tmp_path / "x.html", page=PageSettings(2, 16)
        )
        assert small < page.stat().st_size
        assert small < 30_000


ROWS = "[...document.querySelectorAll('#images tbody tr')].map(r => Number(r.dataset.id))"
HEAD = "[...document.querySelectorAll('#images th')].find(h => h.textContent === '{}')"
ROW = "document.querySelector('#images tr[data-id=\"{}\"]')"
PICTURES = "[...document.querySelectorAll('svg.picture')]"
BOXES = "document.querySelectorAll('figure.run')[0].querySelectorAll('svg.picture rect').length"
RESET = "document.getElementById('reset')"


def choose(browser: Browser, control: str, value: str) -> None:
    event = "input" if control == "score" else "change"
    browser.evaluate(
        f"{{ const s = document.getElementById('{control}'); s.value = {json.dumps(value)}; "
        f"s.dispatchEvent(new Event('{event}')); }}"
    )


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on the path; apt-get install chromium")
class TestInABrowser:
    @pytest.fixture
    def browser(self, page: Path) -> Iterator[Browser]:
        with Browser(str(find_browser())) as browser:
            browser.open(page)
            yield browser

    def test_a_user_sorts_filters_and_opens_an_image(self, browser: Browser) -> None:
        assert browser.evaluate(ROWS) == [3, 4, 2, 1, 5]  # by F1 of the first run, lowest first
        browser.click(HEAD.format("FN 1"))
        assert browser.evaluate(ROWS)[0] == 4
        browser.click(HEAD.format("FN 1"))
        assert browser.evaluate(ROWS)[-1] == 4
        for failure, expected in {
            "duplicates": [2],
            "classification errors": [3],
            "background false positives": [],
            "answers with parse errors": [4],
            "first run better": [1, 2, 5],
            "no error": [],  # the second run has none right
        }.items():
            choose(browser, "failure", failure)
            assert sorted(browser.evaluate(ROWS)) == expected, failure
        browser.click(RESET)
        choose(browser, "name", "dog")
        assert sorted(browser.evaluate(ROWS)) == [3, 4]
        browser.click(RESET)
        browser.click(ROW.format(2))
        assert browser.evaluate("document.querySelector('#right h1').textContent").startswith("images/2.png (id 2")
        assert browser.evaluate("document.querySelectorAll('figure.run').length") == 2
        assert browser.evaluate(BOXES) == 2
        browser.click("document.querySelector('figure.run summary')")
        row = "document.querySelector('figure.run details').querySelectorAll('tr')[1]"
        cells = f"[...{row}.cells].map(c => c.textContent)"
        assert browser.evaluate(cells)[:4] == ["x1", "100", "-1.00", "100 ± 12.0"]  # mean: 10 of 100 px
        tops = f"{PICTURES}.map(f => Math.round(f.getBoundingClientRect().top))"
        assert len(set(browser.evaluate(tops))) == 1  # annotation and both runs side by side, whatever the captions

    def test_a_run_is_selected_by_name_and_marks_the_annotations(self, browser: Browser) -> None:
        browser.click(ROW.format(1))
        dashed = "document.querySelectorAll('figure.truth rect.dashed').length"
        assert browser.evaluate(dashed) == 0
        browser.click("document.querySelectorAll('#totals td:first-child')[1]")
        assert browser.evaluate("document.getElementById('run').value") == "two"
        assert browser.evaluate(dashed) == 1
        caption = browser.evaluate("document.querySelector('figure.truth figcaption').textContent")
        assert "found or missed by two" in caption
        assert browser.evaluate(HEAD.format("FN 2") + ".title") == "false negatives, two"
        choose(browser, "failure", "duplicates")
        assert browser.evaluate(ROWS) == []  # they are of the other run

    def test_boxes_outside_the_filter_are_faint(self, browser: Browser) -> None:
        browser.click(ROW.format(2))
        faded = f"{PICTURES}.map(s => [...s.querySelectorAll('rect')].map(r => r.classList.contains('faded')))"
        assert browser.evaluate(faded) == [[False], [False, False], []]
        choose(browser, "failure", "duplicates")
        assert browser.evaluate(faded) == [[False], [True, False], []]  # and the object that they are of
        browser.click(RESET)
        browser.click(ROW.format(4))
        choose(browser, "size", "small objects")
        assert browser.evaluate(faded)[0] == [True, False]  # the cat is of medium size

    def test_score_and_size_filters_are_in_the_address(self, browser: Browser, page: Path) -> None:
        browser.click(ROW.format(2))
        assert browser.evaluate(BOXES) == 2
        choose(browser, "score", "0.6")
        assert browser.evaluate(BOXES) == 0
        words = "document.querySelector('figure.run figcaption').textContent"
        assert "0 correct, 0 FP, 1 FN; 2 below the minimum score" in browser.evaluate(words)
        choose(browser, "failure", "classification errors")
        assert browser.evaluate(ROWS) == []  # none of this score
        choose(browser, "failure", "all images")
        choose(browser, "size", "small objects")
        assert sorted(browser.evaluate(ROWS)) == [4, 5]
        browser.click(HEAD.format("obj."))
        assert browser.evaluate("location.hash") == "#size=small+objects&score=0.6&sort=-2&id=4"
        browser.open(page, "#run=two&failure=answers+with+parse+errors&id=4")
        assert browser.evaluate(ROWS) == []
        browser.evaluate("location.hash = '#failure=duplicates&score=0.1&id=2'")  # sent to who has the page open
        browser.evaluate("new Promise(done => setTimeout(done, 100))")
        assert browser.evaluate(ROWS) == [2]
        assert browser.evaluate("document.getElementById('minimum').textContent") == "0.10"
        browser.open(page, "#failure=nothing&id=99&score=7&name=%3Cb%3E&sort=0&view=a,b,c")
        assert len(browser.evaluate(ROWS)) == 5

    def test_all_panels_zoom_together_and_the_address_keeps_the_view(self, browser: Browser, page: Path) -> None:
        browser.click(ROW.format(2))
        views = f"[...new Set({PICTURES}.map(s => s.getAttribute('viewBox')))]"
        assert browser.evaluate(views) == ["0 0 100 80"]
        thick = f"getComputedStyle({PICTURES}[1].querySelector('rect')).strokeWidth"
        before = browser.evaluate(thick)
        browser.wheel(f"{PICTURES}[1]", -100)
        (view,) = browser.evaluate(views)
        assert [float(v) for v in view.split()] == pytest.approx([10, 8, 80, 64], abs=0.5)
        assert browser.evaluate(thick) != before  # in pixels of the image; on the screen it stays
        browser.click("document.querySelectorAll('button.zoom')[0]")
        browser.drag(f"{PICTURES}[2]", -40, 0)
        (moved,) = browser.evaluate(views)
        assert float(moved.split()[0]) > float(view.split()[0]) + 5
        address = browser.evaluate("location.hash")
        browser.open(page, address)
        assert [float(v) for v in browser.evaluate(views)[0].split()] == pytest.approx(
            [float(v) for v in moved.split()], abs=0.1
        )
        browser.click("document.querySelectorAll('button.zoom')[2]")
        assert browser.evaluate(views) == ["0 0 100 80"]
        assert "view" not in browser.evaluate("location.hash")

    @pytest.mark.parametrize("width", [700, 1400])
    @pytest.mark.parametrize("n_runs", [1, 2, 4, 6])
    def test_nothing_is_cut_at_this_width(self, page: Path, width: int, n_runs: int, tmp_path: Path) -> None:
        names = ["stage2", "stage1-control", "rex-omni", "a detector of a rather long name", "base", "yolo"]
        many = dict(zip(names[:n_runs], [runs()["one"], *[runs()["two"]] * 4, runs()["one"]], strict=False))
        write_page(many, CATEGORIES, page.parent, tmp_path / "page.html")
        with Browser(str(find_browser()), width=width) as browser:
            browser.open(tmp_path / "page.html", "#id=2")
            browser.evaluate("document.querySelectorAll('figure.run details').forEach(d => { d.open = true; })")
            parts = "'figure, details, .objects, .panels, #right, #list, header, .controls'"
            cut = f"[...document.querySelectorAll({parts})].filter(e => e.scrollWidth > e.clientWidth + 1)"
            assert browser.evaluate(f"{cut}.map(e => e.id || e.className || e.tagName)") == []
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            heads = "[...document.querySelectorAll('#images th')]"
            assert (
                browser.evaluate(f"{heads}.filter(h => h.scrollWidth > h.clientWidth + 1).map(h => h.textContent)")
                == []
            )
            assert "0." in browser.evaluate("document.getElementById('totals').textContent")
            browser.screenshot(tmp_path / f"{n_runs}-{width}.png")
            with Image.open(tmp_path / f"{n_runs}-{width}.png") as shot:
                assert shot.size == (width, 900)

    def test_no_request_no_error_and_a_name_stays_text(self, browser: Browser) -> None:
        browser.click(ROW.format(5))
        assert EVIL in browser.evaluate("document.querySelector('figure.truth svg').textContent")
        assert browser.evaluate("document.querySelectorAll('#right img').length") == 0
        assert {address.split(":")[0] for address in browser.requests()} <= {"file", "data"}
        assert browser.problems() == []
