"""The gateway over real sockets: OpenAI's own client on one side, a coordinator that plays scripts on the other."""

import asyncio
import contextlib
import io
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from pydantic import SecretStr

from services.gateway import answer, app
from services.gateway.guard import client_keys
from services.gateway.tokenizer import Tokenizer
from shared.config import GatewaySettings
from shared.errors import ConfigError
from shared.types import pack_ids, unpack_ids
from tests.cluster.fake_coordinator import FakeCoordinator, Script, a_status
from tests.otlp import receiving
from tests.tiny_tokenizer import make_tokenizer_dir

DEADLINE_S = 15.0
HELLO: Any = [{"role": "user", "content": "the end"}]
TEXT = "the end of the 日本語 stream 🙂 is not the end"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(str(model_dir))


@dataclass
class Bench:
    """A running gateway, its coordinator, and clients of it."""

    url: str
    coordinator: FakeCoordinator
    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession
    stop: asyncio.Event

    async def until_health(self, status: int) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                async with self.http.get(self.url + "/health") as response:
                    if response.status == status:
                        body: dict[str, Any] = await response.json()
                        return body
                await asyncio.sleep(0.02)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        async with self.http.post(self.url + path, data=io.BytesIO(data), headers=headers) as response:
            return response.status, await response.json(), dict(response.headers)


@asynccontextmanager
async def a_gateway(coordinator: FakeCoordinator, *, key: str = "none", **settings: Any) -> AsyncIterator[Bench]:
    """A gateway on a free port until the end of the block; then it must have stopped cleanly."""
    stop = asyncio.Event()
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    given = GatewaySettings(coordinator_url=coordinator.url, port=0, **settings)
    service = asyncio.create_task(app.run(given, stop, listening.set_result))
    try:
        await asyncio.wait({service, listening}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if service.done():
            await service
        url = listening.result()
        async with (
            openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=DEADLINE_S) as client,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as http,
        ):
            yield Bench(url, coordinator, client, http, stop)
    finally:
        stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await service


@pytest.fixture
async def bench(model_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[Bench]:
    """A gateway that is ready; every request is answered with TEXT, then EOS."""
    async with FakeCoordinator(a_status(str(model_dir), 400, (2,))) as coordinator:
        ids = tuple(tokenizer.encode(TEXT, special=False))
        coordinator.script = lambda request: Script(ids, cached_tokens=2, digests=("d0", "d1", "d2"))
        async with a_gateway(coordinator) as running:
            await running.until_health(200)
            yield running


# -- answers ---------------------------------------------------------------------------------------------------------


async def test_a_completion(bench: Bench) -> None:
    answer = await bench.client.completions.create(model="tiny", prompt="the end", max_tokens=60, user="u", seed=7)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.logprobs) == (TEXT, "stop", None)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert bench.coordinator.submitted[0].sampling.seed == 7
    await bench.coordinator.until(lambda: not bench.coordinator.aborted)


