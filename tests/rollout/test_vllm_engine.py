"""The vLLM engine and its client against fake servers: order, retries, server failures, resuming, invalid replies."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordexp.config.schema import DecodeParams
from coordexp.errors import ServerError
from coordexp.packing.pixels import load_sample_rgb
from coordexp.packing.samples import Sample
from coordexp.rollout import vllm_client
from coordexp.rollout.engine import DecodeRequest, Generation, Journal
from coordexp.rollout.vllm_client import ServerPool
from coordexp.rollout.vllm_command import Weights
from coordexp.rollout.vllm_engine import CONSTRAINTS_KEY, VllmEngine
from coordexp.text.codecs import END_OF_TURN
from helpers import World, decode_request, new_checkpoint

REQUEST = decode_request(max_new_tokens=8)
TOKENIZER = new_checkpoint().tokenizer
END = int(TOKENIZER.convert_tokens_to_ids(END_OF_TURN))  # type: ignore[arg-type]
IMAGE = int(TOKENIZER.convert_tokens_to_ids("<|image_pad|>"))  # type: ignore[arg-type]

WEIGHTS = Weights(Path("runs/tiny/stage1"), "coordexp-000000000001")

Answer = Callable[[dict, int], tuple[int, dict | bytes | Iterator[bytes]]]


class FakeServer:
    """Answers by a function of the request's body and the number of requests so far; may be taken down."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict] = []
        self.down = False
        self.models: dict | bytes = {"data": [{"id": WEIGHTS.name}]}
        self._answer = answer
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(503 if fake.down else 200, fake.models if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                self._reply(*((503, {}) if fake.down else fake._answer(body, len(fake.bodies))))

            def _reply(self, status: int, body: dict | bytes | Iterator[bytes]) -> None:
                if isinstance(body, Iterator):  # not HTTP, or not to its end
                    self.close_connection = True
                    for piece in body:
                        self.wfile.write(piece)
                    return
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Keep the test's output clean."""

        return Handler


@contextmanager
def fakes(*answers: Answer) -> Iterator[list[FakeServer]]:
    """Fake servers for the length of a block."""
    servers = [FakeServer(answer) for answer in answers]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE_SECONDS", 0.01)


def prompt(sample: Sample) -> list[int]:
    return sample.expanded_prompt_ids(IMAGE).tolist()


def completion(sample: Sample, token: int, delay: float = 0.0) -> tuple[int, dict]:
    """An answer of one token and the end."""
    time.sleep(delay)
    choice = {"token_ids": [token, END], "finish_reason": "stop"}
    return 200, {"model": WEIGHTS.name, "prompt_token_ids": prompt(sample), "choices": [choice]}


def copies(world: World, n: int) -> list[Sample]:
    """The first sample under n ids."""
    return [replace(world.samples[0], image_id=i) for i in range(n)]


def by_seed(world: World, slow_first: bool = False) -> Answer:
    """Answers each request with a token that identifies it; the earlier, the slower if asked so."""

    def answer(body: dict, _: int) -> tuple[int, dict]:
        token = image_of(body)
        return completion(world.samples[0], token, 0.05 * (8 - token) if slow_first else 0.0)

    return answer


def image_of(body: dict) -> int:
    """The image id that a request's seed was made from."""
    stride = 1_000_003
    return next(i for i in range(200) if (REQUEST.seed + i * stride) & 0x7FFFFFFF == body["seed"])


def run(
    world: World,
    servers: list[FakeServer],
    samples: list[Sample],
    journal: Path,
    workers: int = 8,
    tries: int = 4,
    request: DecodeRequest = REQUEST,
    seconds: float = 5,
) -> list[Generation]:
    pool = ServerPool([s.url for s in servers], timeout_seconds=seconds, tries=tries, weights=WEIGHTS)
    return VllmEngine(pool, TOKENIZER, world.root, workers, Journal(journal)).generate(samples, request)


def test_results_keep_the_order_of_the_samples_whatever_finishes_first(world: World, tmp_path: Path) -> None:
    with fakes(by_seed(world, slow_first=True)) as servers:
        found = run(world, servers, copies(world, 8), tmp_path / "j.jsonl")
    assert [g.ids.tolist() for g in found] == [[i, END] for i in range(8)]
    assert {g.finish_reason for g in found} == {"stop"}


def test_requests_are_spread_by_their_index(world: World, tmp_path: Path) -> None:
    with fakes(by_seed(world), by_seed(world), by_seed(world)) as servers:
        run(world, servers, copies(world, 12), tmp_path / "j.jsonl")
        for place, server in enumerate(servers):
            assert sorted(image_of(body) for body in server.bodies) == list(range(place, 12, 3))


def test_the_number_of_concurrent_requests_is_limited(world: World, tmp_path: Path) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def answer(body: dict, _: int) -> tuple[int, dict]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.03)
        with lock:
            under_way -= 1
        return completion(world.samples[0], 1)

    with fakes(answer) as servers:
        run(world, servers, copies(world, 12), tmp_path / "j.jsonl", workers=3)
    assert 1 < most <= 3


