"""Images given as URLs: downloaded only on request, completely, or with an error that names the URL."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from coordexp import cli
from coordexp.detections import open_picture
from coordexp.errors import PictureError
from coordexp.records import fetched
from coordexp.records.fetched import fetched_files, fetched_rgb, is_address


class Site(BaseHTTPRequestHandler):
    """Serves an image, a redirect to it, and a file that is not an image."""

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/a%20b.png?size=2")
            self.end_headers()
            return
        content = io.BytesIO()
        Image.new("RGB", (8, 6), "red").save(content, "PNG")
        data = {"/a%20b.png": content.getvalue(), "/page": b"<html>"}.get(self.path.partition("?")[0])
        self.send_response(404 if data is None else 200)
        self.end_headers()
        self.wfile.write(data or b"")


@pytest.fixture
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_recognized() -> None:
    named = ["https://a.b/c.jpg", "HTTP://a", "a.jpg", "ftp://a", "/x/https://a", Path("a"), np.zeros((2, 2, 3))]
    assert [is_address(one) for one in named] == [True, True, False, False, False, False, False]


def test_an_image_is_downloaded_also_through_a_redirect(site: str, tmp_path: Path) -> None:
    assert np.asarray(fetched_rgb(f"{site}/a%20b.png")).shape == (6, 8, 3)
    files = fetched_files([f"{site}/a%20b.png", f"{site}/moved"], tmp_path)
    assert [file.name[8:] for file in files] == ["-a_b.png", "-moved"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("path", "words"), [("/nothing", "cannot be downloaded: .*404"), ("/page", "page: ")])
def test_download_errors_name_the_url(path: str, words: str, site: str) -> None:
    with pytest.raises(PictureError, match=words) as error:
        fetched_rgb(site + path)
    assert site + path in str(error.value)


def test_a_missing_server_and_an_endless_reply_are_errors(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
    with pytest.raises(PictureError, match="cannot be downloaded"):
        fetched_rgb(closed)
    monkeypatch.setattr(fetched, "MAX_BYTES", 10)
    with pytest.raises(PictureError, match="exceeds the limit"):
        fetched_rgb(f"{site}/a%20b.png")


def test_nothing_is_downloaded_without_a_request(site: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PictureError, match="only on request: fetch=True"):
        open_picture(f"{site}/a%20b.png")
    with pytest.raises(SystemExit) as done:
        cli.main(["predict", f"{site}/a%20b.png", "--checkpoint", "nowhere"])
    assert done.value.code == 2
    assert "only on request: add --fetch FOLDER" in capfd.readouterr().err
