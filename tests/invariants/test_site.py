"""The documentation site: it builds without a warning, and holds what the pages link to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from source_tree import ROOT

for package in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(package, reason=f"{package} is not installed; requirements-dev.lock has it (make env)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_the_navigation_is_there(site: Path) -> None:
    named = set(re.findall(r": ([\w/]+)\.md$", (ROOT / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE))
    assert "README" in named  # the home page
    for name in named:
        assert (site / ("" if name == "README" else name) / "index.html").is_file(), name


def test_links_within_the_site_lead_somewhere(site: Path) -> None:
    """Also those of raw HTML and to files that are no pages, which the strict build does not look at."""
    for page in site.rglob("index.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|//|/", target):
                assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"


def test_pages_hold_what_is_filled_in(site: Path) -> None:
    api, cli = ((site / name / "index.html").read_text(encoding="utf-8") for name in ("api", "cli"))
    assert 'id="coordexp.detector.Detector.predict"' in api
    assert "bounds the memory" in api or "batch_images" in api
    assert "Usage: coordexp predict" in cli
    assert "--set-param" in cli


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    """But badges, which README shows on purpose."""
    for page in site.rglob("index.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|iframe)[^>]+(?:src|href)="(?:https?:)?//([^/"]+)', text)
        assert loaded == [], page.relative_to(site)
