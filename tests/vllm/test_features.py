"""What vLLM's API offers goes on across a kill: each request below is made without a fault, and again with one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from tests.vllm.protected import Protected
from tests.vllm.server import prompt, stream
from tests.vllm.streams import Breaks, run_streams, same

pytestmark = pytest.mark.timeout(300)

TOKENS = 40
SWITCHES = {
    "type": "object",
    "properties": {"on": {"type": "array", "items": {"type": "boolean"}, "minItems": 10, "maxItems": 10}},
    "required": ["on"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "switch", "parameters": SWITCHES}}
CHAT = [{"role": "system", "content": "the quick brown fox jumps over the lazy dog " * 8},
        {"role": "user", "content": "does the stream go on when a device dies?"}]  # fmt: skip

COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "two choices": {"n": 2, "seed": 5, "temperature": 0.8},
    "seed": {"seed": 11, "temperature": 1.0, "top_p": 0.9, "extra_body": {"top_k": 40}},
    "penalties": {"presence_penalty": 0.9, "frequency_penalty": 0.4, "extra_body": {"repetition_penalty": 1.3}},
    "logprobs": {"logprobs": 3},
    "stop": {"stop": ["?"]},  # replaced by what the model says
}
CHATS: dict[str, dict[str, Any]] = {
    "chat": {},
    "json schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "switches", "schema": SWITCHES}},
        "max_tokens": 400,
    },
    "tool call": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "switch"}},
        "max_tokens": 400,
    },
}

Result = dict[int, dict[str, Any]]
"""Choice -> what came of it."""


async def _complete(client: AsyncOpenAI, number: int, saw: Callable[[int], None], **parameters: Any) -> Result:
    extra = {"return_token_ids": True, "ignore_eos": True} | parameters.pop("extra_body", {})
    found: Result = {}
    events = await client.completions.create(
        model="m", prompt=prompt(200 + number, 200), max_tokens=TOKENS, stream=True, extra_body=extra,
        **({"temperature": 0} | parameters),
    )  # fmt: skip
    async for event in events:
        for choice in event.choices:
            told = found.setdefault(choice.index, {"tokens": [], "text": "", "logprobs": [], "finish": None})
            told["tokens"] += getattr(choice, "token_ids", None) or []
            told["text"] += choice.text
            told["finish"] = choice.finish_reason or told["finish"]
            if choice.logprobs is not None:
                told["logprobs"] += choice.logprobs.token_logprobs or []
            saw(len(told["tokens"]))
    return found


async def _chat(client: AsyncOpenAI, **parameters: Any) -> Result:
    found: Result = {}
    events = await client.chat.completions.create(
        model="m", messages=CHAT, stream=True, temperature=0, **({"max_tokens": TOKENS} | parameters)
    )
    async for event in events:
        for choice in event.choices:
            told = found.setdefault(choice.index, {"text": "", "finish": None, "calls": {}})
            told["text"] += choice.delta.content or ""
            told["finish"] = choice.finish_reason or told["finish"]
            for call in choice.delta.tool_calls or ():
                name, arguments = told["calls"].get(call.index, ("", ""))
                told["calls"][call.index] = (
                    name + (call.function.name or ""),
                    arguments + (call.function.arguments or ""),
                )
    return found


async def _all(whole: Protected, stop: str, saw: Callable[[int], None] = lambda tokens: None) -> dict[str, Result]:
    async with whole.server.client() as client:
        works = {
            name: _complete(client, number, saw if name == "greedy" else lambda tokens: None,
                            **parameters | ({"stop": [stop]} if name == "stop" else {}))
            for number, (name, parameters) in enumerate(COMPLETIONS.items())
        } | {name: _chat(client, **parameters) for name, parameters in CHATS.items()}  # fmt: skip
        return dict(zip(works, await asyncio.gather(*works.values()), strict=True))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runs(guarded: Protected) -> AsyncIterator[tuple[dict[str, Result], dict[str, Result]]]:
    """All requests at once, without a fault; and again, with a rank killed in the middle."""
    await guarded.whole()
    async with guarded.server.client() as client:
        number = list(COMPLETIONS).index("stop")
        said = (await _complete(client, number, lambda tokens: None))[0]["text"]
    stop = next(said[at : at + 3] for at in range(len(said) // 2, len(said)) if said.index(said[at : at + 3]) == at)
    before = await _all(guarded, stop)
    await guarded.protected()
    known = (await guarded.status())["now"]
    after = await _all(guarded, stop, Breaks(10, lambda: guarded.server.kill(1)))
    (record,) = await guarded.records(known)
    assert record["restored_pages"] > 0
    yield before, after


@pytest.mark.parametrize("name", [*COMPLETIONS, *CHATS])
def test_answers_are_the_same_across_a_kill(runs: tuple[dict[str, Result], dict[str, Result]], name: str) -> None:
    before, after = runs[0][name], runs[1][name]
    logprobs = [[told.pop("logprobs", []) for _, told in sorted(run.items())] for run in (before, after)]
    assert after == before
    for one, other in zip(*logprobs, strict=True):
        assert other == pytest.approx(one, abs=1e-3)
    match name:
        case "two choices":
            assert before[0]["tokens"] != before[1]["tokens"]
            assert len(before[0]["tokens"]) == len(before[1]["tokens"]) == TOKENS
        case "logprobs":
            assert len(logprobs[0][0]) == TOKENS
        case "stop":
            assert before[0]["finish"] == "stop"
            assert 8 < len(before[0]["tokens"]) < TOKENS
        case "json schema":
            assert len(json.loads(after[0]["text"])["on"]) == 10
        case "tool call":
            ((called, arguments),) = after[0]["calls"].values()
            assert called == "switch"
            json.loads(arguments)
        case "chat":
            assert len(after[0]["text"]) > 8


async def test_cancelled_streams_leave_no_block_behind_during_a_recovery_either(whole: Protected) -> None:
    server = whole.server
    before = await run_streams(server, 4)
    await whole.protected()
    started = asyncio.Event()
    cancelled = asyncio.create_task(stream(server, prompt(70, 1500), 400, lambda count: started.set()))
    prefilling = asyncio.create_task(stream(server, prompt(71, 3900), 4))
    await started.wait()
    reading = asyncio.create_task(run_streams(server, 4, Breaks(8, lambda: server.kill(2))))
    pid = server.ranks()[2]
    while server.ranks().get(2) == pid:
        await asyncio.sleep(0.005)
    cancelled.cancel()
    prefilling.cancel()
    same(await reading, before)
    await whole.until(lambda status: not status["running"] and not status["pages_held"], "blocks are held")
