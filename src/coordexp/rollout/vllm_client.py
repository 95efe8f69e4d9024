"""A pool of vLLM servers: health and weight checks, retries with back-off, and deterministic assignment of requests."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from coordexp.errors import ConfigError, ServerError
from coordexp.infra.printable import excerpt
from coordexp.rollout.vllm_command import Weights
from coordexp.rollout.vllm_http import KEY_VARIABLE, Address, Reply, ServerFault, exchange, parse_address

log = logging.getLogger(__name__)

HEALTH_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0
COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
# The 4xx statuses that do not mean an invalid request but a busy server: timeout, too early, too many requests.
_BUSY = (408, 425, 429)

T = TypeVar("T")


class ServerPool:
    """The servers of one checkpoint. A request goes to server `index % n` if that is in use, otherwise to another."""

    def __init__(self, urls: Sequence[str], timeout_seconds: float, tries: int, weights: Weights) -> None:
        """A URL may contain the server's API key: http://:KEY@HOST:PORT. The default key is VLLM_API_KEY, if set.

        Raises:
            ConfigError: there are no servers, or a URL is not an http(s) URL.
        """
        if not urls:
            raise ConfigError("rollout.servers is [], expected URLs such as http://gpu-3:8000.")
        self._servers = [_address(url) for url in urls]
        self._timeout_seconds = timeout_seconds
        self._tries = tries
        self.weights = weights
        self._left_out: dict[Address, str] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Exclude the servers that do not answer.

        Raises:
            ServerError: no server answers, or one has other weights.
        """
        for server in self._servers:
            if fault := health_fault(server):
                self._leave_out(server, fault)
            else:
                self._refuse_other_weights(server)
        self._in_use()

    def ask(self, index: int, body: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """Send one request, and return the result of `read` on its chat completion.

        `read` raises ServerFault for an invalid reply, which counts as a failed try. A server that fails a request
        `tries` times, or fails its health check, is excluded, and the request goes to another server. Between tries,
        the client waits with exponential back-off. Requests are deterministic and have no side effects, so repeating
        one, on any server, is safe.

        Raises:
            ServerError: no server is left, or a server rejects the request as invalid.
        """
        content = json.dumps(body).encode()
        failures: Counter[Address] = Counter()
        pause = FIRST_PAUSE_SECONDS
        while True:
            server = self._server_for(index)
            try:
                reply = exchange(server, COMPLETIONS, content, self._timeout_seconds)
                if reply.status == 404:  # vLLM's status for an unknown model
                    self._refuse_other_weights(server)
                _check_status(server, reply)
                return read(reply.body)
            except ServerFault as fault:
                failures[server] += 1
                if failures[server] >= self._tries:
                    self._leave_out(server, f"request {index} failed {self._tries} times, the last time with {fault}")
                elif unhealthy := health_fault(server):
                    self._leave_out(server, f"{fault}; its health check: {unhealthy}")
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _refuse_other_weights(self, server: Address) -> None:
        """Raise ServerError if a server reports other weights; if it reports none, its answers are checked later."""
        held = _models(server)
        if held and self.weights.name not in held:
            folder, found = self.weights.folder, " and ".join(map(excerpt, held[:3]))
            raise ServerError(
                f"{server.url} holds {found}, expected {self.weights.name}, the weights of {folder}. Restart it with "
                f"`coordexp serve {folder} --port {server.port}`, or set rollout.servers: [start], so that every stage "
                "serves its own checkpoint."
            )

    def _server_for(self, index: int) -> Address:
        in_use = self._in_use()
        # Excluded servers keep their index, so that only their own requests move to other servers.
        home = self._servers[index % len(self._servers)]
        return home if home in in_use else in_use[index % len(in_use)]

    def _in_use(self) -> list[Address]:
        with self._lock:
            left_out = dict(self._left_out)
        in_use = [server for server in self._servers if server not in left_out]
        if not in_use:
            reasons = "; ".join(f"{server.url}: {reason}" for server, reason in left_out.items())
            raise ServerError(
                f"none of the vLLM servers answers with chat completions of this checkpoint. {reasons}. Fix them, or "
                "raise rollout.timeout_seconds, and run the same command again: a stage keeps its finished answers."
            )
        return in_use

    def _leave_out(self, server: Address, reason: str) -> None:
        with self._lock:
            if server not in self._left_out:
                log.warning("%s is excluded: %s", server.url, reason)
                self._left_out[server] = reason


def health_fault(server: Address) -> str:
    """Why a server fails its health check; empty if it passes."""
    try:
        status = exchange(server, "/health", None, HEALTH_SECONDS).status
    except ServerFault as fault:
        return str(fault)
    return "" if status == 200 else f"HTTP {status} from /health, expected 200"


def _models(server: Address) -> list[str]:
    """The model names that a server reports; empty if there is no readable reply."""
    try:
        reply = exchange(server, MODELS, None, HEALTH_SECONDS)
        listed = json.loads(reply.body)["data"] if reply.status == 200 else []
        return [model["id"] for model in listed if isinstance(model["id"], str)]
    except (ServerFault, ValueError, TypeError, KeyError, RecursionError):
        return []


def _address(url: str) -> Address:
    try:
        return parse_address(url, os.environ.get(KEY_VARIABLE, ""))
    except ValueError as error:
        shown = excerpt(url.rpartition("@")[2])
        raise ConfigError(f"rollout.servers: {shown!r}: {error}. Expected URLs such as http://gpu-3:8000.") from error


def _check_status(server: Address, reply: Reply) -> None:
    if reply.status == 200:
        return
    if 300 <= reply.status < 400:
        raise ServerFault(f"HTTP {reply.status} to {excerpt(reply.location)!r}; redirects are not followed")
    said = f"HTTP {reply.status}: {excerpt(reply.body)}"
    if 400 <= reply.status < 500 and reply.status not in _BUSY:
        raise ServerError(f"{server.url}: {said}. The server rejects this request; check its model, options and key.")
    raise ServerFault(said)
