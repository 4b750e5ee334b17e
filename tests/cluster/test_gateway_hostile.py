"""What a client sends, or does not, never holds up the streams of others, and gets an answer in OpenAI's shape."""

import asyncio
import contextlib
import io
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from services.gateway.tokenizer import Tokenizer
from shared import port
from tests.cluster.fake_coordinator import FakeCoordinator, Script, a_status
from tests.cluster.test_gateway import DEADLINE_S, TEXT, Bench, a_gateway
from tests.tiny_tokenizer import make_tokenizer_dir

GAP_S = 0.3
BESIDE = "beside"
CONTEXT = 8192
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def a_bench(model_dir: Path, **settings: Any) -> AsyncIterator[Bench]:
    """A gateway that is ready; who has BESIDE as cache_salt gets TEXT a hundred times, a token each 10 ms."""
    ids = Tokenizer.load(str(model_dir)).encode(TEXT, special=False)
    beside = Script(tuple(ids) * 100, pause_s=0.01)
    async with FakeCoordinator(a_status(str(model_dir), 400, (2,), CONTEXT)) as coordinator:
        coordinator.script = lambda request: beside if request.cache_salt == BESIDE else Script((5, 6))
        async with a_gateway(coordinator, **settings) as running:
            await running.until_health(200)
            yield running


@pytest.fixture
async def bench(model_dir: Path) -> AsyncIterator[Bench]:
    async with a_bench(model_dir) as running:
        yield running


@asynccontextmanager
async def a_stream_beside(bench: Bench, gaps: list[float] | None = None) -> AsyncIterator[None]:
    """While this is entered a stream runs; in the end its text was right. Its worst gap goes into `gaps`."""
    last, worst, text, over = 0.0, 0.0, "", False

    async def follow() -> None:
        nonlocal last, worst, text
        body = {"prompt": "x", "max_tokens": CONTEXT - 10, "stream": True, "cache_salt": BESIDE}
        async with bench.http.post(bench.url + "/v1/completions", json=body) as response:
            async for line in response.content:
                now = time.monotonic()
                worst, last = max(worst, now - last if last else 0.0), now
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                if over:
                    return

    following = asyncio.create_task(follow())
    try:
        while not last:
            await asyncio.sleep(0.01)
        yield
        await asyncio.sleep(0.1)
    finally:
        over = True
        async with asyncio.timeout(DEADLINE_S):
            await following
    assert text
    assert (TEXT * 100).startswith(text)
    if gaps is not None:
        gaps.append(worst)


