"""Hooks that mkdocs.yml names: they make one site of pages that also read well on a code-hosting page.

A page links to files by their paths in the repository (`../src/coordexp/cli.py`, or `docs/data.md` in README.md). The
site holds docs/ at its root, README.md as its home page, and every other file that a page links to at its path in the
repository. A link to an output that git ignores becomes plain text, so that the site is the same on every machine. Two
pages are filled in here: api.md from docstrings, cli.md from the command line itself.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path, PurePosixPath
from posixpath import dirname, join, normpath, relpath
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT, DOCS = Path(__file__).parents[1], "docs/"
# Code first, so that nothing in it is read as a link. The text of a link may hold an image, which is a badge.
CODE = r"```.*?```|`[^`\n]*`|<!--.*?-->"
MARKUP = re.compile(
    rf"(?P<code>{CODE})|(?P<bang>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<to>[^)\s]+)\)", re.DOTALL
)
ATTRIBUTE = re.compile(rf'(?P<code>{CODE})|(?P<name>\b(?:src|srcset|href))="(?P<to>[^"]+)"', re.DOTALL)
# In a table, code-hosting pages want `a\\|b` for `a|b`, and Python-Markdown shows the backslash.
TABLE_CODE = re.compile(r"(?<=[| (])`[^`\n]*\\\|[^`\n]*`(?=[^\n]*\|$)", re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace patterns in the navigation by the files in git that they match."""
    config.nav = _expanded(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/ that the navigation names, and all files that pages link to."""
    waiting = [DOCS + file.src_uri for file in files.documentation_pages()]
    waiting += [path for path in _paths(config.nav) if not (ROOT / DOCS / path).is_file()]
    seen = set[str]()
    while waiting:
        path = waiting.pop()
        if path in seen or path not in _tracked():
            continue
        seen.add(path)
        if not path.startswith(DOCS):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [_target(path, to)[0] for to in _links(text) if not ELSEWHERE.match(to)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links for the site, and fill in the generated parts."""
    source = page.file.src_uri
    path = DOCS + source if (ROOT / DOCS / source).is_file() else source

    def link(found: re.Match[str]) -> str:
        if found["code"] or ELSEWHERE.match(found["to"]):
            return found[0]
        text = MARKUP.sub(link, found["text"])
        target, anchor = _target(path, found["to"])
        if target not in _tracked() and ((ROOT / target).is_dir() or _ignored(target)):
            return text
        return f"{found['bang']}[{text}]({relpath(target.removeprefix(DOCS), dirname(source) or '.')}{anchor})"

    def attribute(found: re.Match[str]) -> str:
        if found["code"] or ELSEWHERE.match(found["to"]):
            return found[0]
        target, anchor = _target(path, found["to"])
        file = files.get_file_from_path(target.removeprefix(DOCS))
        return f'{found["name"]}="{file.url_relative_to(page.file)}{anchor}"' if file else found[0]

    markdown = TABLE_CODE.sub(
        lambda code: code[0].replace("\\|", "|"), ATTRIBUTE.sub(attribute, MARKUP.sub(link, markdown))
    )
    if source == "api.md":
        return re.sub(r"^\* \[`(coordexp[\w.]+)`\]\(.*\)$", r"::: \1", markdown, flags=re.MULTILINE)
    return markdown.replace("<!-- commands -->", _commands()) if source == "cli.md" else markdown


@cache
def _tracked() -> frozenset[str]:
    """The files that git tracks or would add, by path from the root of the repository."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return frozenset(path for path in done.stdout.split("\0") if (ROOT / path).is_file())


@cache
def _ignored(path: str) -> bool:
    """Whether git ignores this path: an output of a run."""
    return not subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT).returncode


def _target(page: str, to: str) -> tuple[str, str]:
    """The path of a link's target from the root of the repository, and its anchor with the "#"."""
    file, hash_, anchor = to.partition("#")
    return normpath(join(dirname(page), file)), hash_ + anchor


def _links(text: str) -> list[str]:
    matches = [*MARKUP.finditer(text), *ATTRIBUTE.finditer(text)]
    inner = [
        one for found in matches if not found["code"] for one in MARKUP.finditer(found.groupdict().get("text") or "")
    ]
    return [found["to"] for found in (*matches, *inner) if not found["code"]]


def _expanded(nav: Any) -> Any:
    if isinstance(nav, dict):
        return {title: _expanded(below) for title, below in nav.items()}
    if isinstance(nav, list):
        return [one for entry in nav for one in (_matching(entry) if isinstance(entry, str) else [_expanded(entry)])]
    return nav


def _matching(path: str) -> list[str]:
    return sorted(file for file in _tracked() if PurePosixPath(file).match(path)) if "*" in path else [path]


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [path for below in (nav.values() if isinstance(nav, dict) else nav) for path in _paths(below)]


def _commands() -> str:
    """Every command with the text of its `--help`."""
    from coordexp import cli

    group = typer.main.get_command(cli.app)
    shown = []
    for name, command in sorted(group.commands.items()):
        context = typer.Context(command, info_name=f"coordexp {name}", max_content_width=88, terminal_width=88)
        shown.append(f"## coordexp {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(shown)
