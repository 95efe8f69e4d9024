"""HTTP to one or several vLLM servers: health, time limits, retries with back-off, and deterministic spreading.

Only the standard library: requests are few and large, and the threads that wait for them are bounded by the engine.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from coordexp.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

HEALTH_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0
SERVED_NAME = "coordexp"
# What a server that is dying, starting or overloaded can do to a request; anything else is an error of the request.
_PASSING = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class ServerPool:
    """The servers of one run. A request goes to server `index % n` while that one lives, else to the next alive."""

    def __init__(self, urls: Sequence[str], timeout_seconds: float, tries: int) -> None:
        """Raises ConfigError without servers, or if a URL is no http(s) URL."""
        bad = [url for url in urls if not url.startswith(("http://", "https://"))]
        if not urls or bad:
            raise ConfigError(f"rollout.servers is {list(urls)}, expected URLs such as http://gpu-3:8000.")
        self._urls = [url.rstrip("/") for url in urls]
        self._timeout_seconds = timeout_seconds
        self._tries = tries
        self._dead: set[str] = set()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Leave out the servers that do not answer; raises TrainingError if none does."""
        for url in self._urls:
            if not is_healthy(url):
                self._bury(url)
        self._alive()

    def ask(self, index: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """The chat completion of one request.

        Raises:
            TrainingError: no server is left, the tries are used up, or a server refuses the request as wrong.
        """
        pause = FIRST_PAUSE_SECONDS
        failure = ""
        for attempt in range(self._tries):
            alive = self._alive()
            # The servers keep their places, so that the death of one moves only its own requests.
            home = self._urls[index % len(self._urls)]
            url = home if home in alive else alive[(index + attempt) % len(alive)]
            try:
                return _post(f"{url}/v1/chat/completions", body, self._timeout_seconds)
            except urllib.error.HTTPError as error:
                failure = f"{url}: HTTP {error.code}: {error.read().decode(errors='replace')[:500]}"
                if error.code < 500 and error.code != 429:
                    raise TrainingError(
                        f"{failure}. The server refuses this request; check its model and options."
                    ) from error
            except _PASSING as error:
                failure = f"{url}: {error!r}"
            if not is_healthy(url):
                self._bury(url)
            elif attempt + 1 < self._tries:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        raise TrainingError(
            f"request {index} failed {self._tries} times, at last with {failure}. Finished answers are kept: mend the "
            "servers (or raise rollout.timeout_seconds) and run the stage again."
        )

    def _alive(self) -> list[str]:
        with self._lock:
            alive = [url for url in self._urls if url not in self._dead]
        if not alive:
            raise TrainingError(
                f"none of the vLLM servers answers ({', '.join(self._urls)}). Finished answers are kept: start the "
                "servers and run the stage again."
            )
        return alive

    def _bury(self, url: str) -> None:
        with self._lock:
            if url not in self._dead:
                log.warning("%s does not answer; its requests go to the other servers", url)
            self._dead.add(url)


def is_healthy(url: str) -> bool:
    """Whether a server answers its health check."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=HEALTH_SECONDS) as response:
            return response.status == 200
    except _PASSING:
        return False


def _post(url: str, body: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
        return json.load(response)