def test_tries_are_bounded_and_the_last_failure_is_named(world: World, tmp_path: Path) -> None:
    with fakes(lambda *_: (500, {"error": "out of memory"})) as servers:
        with pytest.raises(ServerError, match=r"failed 2 times.*HTTP 500.*out of memory"):
            run(world, servers, copies(world, 1), tmp_path / "j.jsonl", tries=2)
        assert len(servers[0].bodies) == 2


GARBAGE = b"<html>\x1b[31m502 upstream</html>"


def drip(head: bytes) -> Iterator[bytes]:
    """A head, and then a space every twentieth of a second for longer than a request may last."""
    yield head
    for _ in range(40):
        time.sleep(0.05)
        yield b" "


def faults(sample: Sample) -> dict[str, Callable[[], tuple[int, dict | bytes | Iterator[bytes]]]]:
    """What a hostile or broken server may send in place of an answer."""
    head, good = b"HTTP/1.1 200 OK\r\n", completion(sample, 1)[1]

    def choice(ids: object, reason: object = "stop", **more: object) -> dict:
        return good | {"choices": [{"token_ids": ids, "finish_reason": reason} | more]}

    whole = json.dumps(good).encode()
    bodies: dict[str, dict | bytes] = {
        "html": GARBAGE,
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "cut": whole[: len(whole) // 2],
        "not utf-8": whole.replace(b"stop", b"st\xffp"),
        "deep": b"[" * 200_000,
        "a long number": b'{"a":' + b"9" * 5000 + b"}",
        "an error": {"error": {"message": "worker restarted"}},
        "no choices": good | {"choices": []},
        "two choices": good | {"choices": good["choices"] * 2},
        "other weights": good | {"model": "coordexp-000000000002"},
        "another prompt": good | {"prompt_token_ids": prompt(sample)[1:]},
        "no prompt": good | {"prompt_token_ids": None},
        "ids in words": choice("none"),
        "ids in ids": choice([[1, END]]),
        "ids not whole": choice([1.5, END]),
        "ids not finite": json.dumps(choice([float("nan"), END])).encode(),
        "ids true": choice([True, END]),
        "negative ids": choice([-1, END]),
        "ids beyond the vocabulary": choice([len(TOKENIZER), END]),
        "an enormous id": choice([10**30, END]),
        "a picture as an answer": choice([IMAGE, END]),
        "no ids": choice([]),
        "too many ids": choice([1] * 9, "length"),
        "an end too early": choice([1, 1], "length"),
        "aborted": choice([1, END], "abort"),
        "no reason": choice([1, END], None),
    }
    raw: dict[str, Callable[[], Iterator[bytes]]] = {
        "closed": lambda: iter(()),
        "not http": lambda: iter([b"SSH-2.0-OpenSSH_9.6\r\n"]),
        "endless headers": lambda: iter([head, *[b"X: y\r\n"] * 500]),
        "less than promised": lambda: iter([head + b"Content-Length: 100000\r\n\r\n" + whole]),
        "huge": lambda: iter([head + b"\r\n", *[bytes(1 << 20)] * 12]),
        "a dripping head": lambda: drip(head + b"X: "),
        "a dripping body": lambda: drip(head + b"Content-Length: 100000\r\n\r\n"),
        "elsewhere": lambda: iter([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\n\r\n"]),
        "busy": lambda: iter([b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\n\r\n"]),
        "broken": lambda: iter([b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n"]),
    }
    return {name: (lambda body=body: (200, body)) for name, body in bodies.items()} | {
        name: (lambda make=make: (0, make())) for name, make in raw.items()
    }


def test_server_faults_are_not_stored_and_do_not_end_the_run(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each request is repeated, then the server is excluded; all answers come from the other server."""
    samples, n_faults = copies(world, 3), 0
    for name, fault in faults(world.samples[0]).items():
        journal = tmp_path / f"{name}.jsonl"
        caplog.clear()
        with fakes(lambda *_, fault=fault: fault(), by_seed(world)) as servers:  # type: ignore[misc]
            found = run(world, servers, samples, journal, workers=1, tries=2, seconds=0.5)
            assert len(servers[0].bodies) == 2, name
            assert f"{servers[0].url} is excluded" in caplog.text, name
        assert [g.ids.tolist() for g in found] == [[i, END] for i in range(3)], name
        assert sorted(g.ids.tolist() for g in Journal(journal).read(2**31).values()) == [[i, END] for i in range(3)]
        n_faults += 1
    assert n_faults == 38


def test_invalid_replies_are_repeated_and_never_stored(world: World, tmp_path: Path) -> None:
    def restarted(body: dict, n: int) -> tuple[int, dict | bytes]:
        beyond = {"token_ids": [len(TOKENIZER)], "finish_reason": "length"}
        replies: list[dict | bytes] = [GARBAGE, b"", {"error": "x"}, completion(world.samples[0], 7)[1]]
        replies.insert(2, completion(world.samples[0], 7)[1] | {"choices": [beyond]})
        return 200, replies[n - 1]

    with fakes(restarted) as servers:
        found = run(world, servers, copies(world, 1), tmp_path / "j.jsonl", tries=5)
        assert found[0].ids.tolist() == [7, END]
        assert len(servers[0].bodies) == 5
    assert [g.ids.tolist() for g in Journal(tmp_path / "j.jsonl").read(2**31).values()] == [[7, END]]


def test_a_server_with_invalid_replies_is_excluded(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fakes(lambda *_: (200, GARBAGE), by_seed(world)) as servers:
        found = run(world, servers, copies(world, 10), tmp_path / "j.jsonl", workers=1, tries=2)
        assert [g.ids[0] for g in found] == list(range(10))
        assert len(servers[0].bodies) == 2
        assert f"{servers[0].url} is excluded" in caplog.text


def test_only_servers_with_invalid_replies_end_the_run_with_one_message(world: World, tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    with fakes(lambda *_: (200, GARBAGE), lambda *_: (200, b"null")) as servers:
        with pytest.raises(ServerError, match="none of the vLLM servers answers") as caught:
            run(world, servers, copies(world, 4), journal, tries=2)
        message = str(caught.value)
        assert all(f"{server.url}: " in message for server in servers)
    assert "not JSON" in message
    assert "not a JSON object: null" in message
    assert message.isprintable()
    assert not journal.exists()


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_an_invalid_request_is_not_sent_to_another_server(world: World, tmp_path: Path, status: int) -> None:
    with fakes(lambda *_: (status, {"error": "no"}), by_seed(world)) as servers:
        with pytest.raises(ServerError, match=rf"{servers[0].url}: HTTP {status}"):
            run(world, servers, copies(world, 1), tmp_path / "j.jsonl")
        assert (len(servers[0].bodies), len(servers[1].bodies)) == (1, 0)


def other_weights(world: World) -> dict:
    return completion(world.samples[0], 1)[1] | {"model": "coordexp-000000000002"}


def test_a_server_with_other_weights_is_rejected_before_any_request(world: World, tmp_path: Path) -> None:
    words = r"holds coordexp-000000000002, expected coordexp-000000000001, the weights of runs/tiny/stage1\. .*"
    with fakes(by_seed(world), by_seed(world)) as servers:
        servers[1].models = {"data": [{"id": "coordexp-000000000002"}]}
        port = servers[1].url.rpartition(":")[2]
        with pytest.raises(
            ServerError, match=rf"{servers[1].url} {words}coordexp serve runs/tiny/stage1 --port {port}"
        ):
            run(world, servers, copies(world, 4), tmp_path / "j.jsonl")
        assert servers[0].bodies == servers[1].bodies == []


def test_a_server_whose_weights_changed_is_rejected(world: World, tmp_path: Path) -> None:
    """It knows no model of the name that is asked, as vLLM says with 404."""

    def restarted(body: dict, n: int) -> tuple[int, dict]:
        if n == 1:
            return by_seed(world)(body, n)
        servers[0].models = {"data": [{"id": "coordexp-000000000002"}]}
        return 404, {"error": {"message": "The model does not exist."}}

    with fakes(restarted) as servers, pytest.raises(ServerError, match="holds coordexp-000000000002, expected"):
        run(world, servers, copies(world, 4), tmp_path / "j.jsonl", workers=1)


@pytest.mark.parametrize("said", [b"", GARBAGE, b"[]", b'{"data": 1}', b'{"data": [{"id": 1}]}', b"[" * 100_000])
def test_a_server_that_does_not_report_its_weights_is_checked_by_its_answers(
    world: World, tmp_path: Path, said: bytes
) -> None:
    with fakes(by_seed(world)) as servers:
        servers[0].models = said
        assert len(run(world, servers, copies(world, 2), tmp_path / "a.jsonl")) == 2
    with fakes(lambda *_: (200, other_weights(world))) as servers:
        servers[0].models = said
        with pytest.raises(ServerError, match="an answer of the model 'coordexp-000000000002'"):
            run(world, servers, copies(world, 1), tmp_path / "b.jsonl", tries=2)


def test_a_server_that_dies_hands_its_requests_to_the_others(world: World, tmp_path: Path) -> None:
    def dying(body: dict, n: int) -> tuple[int, dict]:
        if n > 2:
            servers[0].down = True
            return 503, {}
        return by_seed(world)(body, n)

    with fakes(dying, by_seed(world)) as servers:
        found = run(world, servers, copies(world, 20), tmp_path / "j.jsonl", workers=2)
    assert [g.ids[0] for g in found] == list(range(20))


def test_a_run_resumes_from_what_is_on_disk(world: World, tmp_path: Path) -> None:
    journal, samples = tmp_path / "j.jsonl", copies(world, 10)

    def dying(body: dict, n: int) -> tuple[int, dict]:
        servers[0].down |= n > 4
        return (503, {}) if servers[0].down else by_seed(world)(body, n)

    with fakes(dying) as servers, pytest.raises(ServerError, match="none of the vLLM servers answers"):
        run(world, servers, samples, journal, workers=1)
    assert len(Journal(journal).read(len(TOKENIZER))) == 4
    with fakes(by_seed(world)) as servers:
        found = run(world, servers, samples, journal)
        assert sorted(image_of(body) for body in servers[0].bodies) == list(range(4, 10))
    assert [g.ids[0] for g in found] == list(range(10))


def test_a_request_carries_lossless_pixels_and_the_settings(world: World, tmp_path: Path) -> None:
    with fakes(by_seed(world)) as servers:
        run(world, servers, copies(world, 1), tmp_path / "j.jsonl")
        (body,) = servers[0].bodies
    assert (body["model"], body["bad_words"]) == (WEIGHTS.name, ["<|image_pad|>"])
    assert body["skip_special_tokens"] is False
    assert body["return_token_ids"] is True
    assert (body["max_tokens"], body["temperature"], body["stop_token_ids"]) == (8, 0.0, [END])
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_constrained_request_carries_the_grammar_and_what_a_walk_needs(world: World, tmp_path: Path) -> None:
    request = decode_request("tags", names=("cat",), grammar="closed", corners="valid", max_new_tokens=60)
    with fakes(by_seed(world)) as servers:
        run(world, servers, copies(world, 1), tmp_path / "j.jsonl", request=request)
        (body,) = servers[0].bodies
    assert "start:" in body["structured_outputs"]["grammar"]
    asked = json.loads(body["vllm_xargs"][CONSTRAINTS_KEY])
    assert DecodeParams.model_validate(asked["decode"]) == request.params
    assert (asked["codec"], asked["names"]) == ("tags", ["cat"])


def test_a_view_of_an_image_is_sent_as_a_view(world: World, tmp_path: Path) -> None:
    sample = replace(world.samples[0], image=f"{world.samples[0].image}#flip", image_id=0)
    with fakes(by_seed(world)) as servers:
        run(world, servers, [sample], tmp_path / "j.jsonl")
        url = servers[0].bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    assert (sent == load_sample_rgb(world.root, sample.image, sample.resized_width, sample.resized_height)).all()


def test_an_answer_without_an_end_is_truncated_at_its_budget(world: World, tmp_path: Path) -> None:
    def endless(body: dict, _: int) -> tuple[int, dict]:
        status, answer = completion(world.samples[0], 1)
        return status, answer | {"choices": [{"token_ids": [1] * 8, "finish_reason": "length"}]}

    with fakes(endless) as servers:
        assert run(world, servers, copies(world, 1), tmp_path / "j.jsonl")[0].finish_reason == "length"
