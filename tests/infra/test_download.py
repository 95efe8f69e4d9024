"""Downloads are complete and correct, also over broken connections, or fail."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from coordexp.errors import DataError
from coordexp.infra import download
from coordexp.infra.download import RemoteFile, fetch

CONTENT = bytes(range(256)) * 2000


@dataclass
class Server:
    """Serves CONTENT, but closes its first connections after this number of bytes; records the requested ranges."""

    url: str = ""
    content: bytes = CONTENT
    cuts: list[int] = field(default_factory=list)
    status: int = 200  # status codes of the next replies, if not OK
    knows_ranges: bool = True
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    described = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            described.asked.append(self.headers.get("Range", ""))
            if described.status != 200:
                self.send_error(described.status)
                return
            start = int((described.asked[-1] or "bytes=0-")[6:-1]) if described.knows_ranges else 0
            rest = described.content[start:]
            self.send_response(206 if start else 200)
            if start:
                size = len(described.content)
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: described.cuts.pop(0)] if described.cuts else rest)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    described.url = f"http://127.0.0.1:{http.server_port}/file.zip"
    Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield described
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)


def remote(url: str) -> RemoteFile:
    return RemoteFile("file.zip", url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def silent(_: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_broken_connection_resumes_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000]
    said: list[str] = []
    path = fetch(remote(server.url), tmp_path, said.append)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["", "bytes=100000-", "bytes=150000-"]
    assert len(said) == 2
    assert names(tmp_path) == ["file.zip"]
    assert fetch(remote(server.url), tmp_path, silent) == path
    assert len(server.asked) == 3  # an existing file is not downloaded again


def test_another_process_resumes_after_a_kill(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".file.zip.part").write_bytes(CONTENT[:1000])
    assert fetch(remote(server.url), tmp_path, silent).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_without_range_support_the_whole_file_is_sent_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".file.zip.part").write_bytes(b"older")
    server.knows_ranges = False
    assert fetch(remote(server.url), tmp_path, silent).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"more", b"<html>sign in</html>"])
def test_an_unexpected_file_is_refused_and_removed(server: Server, tmp_path: Path, content: bytes) -> None:
    server.content = content
    with pytest.raises(DataError, match=r"expected 512,000 bytes|cannot be downloaded: the connection ended early"):
        fetch(remote(server.url), tmp_path, silent)
    assert not (tmp_path / "file.zip").exists()
    server.content = CONTENT
    if len(content) >= len(CONTENT):
        assert names(tmp_path) == []
        assert fetch(remote(server.url), tmp_path, silent).read_bytes() == CONTENT


def test_an_existing_unexpected_file_is_reported_and_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"of the user")
    with pytest.raises(DataError, match=r"file\.zip is a file of 11 bytes .* expected 512,000 bytes .*Remove it"):
        fetch(remote(server.url), tmp_path, silent)
    assert (tmp_path / "file.zip").read_bytes() == b"of the user"
    assert server.asked == []


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, download.TRIES)])
def test_only_temporary_errors_are_retried(server: Server, tmp_path: Path, status: int, tries: int) -> None:
    server.status = status
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch(remote(server.url), tmp_path, silent)
    assert len(server.asked) == tries


def test_without_network_the_message_states_the_file_and_its_place(tmp_path: Path) -> None:
    """A host name that never resolves (RFC 2606); if a server replies anyway, it does not send the file."""
    file = remote("http://pictures.invalid/file.zip")
    with pytest.raises(DataError) as raised:
        fetch(file, tmp_path, silent)
    for part in ("http://pictures.invalid/file.zip", file.sha256, str(tmp_path), "network"):
        assert part in str(raised.value)


def test_a_full_disk_is_reported_before_the_download(server: Server, tmp_path: Path) -> None:
    huge = replace(remote(server.url), bytes=1 << 60)
    with pytest.raises(DataError, match="Free some disk space"):
        fetch(huge, tmp_path, silent)
    assert server.asked == []


def test_a_wheel_comes_from_pip_or_from_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip without an index simulates a machine without network; a folder of wheels is an index."""
    wheel = tmp_path / "index" / "photos-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(CONTENT)
    file = replace(remote("pip:photos==1.0"), name=wheel.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip:photos==1.0: cannot be downloaded: pip reports .*SHA-256"):
        fetch(file, tmp_path / "downloads", silent)
    assert names(tmp_path / "downloads") == []
    (tmp_path / "downloads" / wheel.name).write_bytes(CONTENT)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # pip is not asked
    assert fetch(file, tmp_path / "downloads", silent).read_bytes() == CONTENT
