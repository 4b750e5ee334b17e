"""A coordinator for the gateway's tests: the real control channel, scripted tokens, no model."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType

from aiohttp import web

from shared.channel import CHANNEL_PATH, Channel, accept
from shared.messages import (
    Abort,
    Accepted,
    Failed,
    GatewayHello,
    Message,
    Refused,
    StatusChanged,
    Submit,
    Tokens,
    Welcome,
)
from shared.types import (
    ClusterStatus,
    FinishReason,
    GenerationRequest,
    GroupConfig,
    ModelInfo,
    TokenLogprob,
    pack_ids,
    unpack_ids,
)

DEADLINE_S = 10.0


@dataclass(frozen=True)
class Script:
    """What a request gets: `tokens`, `per_event` at a time, as far as its max_tokens go.

    refuse: instead of all that. fail_after: Failed after that many tokens. gate: waits for this event before the token
    of index `gate_at`. pause_s: between two events.
    """

    tokens: tuple[int, ...] = ()
    finish: FinishReason = "stop"
    per_event: int = 1
    refuse: tuple[int, str, str, str | None] | None = None
    fail_after: int | None = None
    gate: asyncio.Event | None = None
    gate_at: int = 0
    pause_s: float = 0.0
    cached_tokens: int = 0
    digests: tuple[str, ...] = ()


def a_status(model_dir: str, vocab_size: int, eos: tuple[int, ...], max_model_len: int = 256) -> ClusterStatus:
    """The status of a group of three that serves."""
    model = ModelInfo(
        model_dir=model_dir,
        fingerprint="f" * 32,
        architecture="LlamaForCausalLM",
        dtype="float32",
        vocab_size=vocab_size,
        max_positions=max_model_len,
        layers=2,
        kv_heads=3,
        head_dim=8,
        eos_token_ids=eos,
        page_bytes=1024,
    )
    return ClusterStatus(
        group="default",
        state="serving",
        detail="",
        epoch=1,
        served_name="tiny",
        model=model,
        max_model_len=max_model_len,
        size=3,
        parity=1,
        protection="parity",
        can_lose=1,
        reduced_protection="",
        workers=(),
        stores=(),
        running=0,
        waiting=0,
        pages_total=64,
        pages_held=0,
        pages_cached=0,
        pages_lost=0,
        stripes_protected=0,
        stripes_pending=0,
        stripes_unprotected=0,
        unprotected_reason="",
        parity_bytes_stored=0,
        recoveries=(),
    )


class FakeCoordinator:
    """Use as an async context manager; `stop` and `start` play a crash and a return at the same address."""

    def __init__(self, status: ClusterStatus, token: str | None = None):
        self.status = status
        self.script: Callable[[GenerationRequest], Script] = lambda request: Script()
        self.submitted: list[GenerationRequest] = []
        self.resumed: list[Submit] = []
        self.aborted: list[str] = []
        self.channels: list[Channel] = []
        self._token = token
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        """Where gateways dial."""
        return f"ws://127.0.0.1:{self._port}"

    async def __aenter__(self) -> "FakeCoordinator":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, at the same port each time."""
        application = web.Application()
        application.router.add_get(CHANNEL_PATH, self._serve)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()

    async def stop(self) -> None:
        """Close everything at once."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            for channel in list(self.channels):
                await channel.close()
            await runner.cleanup()

    async def push_status(self, **changes: object) -> None:
        """Change the status and tell everyone."""
        self.status = replace(self.status, **changes)  # type: ignore[arg-type]
        for channel in self.channels:
            channel.send(StatusChanged(self.status))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait, with a deadline, for a condition on what was received."""
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(condition)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        websocket, hello = await accept(request, self._token)
        if not isinstance(hello, GatewayHello):
            return websocket
        async with Channel(websocket, hello.name) as channel:
            channel.send(Welcome(_config(self.status), self.status.epoch))
            self.channels.append(channel)
            async with asyncio.TaskGroup() as tasks:
                beating = tasks.create_task(self._beat(channel))
                try:
                    running: dict[str, asyncio.Task[None]] = {}
                    async for message in channel:
                        await self._take(message, channel, running, tasks)
                finally:
                    self.channels.remove(channel)
                    beating.cancel()
                    for task in running.values():
                        task.cancel()
        return websocket

    async def _beat(self, channel: Channel) -> None:
        """Tell the state every second, as a coordinator does: after ten of silence it is not believed any more."""
        while not channel.closed:
            channel.send(StatusChanged(self.status))
            await asyncio.sleep(1.0)

    async def _take(
        self, message: Message, channel: Channel, running: dict[str, asyncio.Task[None]], tasks: asyncio.TaskGroup
    ) -> None:
        async with self._changed:
            match message:
                case Submit():
                    request = message.request
                    if message.generated is None:
                        self.submitted.append(request)
                    else:
                        self.resumed.append(message)
                    had = len(unpack_ids(message.generated or b""))
                    running[request.request_id] = tasks.create_task(self._play(request, channel, had))
                case Abort():
                    self.aborted.append(message.request_id)
                    if task := running.pop(message.request_id, None):
                        task.cancel()
            self._changed.notify_all()

    async def _play(self, request: GenerationRequest, channel: Channel, had: int) -> None:
        script = self.script(request)
        name = request.request_id
        if script.refuse is not None:
            status, code, text, param = script.refuse
            channel.send(Refused(name, status, code, text, param))
            return
        channel.send(Accepted(name))
        tokens = script.tokens[: request.max_tokens]
        finish: FinishReason = "length" if len(script.tokens) > len(tokens) or not tokens else script.finish
        prompt_logprobs = self._prompt_logprobs(request)
        for start in range(had, max(len(tokens), had + 1), script.per_event):
            if script.gate is not None and start == script.gate_at:
                await script.gate.wait()
            if script.fail_after is not None and start >= script.fail_after:
                channel.send(Failed(name, "the model melted"))
                return
            part = tokens[start : start + script.per_event]
            last = start + script.per_event >= len(tokens)
            channel.send(
                Tokens(
                    request_id=name,
                    tokens=pack_ids(part),
                    logprobs=tuple(_logprob(token, request.sampling.logprobs) for token in part)
                    if request.sampling.logprobs is not None
                    else (),
                    prompt_logprobs=prompt_logprobs if start == 0 else (),
                    finish_reason=finish if last else None,
                    cached_tokens=script.cached_tokens,
                    kv_digests=script.digests if last and request.kv_digest else (),
                )
            )
            await asyncio.sleep(script.pause_s)

    @staticmethod
    def _prompt_logprobs(request: GenerationRequest) -> tuple[TokenLogprob, ...]:
        if request.prompt_logprobs is None:
            return ()
        return tuple(_logprob(token, request.prompt_logprobs) for token in unpack_ids(request.prompt)[1:])


def _logprob(token: int, top: int | None) -> TokenLogprob:
    return TokenLogprob(token, -0.5, tuple((token + other, -0.5 - other) for other in range(top or 0)))


def _config(status: ClusterStatus) -> GroupConfig:
    return GroupConfig(
        group=status.group,
        model="",
        served_name=status.served_name,
        dtype="float32",
        size=status.size,
        parity=status.parity,
        protection=status.protection,
        page_tokens=16,
        kv_bytes=1,
        max_step_tokens=512,
        max_batch=32,
        communicator="auto",
        heartbeat_s=0.2,
        heartbeat_timeout_s=3.0,
        collective_timeout_s=60.0,
    )