async def test_a_completion_streamed_is_the_same_text(bench: Bench) -> None:
    stream = await bench.client.completions.create(
        model="tiny", prompt="the end", max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_a_hosted_engine_needs_no_tokenizer_here_and_its_requests_go_elsewhere() -> None:
    status = replace(a_status("no/such-model", 400, (2,)), engine="vLLM 0.32.0")
    async with FakeCoordinator(status) as coordinator, a_gateway(coordinator) as gateway:
        await gateway.until_health(200)
        answered, body, _ = await gateway.post("/v1/completions", {"prompt": "the end"})
        assert (answered, body["error"]["code"]) == (400, "hosted_engine")
        assert "vLLM 0.32.0" in body["error"]["message"]
        await coordinator.push_status(state="forming", detail="waiting for 1 more worker(s); 0 loading")
        assert "waiting" in (await gateway.until_health(503))["detail"]


async def test_max_tokens_ends_with_length(bench: Bench) -> None:
    answer = await bench.client.completions.create(model="tiny", prompt="the end", max_tokens=2)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("the end", "length")


async def test_a_chat(bench: Bench) -> None:
    answer = await bench.client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", TEXT, "stop")


async def test_a_chat_streamed_is_the_same_text(bench: Bench) -> None:
    stream = await bench.client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


async def test_several_choices_of_several_prompts(bench: Bench, tokenizer: Tokenizer) -> None:
    def script(request: Any) -> Script:
        text = f"{unpack_ids(request.prompt)[0]} {request.sampling.seed}"
        return Script(tuple(tokenizer.encode(text, special=False)))

    bench.coordinator.script = script
    wanted = ["11 5", "11 6", "12 5", "12 6"]
    answer = await bench.client.completions.create(model="tiny", prompt=[[11], [12]], n=2, seed=5)
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    stream = await bench.client.completions.create(model="tiny", prompt=[[11], [12]], n=2, seed=5, stream=True)
    texts = ["", "", "", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


@pytest.mark.parametrize("stop", [" is not", ["zzz", "ream 🙂"], "🙂"])
async def test_a_stop_string_over_token_borders_ends_the_text_and_the_work(bench: Bench, stop: Any) -> None:
    gate = asyncio.Event()
    script = bench.coordinator.script(None)  # type: ignore[arg-type]
    bench.coordinator.script = lambda request: Script(script.tokens, gate=gate, gate_at=len(script.tokens) - 1)
    first = stop if isinstance(stop, str) else stop[1]
    answer = await bench.client.completions.create(model="tiny", prompt="the", max_tokens=60, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT[: TEXT.index(first)], "stop")
    stream = await bench.client.completions.create(model="tiny", prompt="the", max_tokens=60, stop=stop, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT[: TEXT.index(first)]
    sent = {request.request_id for request in bench.coordinator.submitted}
    await bench.coordinator.until(lambda: set(bench.coordinator.aborted) == sent)


async def test_completion_logprobs_with_echo(bench: Bench) -> None:
    answer = await bench.client.completions.create(model="tiny", prompt="the end", echo=True, logprobs=2, max_tokens=4)
    choice = answer.choices[0]
    assert choice.text == "the end" + "the end of the"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["the", " end", "the", " end", " of", " the"]
    assert choice.logprobs.text_offset == [0, 3, 7, 10, 14, 17]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] is None
    assert len(choice.logprobs.top_logprobs[1]) == 2
    stream = await bench.client.completions.create(
        model="tiny", prompt="the end", echo=True, logprobs=2, max_tokens=4, stream=True
    )
    parts = [chunk.choices[0].logprobs async for chunk in stream]
    assert [token for part in parts if part for token in part.tokens or []] == choice.logprobs.tokens
    assert [offset for part in parts if part for offset in part.text_offset or []] == choice.logprobs.text_offset


async def test_a_prompt_can_be_scored_without_generating(bench: Bench) -> None:
    answer = await bench.client.completions.create(model="tiny", prompt="the end", echo=True, logprobs=0, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("the end", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


async def test_chat_logprobs(bench: Bench) -> None:
    answer = await bench.client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode() == TEXT
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)


async def test_token_ids_and_digests_come_where_they_are_asked_for(bench: Bench, tokenizer: Tokenizer) -> None:
    asked = {"return_token_ids": True, "return_kv_digest": True}
    ids = tokenizer.encode(TEXT, special=False)
    answer = await bench.client.completions.create(model="tiny", prompt="the", max_tokens=60, extra_body=asked)
    extra = answer.choices[0].model_extra or {}
    assert (extra["token_ids"], extra["kv_digests"]) == (ids, ["d0", "d1", "d2"])
    stream = await bench.client.chat.completions.create(model="tiny", messages=HELLO, stream=True, extra_body=asked)
    extras = [chunk.choices[0].model_extra or {} async for chunk in stream]
    assert [token for extra in extras for token in extra.get("token_ids", [])] == ids
    assert [extra["kv_digests"] for extra in extras if "kv_digests" in extra] == [["d0", "d1", "d2"]]


# -- errors ----------------------------------------------------------------------------------------------------------


async def test_errors_have_openais_shape_and_status(bench: Bench) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await bench.client.completions.create(model="tiny", prompt="x", max_tokens="abc")  # type: ignore[call-overload]
    assert (bad.value.param, bad.value.type) == ("max_tokens", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as bad:
        await bench.client.chat.completions.create(model="tiny", messages=HELLO, tools=[{"type": "function"}])  # type: ignore[list-item]
    assert (bad.value.param, bad.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as bad:
        await bench.client.completions.create(model="tiny", prompt=[5] * 300)
    assert (bad.value.param, bad.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as missing:
        await bench.client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await bench.client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError):
        await bench.client.embeddings.create(model="tiny", input="x")
    assert not bench.coordinator.submitted


async def test_http_errors_have_openais_shape(bench: Bench) -> None:
    status, body, headers = await bench.post("/v1/models", {})
    assert (status, headers["Allow"], body["error"]["code"]) == (405, "GET,HEAD", "method_not_allowed")
    status, body, _ = await bench.post("/v1/completions", {}, **{"Content-Type": "text/plain"})
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")
    status, body, _ = await bench.post("/v1/completions", b'{"prompt": "' + b"x" * (9 << 20) + b'"}')
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")
    status, body, _ = await bench.post("/v1/completions", b"{nonsense")
    assert (status, body["error"]["code"]) == (400, "invalid_json")
    await bench.until_health(200)


async def test_a_full_queue_says_when_to_come_back(bench: Bench) -> None:
    bench.coordinator.script = lambda request: Script(refuse=(429, "queue_full", "too many requests are waiting", None))
    with pytest.raises(openai.RateLimitError) as full:
        await bench.client.completions.create(model="tiny", prompt="x", stream=True)
    assert full.value.response.headers["Retry-After"] == "1"
    assert full.value.code == "queue_full"


async def test_one_refused_choice_refuses_all_and_aborts_the_others(bench: Bench) -> None:
    gate = asyncio.Event()

    def script(request: Any) -> Script:
        if request.sampling.seed == 6:
            return Script(refuse=(429, "queue_full", "full", None))
        return Script((5,), gate=gate)

    bench.coordinator.script = script
    with pytest.raises(openai.RateLimitError):
        await bench.client.completions.create(model="tiny", prompt="x", n=3, seed=5)
    await bench.coordinator.until(lambda: len(bench.coordinator.aborted) == 2)


async def test_a_failure_in_mid_stream_raises_in_the_client(bench: Bench) -> None:
    script = bench.coordinator.script(None)  # type: ignore[arg-type]
    bench.coordinator.script = lambda request: Script(script.tokens, fail_after=3)
    stream = await bench.client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    seen = ""
    with pytest.raises(openai.APIError, match="the model melted"):  # noqa: PT012
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            assert chunk.choices[0].finish_reason is None
    assert seen == "the end of"
    with pytest.raises(openai.InternalServerError, match="the model melted"):
        await bench.client.completions.create(model="tiny", prompt="x", max_tokens=60)
    async with bench.http.post(
        bench.url + "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 60}
    ) as response:
        body = await response.text()
    assert "[DONE]" not in body
    assert json.loads(body.rstrip().splitlines()[-1].removeprefix("data: "))["error"]["type"] == "server_error"


# -- keys and binding ------------------------------------------------------------------------------------------------


async def test_a_key_is_needed_where_keys_are_set(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with FakeCoordinator(a_status(str(model_dir), 400, (2,)), token="cluster") as coordinator:
        keys = {"api_keys": SecretStr("first, second-key"), "token": SecretStr("cluster")}
        async with a_gateway(coordinator, key="second-key", **keys) as bench:
            await bench.until_health(200)
            assert (await bench.client.models.list()).data[0].id == "tiny"
            for wrong in ("second", "cluster", "second-keyy", "ключ"):
                status, body, headers = await bench.post("/v1/completions", {}, Authorization=f"Bearer {wrong}")
                assert (status, body["error"]["code"]) == (401, "invalid_api_key")
                assert headers["WWW-Authenticate"] == "Bearer"
            with pytest.raises(openai.AuthenticationError):
                await bench.client.with_options(api_key="wrong").models.list()
            await bench.client.completions.create(model="tiny", prompt="very private text", max_tokens=3)
    logged = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("services", "shared"))
    )
    assert "connected to the coordinator" in logged
    assert "second-key" not in logged
    assert "private" not in logged


async def test_a_bind_that_others_reach_needs_a_key() -> None:
    for settings in (GatewaySettings(host="0.0.0.0", port=0), GatewaySettings(host="::", token=SecretStr("t"))):
        with pytest.raises(ConfigError, match="set API keys"):
            await app.run(settings, asyncio.Event())
    assert client_keys(GatewaySettings(host="127.0.0.1", token=SecretStr("t"))) == []
    assert client_keys(GatewaySettings(host="0.0.0.0", api_keys=SecretStr("a,b"), token=SecretStr("t"))) == [
        "a",
        "b",
    ]


async def test_a_port_that_is_taken_is_a_clear_error(bench: Bench) -> None:
    port = int(bench.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}"):
        await app.run(GatewaySettings(port=port), asyncio.Event())


# -- clients that go away, or do not read ----------------------------------------------------------------------------


async def test_a_client_that_leaves_its_stream_ends_the_work(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.coordinator.script = lambda request: Script((5, 6, 7), gate=gate, gate_at=1)
    stream = await bench.client.completions.create(model="tiny", prompt="x", n=2, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await bench.coordinator.until(lambda: len(bench.coordinator.aborted) == 2)


async def test_a_client_that_leaves_while_it_waits_for_the_whole_ends_the_work(bench: Bench) -> None:
    gate = asyncio.Event()
    bench.coordinator.script = lambda request: Script((5, 6, 7), gate=gate, gate_at=1)
    waiting = asyncio.create_task(bench.client.completions.create(model="tiny", prompt="x"))
    await bench.coordinator.until(lambda: len(bench.coordinator.submitted) == 1)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await bench.coordinator.until(lambda: bench.coordinator.aborted == [bench.coordinator.submitted[0].request_id])


async def test_a_client_that_does_not_read_is_given_up(model_dir: Path) -> None:
    status = a_status(str(model_dir), 400, (2,), max_model_len=10**6)
    async with FakeCoordinator(status) as coordinator:
        coordinator.script = lambda request: Script((5,) * 200_000, per_event=1000)
        async with a_gateway(coordinator, stream_buffer_tokens=5000) as bench:
            await bench.until_health(200)
            host, port = bench.url.removeprefix("http://").split(":")
            narrow = socket.socket()
            narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            narrow.setblocking(False)
            await asyncio.get_running_loop().sock_connect(narrow, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=narrow, limit=1024)
            body = json.dumps({"prompt": "x", "max_tokens": 200_000, "stream": True, "logprobs": 0}).encode()
            writer.write(_request(body))
            await coordinator.until(lambda: len(coordinator.aborted) == 1)
            async with asyncio.timeout(DEADLINE_S):
                answer = b"".join([part async for part in _chunks(reader)])
            writer.close()
            await writer.wait_closed()
            assert b"unread" in answer
            assert b"[DONE]" not in answer
            await bench.until_health(200)


def _request(body: bytes) -> bytes:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode() + b"Connection: close\r\n\r\n" + body


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(1 << 16):
        yield part


async def test_a_silent_stream_is_kept_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_S", 0.02)
    gate = asyncio.Event()
    bench.coordinator.script = lambda request: Script((5, 6, 7), gate=gate, gate_at=1)
    async with bench.http.post(bench.url + "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        async for line in response.content:
            if line.startswith(b":"):
                gate.set()
        assert gate.is_set()
    gate.clear()
    stream = await bench.client.completions.create(model="tiny", prompt="x", stream=True)
    chunks = []
    async for chunk in stream:
        chunks.append(chunk)
        asyncio.get_running_loop().call_later(0.1, gate.set)
    assert len(chunks) == 3


async def test_a_stream_of_which_nothing_is_heard_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_S", 0.02)
    monkeypatch.setattr(answer, "STALL_DEADLINE_S", 0.1)
    gate = asyncio.Event()
    bench.coordinator.script = lambda request: Script((5, 6, 7), gate=gate, gate_at=1)
    with pytest.raises(openai.APIError, match="no token for"):
        async for _ in await bench.client.completions.create(model="tiny", prompt="x", stream=True):
            pass
    await bench.coordinator.until(lambda: len(bench.coordinator.aborted) == 1)


# -- the coordinator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("had", [0, 1, 2])
async def test_a_stream_goes_on_after_its_last_token_when_the_coordinator_is_back(bench: Bench, had: int) -> None:
    gate = asyncio.Event()
    bench.coordinator.script = lambda request: Script((5, 6, 7, 8), gate=gate, gate_at=had, finish="length")
    seen: list[int] = []

    async def away_and_back() -> None:
        await bench.coordinator.until(lambda: len(bench.coordinator.submitted) == 1)
        await bench.coordinator.stop()
        assert (await bench.until_health(503))["status"] == "unavailable"
        status, _, headers = await bench.post("/v1/completions", {"model": "tiny", "prompt": "x"})
        assert status == 503
        assert "Retry-After" in headers
        gate.set()
        await bench.coordinator.start()

    body = {"model": "tiny", "prompt": "x", "max_tokens": 4, "stream": True, "return_token_ids": True}
    async with bench.http.post(bench.url + "/v1/completions", json=body) as response:
        if had == 0:
            await away_and_back()
        async for line in response.content:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    seen.extend(choice.get("token_ids") or [])
                if len(seen) == had:
                    await away_and_back()
    assert seen == [5, 6, 7, 8]
    (again,) = bench.coordinator.resumed
    assert again.generated == pack_ids([5, 6, 7, 8][:had])
    assert again.fingerprint == "f" * 32
    assert again.request == bench.coordinator.submitted[0]


async def test_streams_wait_for_a_coordinator_that_is_away_no_longer_than_set(model_dir: Path) -> None:
    async with FakeCoordinator(a_status(str(model_dir), 400, (2,))) as coordinator:
        coordinator.script = lambda request: Script((5, 6, 7), gate=asyncio.Event(), gate_at=1)
        async with a_gateway(coordinator, reconnect_s=0.3) as bench:
            await bench.until_health(200)
            stream = await bench.client.completions.create(model="tiny", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match=r"away for 0\.3 s"):  # noqa: PT012
                async for _ in stream:
                    await coordinator.stop()
            await coordinator.start()
            await bench.until_health(200)
            assert coordinator.resumed == []


async def test_a_request_that_is_refused_when_it_is_submitted_again_ends_with_an_error(bench: Bench) -> None:
    scripts = iter(
        [Script((5, 6, 7), gate=asyncio.Event(), gate_at=1), Script(refuse=(503, "other_model", "no", None))]
    )
    bench.coordinator.script = lambda request: next(scripts)
    stream = await bench.client.completions.create(model="tiny", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="no"):  # noqa: PT012
        async for _ in stream:
            await bench.coordinator.stop()
            await bench.coordinator.start()


async def test_a_shutdown_lets_streams_end_and_takes_nothing_new(bench: Bench, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    script = Script(tuple(tokenizer.encode(TEXT, special=False)), gate=gate, gate_at=1)
    bench.coordinator.script = lambda request: script
    stream = await bench.client.completions.create(model="tiny", prompt="x", max_tokens=60, stream=True)
    chunks = [await anext(stream)]
    async with bench.http.get(bench.url + "/v1/fault_tolerance/events") as events:
        await events.content.readline()
        bench.stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await events.content.read()  # a watcher is not waited for
    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession() as another:
            await another.get(bench.url + "/health")
    gate.set()
    chunks += [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT


async def test_a_shutdown_in_mid_stream_raises_in_the_client_when_its_time_is_over(model_dir: Path) -> None:
    async with FakeCoordinator(a_status(str(model_dir), 400, (2,))) as coordinator:
        coordinator.script = lambda request: Script((5, 6, 7), gate=asyncio.Event(), gate_at=1)
        async with a_gateway(coordinator, drain_s=0.1) as bench:
            await bench.until_health(200)
            stream = await bench.client.completions.create(model="tiny", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="shutting down"):  # noqa: PT012
                async for _ in stream:
                    bench.stop.set()


async def test_without_a_coordinator_nothing_is_served_and_health_says_why(model_dir: Path) -> None:
    coordinator = FakeCoordinator(a_status(str(model_dir), 400, (2,)))
    async with a_gateway(coordinator) as bench:
        assert "coordinator" in (await bench.until_health(503))["detail"]
        with pytest.raises(openai.InternalServerError):
            await bench.client.models.list()
        async with bench.http.get(bench.url + "/v1/fault_tolerance/status") as response:
            assert response.status == 503


async def test_a_group_in_recovery_is_not_healthy_but_takes_requests(bench: Bench) -> None:
    await bench.coordinator.push_status(state="assigning", detail="rank 1 is lost; waiting for a spare", can_lose=0)
    health = await bench.until_health(503)
    assert health["detail"] == "rank 1 is lost; waiting for a spare"
    assert health["state"] == "assigning"
    answer = await bench.client.completions.create(model="tiny", prompt="x", max_tokens=60)
    assert answer.choices[0].text == TEXT
    await bench.coordinator.push_status(state="serving", detail="")
    await bench.until_health(200)


async def test_a_tokenizer_that_cannot_be_loaded_is_named_in_health(tmp_path: Path) -> None:
    async with FakeCoordinator(a_status(str(tmp_path), 400, (2,))) as coordinator, a_gateway(coordinator) as bench:
        async with asyncio.timeout(DEADLINE_S):
            while "can't be loaded" not in (await bench.until_health(503))["detail"]:
                await asyncio.sleep(0.02)


# -- the rest of the API ---------------------------------------------------------------------------------------------


async def test_models_status_version_metrics_and_openapi(bench: Bench) -> None:
    await bench.client.completions.create(model="tiny", prompt="x", max_tokens=60)
    models = await bench.client.models.list()
    assert [model.id for model in models.data] == ["tiny"]
    assert (await bench.client.models.retrieve("tiny")).owned_by == "ghostserve"

    async def get(path: str) -> tuple[str, str]:
        async with bench.http.get(bench.url + path) as response:
            assert response.status == 200
            return await response.text(), response.content_type

    status = json.loads((await get("/v1/fault_tolerance/status"))[0])
    assert (status["state"], status["size"], status["model"]["kv_heads"]) == ("serving", 3, 3)
    assert json.loads((await get("/version"))[0])["version"]
    assert json.loads((await get("/openapi.json"))[0])["openapi"] == "3.1.0"
    metrics, kind = await get("/metrics")
    assert kind == "text/plain"
    assert 'ghostserve:requests_total{endpoint="/v1/completions",outcome="stop"} 1.0' in metrics
    assert "ghostserve:time_to_first_token_seconds_count 1.0" in metrics
    assert "ghostserve:serving 1.0" in metrics


# -- garbage ---------------------------------------------------------------------------------------------------------

GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    b"GET / HTTP/9.9\r\n\r\n",
    b"NONSENSE\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nBig: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /%00%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\x00: x\r\n\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_is_answered_4xx_and_service_goes_on(
    bench: Bench, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = bench.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(garbage)
    async with asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(ConnectionError):
            assert (await reader.readline()).split(b" ")[1].startswith(b"4")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    answer = await bench.client.completions.create(model="tiny", prompt="x", max_tokens=60)
    assert answer.choices[0].text == TEXT
    assert not any(record.exc_info or record.levelno > logging.INFO for record in caplog.records)


async def test_a_request_is_one_trace_from_the_caller_through_the_gateway(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        async with FakeCoordinator(a_status(str(model_dir), 400, (2,))) as coordinator:
            coordinator.script = lambda request: Script((5, 6))
            async with a_gateway(coordinator) as bench:
                await bench.until_health(200)
                for body, header in (({"prompt": "the end"}, parent), ({"prompt": ""}, "nonsense")):
                    await bench.post("/v1/completions", body, traceparent=header)
                (submitted,) = coordinator.submitted
        served, refused = receiver.spans["ghostserve-gateway"]
    assert submitted.traceparent == f"00-{served.trace_id.hex()}-{served.span_id.hex()}-01"
    assert (served.trace_id.hex(), served.parent_span_id.hex()) == tuple(parent.split("-")[1:3])
    told = {each.key: each.value.string_value for each in served.attributes}
    assert told["ghostserve.outcome"] == "stop"
    assert submitted.request_id.startswith(told["ghostserve.request"])
    assert refused.parent_span_id == b""
    assert refused.status.code == 2


async def test_the_clusters_events_are_told_as_they_come_and_end_with_the_gateway(bench: Bench) -> None:
    async def next_event(lines: aiohttp.StreamReader) -> tuple[str, dict[str, Any]]:
        name = (await lines.readline()).decode().removeprefix("event: ").strip()
        content = json.loads((await lines.readline()).decode().removeprefix("data: "))
        await lines.readline()
        return name, content

    async with bench.http.get(bench.url + "/v1/fault_tolerance/events") as response:
        name, status = await next_event(response.content)
        assert (name, status["state"], status["gateway"]["allow_faults"]) == ("status", "serving", False)
        await bench.coordinator.push_status(state="joining", epoch=2)
        while (await next_event(response.content))[1]["epoch"] != 2:
            pass
        await bench.coordinator.stop()
        while name == "status":
            name, content = await next_event(response.content)
        assert name == "absent"
        assert content["detail"]
        bench.stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await response.content.read()
