"""One HTTP request to a server that the user configured, with limits of time and size.

The connection goes directly to that server, without proxies from the environment and without following redirects, so
that images go nowhere else. The standard library suffices, because requests are few and large.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.parse
from dataclasses import dataclass, field, replace

from coordexp.infra.printable import excerpt

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's name: the key of a server, and the default key for URLs
MAX_REPLY_BYTES = 8 << 20  # thousands of token ids with their text need less than 1 MB
_CHUNK_BYTES = 1 << 16


class ServerFault(Exception):
    """Why one request to one server failed; another try, or another server, may succeed."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a server. `url` is without the key and may be shown; `key` is sent as a bearer token."""

    url: str
    is_secure: bool
    host: str
    port: int
    path: str
    key: str = field(default="", repr=False)

    def without_key(self) -> Address:
        """The same address without credentials."""
        return replace(self, key="")


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply; `location` is the target of a redirect."""

    status: int
    body: bytes
    location: str


def parse_address(url: str, key: str = "") -> Address:
    """The address in `http(s)://[:KEY@]HOST[:PORT][/PATH]`, with `key` if the URL has none.

    Raises:
        ValueError: with the reason, which does not contain the key.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it contains a character that is invalid in a URL")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("it does not begin with http:// or https://")
    if not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("it is not of the form http://HOST:PORT")
    is_secure = parts.scheme == "https"
    key = urllib.parse.unquote(parts.password or "") or key
    if not key.isascii() or not key.isprintable():
        raise ValueError("its key contains a character that is invalid in a header")
    path = parts.path.rstrip("/")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
    return Address(shown, is_secure, parts.hostname, parts.port or (443 if is_secure else 80), path, key)


def exchange(address: Address, path: str, content: bytes | None, seconds: float) -> Reply:
    """GET a path of the server, or POST JSON to it; sending and receiving together take at most `seconds`.

    Raises:
        ServerFault: no connection, no complete HTTP reply in time, or a reply of more than MAX_REPLY_BYTES.
    """
    ends_at = time.monotonic() + seconds
    kind = http.client.HTTPSConnection if address.is_secure else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=seconds)
    headers = {"Connection": "close"}
    if content is not None:
        headers["Content-Type"] = "application/json"
    if address.key:
        headers["Authorization"] = f"Bearer {address.key}"
    try:
        connection.connect()
        connection.sock.settimeout(_seconds_until(ends_at))
        connection.request("GET" if content is None else "POST", address.path + path, content, headers)
        with _Response(connection.sock, ends_at) as response:
            response.begin()
            return Reply(response.status, _body(response), response.getheader("Location", ""))
    except TimeoutError as error:
        raise ServerFault(f"no complete reply within {seconds:g} s") from error
    # UnicodeError: a host name that cannot be encoded for DNS.
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise ServerFault(f"no reply: {excerpt(repr(error))}") from error
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse) -> bytes:
    received = bytearray()
    while block := response.read1(_CHUNK_BYTES):
        received += block
        if len(received) > MAX_REPLY_BYTES:
            raise ServerFault(f"a reply of more than {MAX_REPLY_BYTES >> 20} MB; an answer has far less")
    if response.length:
        raise http.client.IncompleteRead(bytes(received), response.length)
    return bytes(received)


class _Response(http.client.HTTPResponse):
    """A reply with one deadline for all reads, however slowly its bytes arrive."""

    def __init__(self, sock: socket.socket, ends_at: float) -> None:
        super().__init__(sock)
        self.fp: io.BufferedReader
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_UntilDeadline(raw, sock, ends_at))


class _UntilDeadline(io.RawIOBase):
    """A socket stream that limits every read to the remaining time; the socket's own timeout restarts at each read."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, ends_at: float) -> None:
        self._raw = raw
        self._sock = sock
        self._ends_at = ends_at

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        self._sock.settimeout(_seconds_until(self._ends_at))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _seconds_until(moment: float) -> float:
    """The remaining seconds; raises TimeoutError if the moment has passed."""
    left = moment - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
