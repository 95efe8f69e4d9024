"""Requests go only to the configured server, and end in time whatever the reply."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, ServerError
from coordexp.rollout import vllm_client, vllm_http
from coordexp.rollout.vllm_client import ServerPool, health_fault
from coordexp.rollout.vllm_command import Weights
from coordexp.rollout.vllm_http import ServerFault, exchange, parse_address

WEIGHTS = Weights(Path("checkpoint"), "coordexp-0")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class RawServer:
    """Answers each connection by a function of its socket, once the request's head is there; keeps the heads."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.heads: list[bytes] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                head = connection.recv(65536)
                self.heads.append(head)
                try:
                    self._answer(connection)
                except OSError:
                    continue

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    """Raw servers by what they send: bytes, or a function of the connection."""
    servers: list[RawServer] = []

    def start(answer: bytes | Callable[[socket.socket], None]) -> RawServer:
        servers.append(RawServer(answer if callable(answer) else lambda connection: connection.sendall(answer)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def dripping(head: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    """A head, and then a drop every tenth of a second for longer than anybody waits here."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(40):
            connection.sendall(drop)
            time.sleep(0.1)

    return answer


def test_no_proxy_of_the_environment_sees_a_byte(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, server = serve(OK), serve(OK)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, recorder.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert ServerPool([server.url], 5, 1, WEIGHTS).ask(0, {"picture": "x"}, bytes) == b"{}"
    assert health_fault(parse_address(server.url)) == ""
    server.close()
    assert "ConnectionRefusedError" in health_fault(parse_address(server.url))
    assert recorder.heads == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_fault_of_the_server_that_sends_it(
    serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE_SECONDS", 0.0)
    elsewhere = serve(OK)
    head = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere.url}/v1\r\nContent-Length: 0\r\n\r\n"
    server = serve(head.encode())
    with pytest.raises(ServerError, match=rf"{server.url}: .*HTTP {status} to '{elsewhere.url}/v1'"):
        ServerPool([server.url], 5, 2, WEIGHTS).ask(0, {}, bytes)
    assert elsewhere.heads == []


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    ],
    ids=["body", "endless", "header", "headers", "continue", "chunks", "chunk-size"],
)
def test_a_request_ends_in_time_however_slowly_the_reply_drips(
    serve: Callable[..., RawServer], head: bytes, drop: bytes
) -> None:
    server = serve(dripping(head, drop))
    started = time.monotonic()
    with pytest.raises(ServerFault, match=r"no complete reply within 0\.35 s"):
        exchange(parse_address(server.url), "/", b"{}", 0.35)
    assert time.monotonic() - started < 1.5


def test_a_reply_has_a_limit_of_size(serve: Callable[..., RawServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_http, "MAX_REPLY_BYTES", 1 << 20)
    sent = 0

    def endless(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(200):
            sent += connection.send(bytes(1 << 18))

    with pytest.raises(ServerFault, match="more than 1 MB"):
        exchange(parse_address(serve(endless).url), "/", None, 5)
    assert sent < 20 << 20


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\0\xff\x1b[31m\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000 + b"\r\n\r\n",
    ],
)
def test_a_reply_that_is_not_http_is_a_printable_fault(serve: Callable[..., RawServer], reply: bytes) -> None:
    with pytest.raises(ServerFault) as caught:
        exchange(parse_address(serve(reply).url), "/", None, 5)
    assert str(caught.value).isprintable()


def test_a_key_in_the_url_is_sent_and_never_shown(serve: Callable[..., RawServer]) -> None:
    server = serve(OK)
    address = parse_address(server.url.replace("//", "//:s3cret@"))
    exchange(address, "/", None, 5)
    exchange(address.without_key(), "/", None, 5)
    assert [b"Authorization: Bearer s3cret\r\n" in head for head in server.heads] == [True, False]
    assert "s3cret" not in address.url + repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "ftp://h", "http://", "http://h:99999", "http://h:x", "http://h/\x1b[31m", "http://h h",
        "http://user:pw@h", "http://:%0d%0aX@h", "http://h?x=1", "http://[::1", "http://hö:1",
    ],
)  # fmt: skip
def test_an_invalid_server_url_is_rejected(url: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.servers"):
        ServerPool([], 1, 1, WEIGHTS)
    with pytest.raises(ConfigError, match=r"rollout\.servers") as caught:
        ServerPool([url], 1, 1, WEIGHTS)
    assert str(caught.value).isprintable()
    assert "pw@" not in str(caught.value)


def test_an_invalid_host_name_is_a_fault() -> None:
    with pytest.raises(ServerFault):
        exchange(parse_address("http://a..b:1"), "/", None, 1)