BODIES: dict[str, Any] = {
    "floats": {"prompt": [0.5] * 300_000},
    "fewer floats": {"prompt": [0.5] * 100_000},
    "integers": {"prompt": [5] * 2_000_000},
    "lists": {"prompt": [[]] * 1_500_000},
    "names": {"prompt": "x", "more": dict.fromkeys(map(str, range(500_000)), 0)},
    "text": {"prompt": ("the quick brown fox jumps, " * 300_000)[:7_000_000]},
    "a word": {"prompt": "x" * 7_000_000},
    "marks": {"prompt": ',"' * 2_000_000},
    "messages": {"messages": [{"role": "user", "content": "the quick brown fox jumps " * 60}] * 4096},
    "a message": {"messages": [{"role": "user", "content": "the quick brown fox jumps " * 250_000}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text"}] * 80_000}]},
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_large_body_is_refused_at_once_and_others_go_on(bench: Bench, name: str) -> None:
    body = json.dumps(BODIES[name]).encode()
    path = "/v1/chat/completions" if "messages" in BODIES[name] else "/v1/completions"
    gaps: list[float] = []
    while len(gaps) < 3 and min(gaps, default=GAP_S) >= GAP_S:  # a busy machine may hold up all processes once
        async with a_stream_beside(bench, gaps):
            began = time.monotonic()
            status, answer, _ = await bench.post(path, body)
            took = time.monotonic() - began
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"
    assert min(gaps) < GAP_S
    assert took < 1.0  # 0.2 s by itself; the stream, the coordinator and the client share this process


async def test_large_bodies_at_once_are_held_in_bounded_memory(bench: Bench) -> None:
    """Of 20 bodies that are half sent, 8 are held; small requests are served beside them."""
    host, number = bench.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + b"Content-Length: 8388608\r\n\r\n"
    half = head + b" " * (8 * 2**20 - 1)
    opened = [await asyncio.open_connection(host, int(number)) for _ in range(20)]
    try:
        for _, writer in opened:
            writer.write(half)
            await writer.drain()
        waiting = [asyncio.create_task(reader.readline()) for reader, _ in opened]
        await asyncio.wait(waiting, timeout=2)
        assert [task.result() for task in waiting if task.done()] == [b"HTTP/1.1 503 Service Unavailable\r\n"] * 12
        status, _, _ = await bench.post("/v1/completions", {"prompt": "x"})
        assert status == 200
    finally:
        for task in waiting:
            task.cancel()
        for _, writer in opened:
            writer.transport.abort()


async def test_a_thousand_clients_that_leave_at_once_leave_nothing_behind(bench: Bench) -> None:
    gate = asyncio.Event()
    beside = bench.coordinator.script
    bench.coordinator.script = lambda request: beside(request) if request.cache_salt else Script((5, 6), gate=gate)
    body = json.dumps({"prompt": "x", "n": 16, "stream": True}).encode()
    host, number = bench.url.removeprefix("http://").split(":")
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with a_stream_beside(bench):
        for _ in range(20):
            opened = [await asyncio.open_connection(host, int(number)) for _ in range(50)]
            for _, writer in opened:
                writer.write(request)
            await asyncio.sleep(0.05)
            for _, writer in opened:
                writer.transport.abort()
        async with asyncio.timeout(60):
            while (await metric(bench, "ghostserve:sequences_in_flight")) > 1:
                await asyncio.sleep(0.1)
    submitted = {each.request_id for each in bench.coordinator.submitted if each.cache_salt != BESIDE}
    await bench.coordinator.until(lambda: submitted <= set(bench.coordinator.aborted))


async def metric(bench: Bench, name: str) -> float:
    async with bench.http.get(bench.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line for line in lines if line.startswith(name + " ")).split()[1])


# -- connections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Half"], ids=["silent", "half"])
async def test_probes_and_requests_are_answered_whatever_silent_connections_there_are(
    model_dir: Path, sent: bytes
) -> None:
    async with a_bench(model_dir, max_connections=40) as bench:
        host, number = bench.url.removeprefix("http://").split(":")
        opened = []
        try:
            for _ in range(200):
                opened.append(await asyncio.open_connection(host, int(number)))
                opened[-1][1].write(sent)
            for path in ("/live", "/health", "/metrics"):
                async with aiohttp.ClientSession() as fresh, fresh.get(bench.url + path) as response:
                    assert response.status == 200
            assert (await bench.post("/v1/completions", {"prompt": "x"}))[0] == 200
            async with asyncio.timeout(DEADLINE_S):
                for reader, _ in opened[:150]:  # made room for the others
                    with contextlib.suppress(ConnectionError):
                        assert await reader.read() == b""
        finally:
            for _, writer in opened:
                writer.transport.abort()


async def test_a_silent_connection_is_closed_within_a_minute(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert port.SILENT_S < 60
    monkeypatch.setattr(port, "SILENT_S", 0.2)
    async with a_bench(model_dir) as bench:
        host, number = bench.url.removeprefix("http://").split(":")
        for sent in (b"", b"GET /health HTTP/1.1\r\nHos", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection(host, int(number))
            writer.write(sent)
            async with asyncio.timeout(DEADLINE_S):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.transport.abort()
        async with a_stream_beside(bench):
            await asyncio.sleep(1.0)  # which is not silent


async def test_where_all_is_in_work_more_is_refused_and_probes_are_answered(model_dir: Path) -> None:
    async with a_bench(model_dir, max_connections=2) as bench, a_stream_beside(bench), a_stream_beside(bench):
        status, body, headers = await bench.post("/v1/completions", {"prompt": "x"})
        assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "overloaded", "1")
        for path in ("/live", "/health", "/metrics"):
            async with bench.http.get(bench.url + path) as response:
                assert response.status == 200


# -- below the handlers ------------------------------------------------------------------------------------------------


def post(body: bytes, *, length: int = 0, more: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + more
    return head + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body


WRONG = {
    "brotli": (post(b"{}", more=b"Content-Encoding: br\r\n"), b"400"),
    "an unknown encoding": (post(b"{}", more=b"Content-Encoding: foo\r\n"), b"415"),
    "an expectation": (post(b"{}", more=b"Expect: 200-ok\r\n"), b"417"),
    "a long header": (b"GET /health HTTP/1.1\r\nHost: x\r\nBig: " + b"x" * 100_000 + b"\r\n\r\n", b"400"),
    "a long path": (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
    "no HTTP": (b"NONSENSE\r\n\r\n", b"400"),
    "a broken chunk": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"400",
    ),
}
HALF = {
    "a half head": (b"GET /health HTTP/1.1\r\nHo", b"400"),
    "a half body": (post(b'{"prompt":', length=100), b"400"),
    "a wrong body": (post(b"{"), b"400"),
    "a probe": (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    "a completion": (post(b'{"prompt": "x"}'), b"200"),
    "a stream": (post(b'{"prompt": "x", "stream": true}'), b"200"),
}


async def answer_to(bench: Bench, data: bytes, *, half: bool) -> tuple[bytes, bytes]:
    """Status and body. `half`: the client ends its side at once."""
    host, number = bench.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(number))
    try:
        writer.write(data)
        if half:
            writer.write_eof()
        async with asyncio.timeout(DEADLINE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            while head.split(b" ")[1].startswith(b"1"):
                head = await reader.readuntil(b"\r\n\r\n")
            if not half:
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return head.split(b" ")[1], await (reader.read() if half else reader.readexactly(length))
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("half", [False, True], ids=["open", "half closed"])
async def test_an_error_below_the_handlers_has_openais_shape(bench: Bench, name: str, half: bool) -> None:
    data, wanted = WRONG[name]
    status, body = await answer_to(bench, data, half=half)
    assert status == wanted
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    await bench.until_health(200)


@pytest.mark.parametrize("name", HALF)
async def test_a_client_that_ends_its_side_gets_its_answer(bench: Bench, name: str) -> None:
    data, wanted = HALF[name]
    status, body = await answer_to(bench, data, half=True)
    assert status == wanted
    if wanted == b"400":
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    elif name == "a stream":
        assert b"[DONE]" in body


async def test_a_client_that_ends_its_side_while_it_waits_gets_its_answer(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.coordinator.script = lambda request: Script((5, 6), gate=gate)
    waiting = asyncio.create_task(answer_to(bench, post(b'{"prompt": "x"}'), half=True))
    await bench.coordinator.until(lambda: len(bench.coordinator.submitted) == 1)
    asyncio.get_running_loop().call_later(4 * port.EOF_S, gate.set)
    assert (await waiting)[0] == b"200"


async def test_a_body_may_be_compressed(bench: Bench) -> None:
    import gzip

    data = io.BytesIO(gzip.compress(b'{"prompt": "x"}'))
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with bench.http.post(bench.url + "/v1/completions", data=data, headers=headers) as response:
        assert response.status == 200


# -- rights ------------------------------------------------------------------------------------------------------------

OPERATORS = [("GET", "status"), ("GET", "events"), ("POST", "apply"), ("POST", "faults")]


async def status_of(bench: Bench, method: str, path: str, token: str, body: Any = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with bench.http.request(method, bench.url + path, json=body, headers=headers) as response:
        return response.status


@pytest.mark.parametrize(("method", "path"), OPERATORS)
async def test_what_operators_do_needs_their_own_token(model_dir: Path, method: str, path: str) -> None:
    given = {"api_keys": SecretStr("client"), "token": SecretStr("cluster"), "allow_faults": True}
    path = f"/v1/fault_tolerance/{path}"
    async with a_bench(model_dir, **given, operator_token=SecretStr("operator")) as bench:
        for token in ("", "client", "cluster", "operato"):
            assert await status_of(bench, method, path, token) == 401
        assert await status_of(bench, method, path, "operator") in (200, 415)
    async with a_bench(model_dir, **given) as bench:
        for token in ("", "client", "cluster"):
            assert await status_of(bench, method, path, token) == 403
    async with a_bench(model_dir, allow_faults=True) as bench:  # on loopback, with no keys: whoever is here
        assert await status_of(bench, method, path, "") in (200, 415)


async def test_clients_have_keys_and_the_clusters_token_is_none(model_dir: Path) -> None:
    given = {"api_keys": SecretStr("client"), "token": SecretStr("cluster"), "operator_token": SecretStr("operator")}
    async with a_bench(model_dir, **given) as bench:
        path, body = "/v1/completions", {"prompt": "x"}
        for token, wanted in (("", 401), ("cluster", 401), ("client", 200), ("operator", 200)):
            assert await status_of(bench, "POST", path, token, body) == wanted
        body["return_kv_digest"] = True
        for token, wanted in (("client", 401), ("operator", 200)):
            assert await status_of(bench, "POST", path, token, body) == wanted


# -- other sites' pages ------------------------------------------------------------------------------------------------


async def test_pages_of_named_origins_may_call_the_api(model_dir: Path) -> None:
    given = {"api_keys": SecretStr("client"), "cors_origins": "https://a.example, https://b.example/"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with a_bench(model_dir, **given) as bench:
        for origin, allowed in (("https://b.example", True), ("https://c.example", False)):
            headers = {"Origin": origin} | asks
            async with bench.http.options(bench.url + "/v1/completions", headers=headers) as response:
                assert response.status == (204 if allowed else 401)
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
                assert ("Access-Control-Allow-Headers" in response.headers) == allowed
            async with bench.http.get(bench.url + "/v1/models", headers={"Origin": origin}) as response:
                assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
                assert "Origin" in response.headers["Vary"]
    async with a_bench(model_dir) as bench, bench.http.get(bench.url + "/live", headers={"Origin": "x"}) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


# -- the document ------------------------------------------------------------------------------------------------------


async def test_the_api_is_as_its_openapi_document_says(bench: Bench, tmp_path: Path) -> None:
    """Schemathesis calls every operation with valid and invalid input, and compares answers with the document.

    Not with what the document can't say: that a prompt fits the context, or that two fields exclude each other.
    """
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).parent / "schemathesis", "run", bench.url + "/openapi.json"),
        *("--exclude-path-regex", "/v1/fault_tolerance/(events|apply)", "--exclude-checks", "positive_data_acceptance"),
        *("--max-examples", "8", "--phases", "coverage,fuzzing", "--seed", "1", "--no-color"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(100):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
