"""What the coordinator sends in bulk comes in frames that a receiver takes, and says the same in pieces."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.coordinator.events import Said
from services.coordinator.hosted.engine import HostedEngine
from services.coordinator.protection import encoding
from services.coordinator.protection.encoding import Encoding
from services.coordinator.scheduling.requests import Requests
from services.coordinator.scheduling.scheduler import Completed, NewTokens, Scheduler
from services.parity_store.store import Store
from shared.messages import EngineRun, EngineRuns, KeepStripes, Message, PagesSealed, ReleaseStripes, Submit, Tokens
from shared.types import GenerationRequest, GroupConfig, PageKey, SamplingParams, TokenLogprob, pack_ids
from shared.wire import MAX_FRAME_BYTES, decode, encode
from tests.pure.dictionary_host import EmbeddedPages
from tests.pure.hosted_world import HostedWorld
from tests.pure.world import MODEL

PROMPT = 60_000
QUIET = cast(Any, SimpleNamespace(submitted=lambda _: None, delivered=lambda _: None, ended=lambda _: None))


def test_the_logprobs_of_a_long_prompt_come_in_frames_that_fit() -> None:
    scheduler = Scheduler(
        EmbeddedPages(4, protect=False).cache,
        page_tokens=PROMPT,
        max_step_tokens=512,
        max_batch=1,
        max_waiting=1,
        max_model_len=2 * PROMPT,
        eos_token_ids=(),
    )
    sent: list[Message] = []
    outbox = cast(Any, SimpleNamespace(send=lambda _, message: sent.append(message)))
    requests = Requests(scheduler, MODEL, 1, outbox, QUIET)
    asked = GenerationRequest("r", pack_ids([9] * PROMPT), 1, SamplingParams(), prompt_logprobs=20)
    requests.submit(1, Submit(asked))
    (request,) = scheduler.waiting
    top = tuple((token, -1.5) for token in range(128_000, 128_020))
    request.prompt_logprobs.extend(TokenLogprob(128_000 + number, -0.5, top) for number in range(PROMPT - 1))
    request.tokens.append(7)
    requests.deliver(Completed([], [NewTokens(request, (7,), (), "length")]))
    parts = [message for message in sent if isinstance(message, Tokens)]
    assert max(len(encode(part)) for part in parts) < MAX_FRAME_BYTES // 64
    assert [entry for part in parts for entry in part.prompt_logprobs] == request.prompt_logprobs
    assert [part.finish_reason for part in parts[-2:]] == [None, "length"]
    assert [part.tokens for part in parts if part.tokens] == [pack_ids([7])]


class Listening(Encoding):
    """Over a ledger with so many pages; what it tells stores is in `sent`."""

    def __init__(self, keys: list[PageKey]):
        self.sent: list[Message] = []
        membership = cast(Any, SimpleNamespace(epoch=3, state="forming"))
        stores = cast(Any, SimpleNamespace(send=self.sent.append, open=tuple))
        config = GroupConfig("g", "", "m", "float32", 3, 1, "parity", 16, 1 << 20, 64, 4, "shm", 0.2, 3.0, 10.0)
        host = EmbeddedPages(len(keys))
        super().__init__(config, membership, host, host.ledger, None, stores, cast(Any, SimpleNamespace(ask=print)))
        self.pages = host.ledger
        for number, key in enumerate(keys):
            self.pages.sealed(number, key)


class Table(Store):
    """A store that has these stripes, and forgets what it is told to."""

    def __init__(self, keys: list[PageKey]):
        self.left = set(keys)
        self.table = cast(Any, SimpleNamespace(keys=lambda _: list(self.left)))

    def release(self, group: str, page_keys: Any, up_to: Any = None) -> int:
        self.left.difference_update(page_keys)
        return 0


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_what_stores_keep_is_told_in_parts_that_cover_all_keys_once(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(encoding, "KEYS_AT_ONCE", 4)
    keys = [bytes([17 * number % 251]) * 16 for number in range(1, count + 1)]
    told = Listening(keys)
    told.begin()
    parts = [message for message in told.sent if isinstance(message, KeepStripes)]
    assert all(len(part.keys) <= 4 for part in parts)
    stale = [bytes([number]) * size for number in (0, 1, 40, 100, 254, 255) for size in (16, 32)]
    store = Table([*keys, *stale])
    for part in parts:
        store.keep(part)
    assert store.left == set(keys)


def test_a_large_pool_is_told_in_frames_that_fit() -> None:
    keys = [number.to_bytes(32, "big") for number in range(140_000)]
    told = Listening(keys)
    told.begin()
    for number in range(len(keys)):
        told.pages.dropped(number)
    told.flow()
    assert {type(message) for message in told.sent} == {KeepStripes, ReleaseStripes}
    assert max(len(encode(message)) for message in told.sent) < MAX_FRAME_BYTES // 4
    assert len(told.sent) == 6


def test_a_coordinator_that_is_back_learns_of_all_pages_of_an_engine_with_many_long_requests() -> None:
    requests, each = 160, 100_000 // 16
    pages = requests * each
    keys = {page: page.to_bytes(32, "big") for page in range(pages)}
    tables = [pack_ids(range(start, start + each)) for start in range(0, pages, each)]
    told = [EngineRun(number, f"cmpl-{number:032}-0", table, 100_000) for number, table in enumerate(tables)]
    world = HostedWorld(1, pages=pages)
    world.start_engine()
    while not isinstance(world.group.engine, HostedEngine):
        world.move()
    engine = world.hosted
    peer, quiesced = engine._peer, engine._quiesced
    assert peer is not None
    assert quiesced is not None
    frames = [encode(message) for message in (*PagesSealed.parts(keys), *EngineRuns.parts(quiesced, told))]
    assert max(map(len, frames)) < MAX_FRAME_BYTES // 4
    for frame in frames:
        assert not engine.still()
        world.group.handle(world.now, Said(peer, decode(frame)))
    assert engine.still()
    assert [run.number for run in engine.runs()] == list(range(requests))
    assert all(run.keys == tuple(map(keys.__getitem__, run.pages)) for run in engine.runs())
    assert sum(len(run.keys) for run in engine.runs()) == pages
