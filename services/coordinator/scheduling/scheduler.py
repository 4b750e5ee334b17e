"""What the next step computes: continuous batching, chunked prefill, over the page pool. Pure: no clock, no socket."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from services.coordinator.protection.host import Span
from services.coordinator.scheduling.prefix_cache import PrefixCache
from shared.messages import Sample, SequenceStep
from shared.types import (
    FinishReason,
    GenerationRequest,
    PageKey,
    TokenLogprob,
    next_page_key,
    pack_ids,
    pack_keys,
    unpack_ids,
)


@dataclass(slots=True, eq=False)
class Request:
    """One request in work. KV is valid for its first `computed` tokens; `keys` name its sealed pages."""

    number: int
    params: GenerationRequest
    root: PageKey
    tokens: list[int]
    prompt_tokens: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[PageKey] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    goal: int = 0
    """Tokens whose KV is wanted: all; once finished, those that had it."""
    held: bool = False
    """After a loss, until what of its KV can be restored is: it takes part in no step."""
    resumed: bool = False
    """An earlier coordinator had it in work."""
    had: int = 0
    """Tokens that had KV then, for the count of those that are recomputed."""

    @property
    def request_id(self) -> str:
        """As its client knows it."""
        return self.params.request_id

    @property
    def remaining(self) -> int:
        """Tokens that are known but have no KV yet. One: it decodes."""
        return self.goal - self.computed


@dataclass(frozen=True, slots=True)
class Part:
    """A request's share of the step in flight: so many tokens, which fill pages of these keys."""

    request: Request
    count: int
    seals: list[PageKey]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a step gave for one request: new tokens to stream, and whether it has ended."""

    request: Request
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason | None


class Scheduler:
    """Requests waiting and running. `plan` says what to compute, `complete` takes the result; one step at a time."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        page_tokens: int,
        max_step_tokens: int,
        max_batch: int,
        max_waiting: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
    ):
        self.cache = cache
        self.page_tokens = page_tokens
        self.max_step_tokens = max_step_tokens
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._computed: list[tuple[Request, int]] = []
        """What the last step that was completed computed: requests, and each one's first position."""
        self._in_flight: list[Part] = []
        self._next_number = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether no further request may wait."""
        return len(self.waiting) >= self.max_waiting + max(0, self.max_batch - len(self.running))

    def add(self, params: GenerationRequest, root: PageKey) -> Request:
        """Queue a request whose length was checked against `max_model_len`."""
        tokens = unpack_ids(params.prompt)
        request = Request(self._next_number, params, root, tokens, len(tokens), goal=len(tokens))
        self._next_number += 1
        self.waiting.append(request)
        return request

    def resume(self, params: GenerationRequest, root: PageKey, generated: list[int]) -> Request:
        """Queue a request that an earlier coordinator had in work, with the tokens that it streamed."""
        if generated:
            params = replace(params, prompt_logprobs=None)  # they went out with the first token
        request = self.add(params, root)
        request.resumed = True
        request.tokens.extend(generated)
        ended = 0 < params.max_tokens <= len(generated) or len(request.tokens) >= self.max_model_len
        request.finish = "length" if generated and ended else None
        request.goal = len(request.tokens) - (request.finish is not None)
        request.had = len(request.tokens) - 1 if generated else 0
        return request

    def remove(self, request: Request) -> None:
        """End a request, finished or not; its pages are given back. Harmless if it has ended already."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._give_back(request)

    def requests(self) -> Iterator[Request]:
        """All requests that have not ended."""
        yield from self.running
        yield from self.waiting

    # -- a step ------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._in_flight)

    def plan(self, limit: int | None = None) -> tuple[SequenceStep, ...]:
        """The next step: decoding requests first, then prefill in chunks, then newcomers. Empty: nothing to do.

        `limit`: tokens at most, where steps are to be shorter than usual.
        """
        if self._in_flight:
            raise AssertionError("a step is in flight")
        budget, preemptions = min(self.max_step_tokens, limit or self.max_step_tokens), self.preemptions
        for request in sorted(self.running, key=lambda each: each.remaining > 1):
            if budget and request.remaining and not request.held and request in self.running:
                budget -= self._schedule(request, min(request.remaining, budget))
        while self.waiting and budget and len(self.running) < self.max_batch and preemptions == self.preemptions:
            if not self._admit(self.waiting[0]):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            budget -= self._schedule(request, min(request.remaining, budget))
        return tuple(self._step(part) for part in self._in_flight)

    def plan_alone(self, request: Request, limit: int | None = None) -> tuple[SequenceStep, ...]:
        """A step of one running request, where pages can be had for it; see `plan`."""
        if self._in_flight:
            raise AssertionError("a step is in flight")
        self._schedule(request, min(request.remaining, self.max_step_tokens, limit or self.max_step_tokens))
        return tuple(self._step(part) for part in self._in_flight)

    @property
    def in_flight(self) -> tuple[str, ...]:
        """The requests in the step in flight, by their clients' ids."""
        return tuple(part.request.request_id for part in self._in_flight)

    def complete(self, samples: tuple[Sample, ...]) -> list[NewTokens]:
        """Take the result of the step in flight: KV is valid, pages seal, tokens are appended."""
        drawn = {sample.sequence: sample for sample in samples}
        outputs = []
        in_flight, self._in_flight = self._in_flight, []
        self._computed = []
        for part in in_flight:
            request, start = part.request, part.request.computed
            if request not in self.running:
                continue
            request.computed += part.count
            self._seal(part)
            self._computed.append((request, start))
            sample = drawn.get(request.number)
            if sample is None:
                continue
            have = len(request.prompt_logprobs)
            request.prompt_logprobs.extend(sample.prompt_logprobs[max(0, have - start) :])
            if request.computed == len(request.tokens) and request.finish is None:
                outputs.append(self._append(request, sample))
        return outputs

    def spans(self) -> Iterator[Span]:
        """What the last step wrote to the last page of each request that goes on, unless it filled all of it."""
        size = self.page_tokens
        for request, start in self._computed:
            end = request.computed  # 0: it has ended
            first = max(start, (end - 1) // size * size)
            if end > start and (end % size or end - first < size):
                yield Span(request.pages[first // size], first % size, (end - 1) % size + 1)

    def rollback(self) -> None:
        """Forget the step in flight: it failed, or its epoch has ended, so nothing of it counts."""
        self._in_flight = []

    # -- recovery ----------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """Slices of pages are gone: no running request takes part in a step before it is truncated to what it has."""
        for request in self.running:
            request.held = True

    def readmit(self) -> None:
        """Resumed requests take what is in the pool of their pages, even where slices are missing, and run again."""
        for request in [each for each in self.waiting if each.resumed]:
            if len(self.running) < self.max_batch:
                if request.params.prompt_logprobs is None:
                    self._match(request, whole=False)
                request.held = True
                self.waiting.remove(request)
                self.running.append(request)

    def truncate(self, request: Request, tokens: int) -> int:
        """KV is valid for `tokens` tokens only; the rest is recomputed. Returns how many tokens that are."""
        lost, pages = max(request.computed, request.had) - tokens, -(-tokens // self.page_tokens)
        self.cache.release(request.pages[pages:])
        del request.pages[pages:]
        del request.keys[tokens // self.page_tokens :]
        request.computed, request.had, request.held = tokens, 0, False
        return lost

    # -- inside ------------------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> bool:
        """Find its prefix in the pool, and see that the rest of its known tokens fits."""
        if request.params.prompt_logprobs is None:
            self._match(request, whole=True)
            if not (request.cached_tokens or request.resumed):
                request.cached_tokens = min(request.computed, request.prompt_tokens)
        wanted = -(-request.goal // self.page_tokens) - len(request.pages)
        if wanted <= self.cache.available:
            return True
        self._give_back(request)
        return False

    def _match(self, request: Request, *, whole: bool) -> None:
        reusable = (request.goal - 1) // self.page_tokens
        request.keys = self._chain(request, 0, reusable)
        request.pages = self.cache.match(request.keys, whole=whole)
        del request.keys[len(request.pages) :]
        request.computed = len(request.pages) * self.page_tokens

    def _schedule(self, request: Request, count: int) -> int:
        """Put `count` tokens of a running request into the step, preempting the youngest where pages lack."""
        full, rest = divmod(request.computed + count, self.page_tokens)
        needed = full + (rest > 0) - len(request.pages)
        while needed > 0:
            pages = self.cache.allocate(needed)
            if pages is not None:
                request.pages.extend(pages)
                break
            victim = self._youngest(request)
            if victim is not None:
                self._preempt(victim)
            if victim in (request, None):
                return 0
        self._in_flight.append(Part(request, count, self._chain(request, len(request.keys), full)))
        return count

    def _youngest(self, asking: Request) -> Request | None:
        scheduled = {id(part.request) for part in self._in_flight}
        return max(
            (each for each in self.running if id(each) not in scheduled and (each.finish is None or each is asking)),
            key=lambda each: each.number,
            default=None,
        )

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_back(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _give_back(self, request: Request) -> None:
        self.cache.release(request.pages)
        request.pages, request.keys, request.computed, request.held = [], [], 0, False

    def _step(self, part: Part) -> SequenceStep:
        request, params = part.request, part.request.params
        start, end = request.computed, request.computed + part.count
        samples = end == len(request.tokens) and request.finish is None
        prompt_logprobs = params.prompt_logprobs if start < request.prompt_tokens else None
        history = samples and params.sampling.needs_history
        return SequenceStep(
            sequence=request.number,
            tokens=pack_ids(request.tokens[start:end]),
            start=start,
            prompt_tokens=request.prompt_tokens,
            pages=pack_ids(request.pages[: -(-end // self.page_tokens)]),
            logits="all" if prompt_logprobs is not None else "last" if samples else "none",
            sampling=params.sampling if samples else None,
            prompt_logprobs=prompt_logprobs,
            next_token=request.tokens[end] if end < len(request.tokens) else -1,
            prompt=params.prompt if history else b"",
            history=pack_ids(request.tokens[request.prompt_tokens :]) if history else b"",
            seals=pack_keys(part.seals),
        )

    def _chain(self, request: Request, start: int, end: int) -> list[PageKey]:
        """Keys of the pages start .. end - 1 of a request; those before are sealed."""
        keys, parent = [], request.keys[start - 1] if start else request.root
        for page in range(start, end):
            parent = next_page_key(parent, request.tokens[page * self.page_tokens : (page + 1) * self.page_tokens])
            keys.append(parent)
        return keys

    def _seal(self, part: Part) -> None:
        request = part.request
        for page, key in enumerate(part.seals, len(request.keys)):
            request.keys.append(key)
            request.pages[page] = self.cache.seal(request.pages[page], key)

    def _append(self, request: Request, sample: Sample) -> NewTokens:
        params = request.params
        if len(request.tokens) == request.prompt_tokens:
            self.prompt_tokens += request.prompt_tokens
        stops = sample.token in params.stop_token_ids or (sample.token in self.eos_token_ids and not params.ignore_eos)
        produced = len(request.tokens) - request.prompt_tokens
        if params.max_tokens == 0:
            return self._end(request, (), (), "length")
        if stops:
            return self._end(request, (), (), "stop")
        request.tokens.append(sample.token)
        self.generated_tokens += 1
        logprobs = (sample.logprob,) if sample.logprob is not None else ()
        if produced + 1 >= params.max_tokens or len(request.tokens) >= self.max_model_len:
            return self._end(request, (sample.token,), logprobs, "length")
        request.goal = len(request.tokens)
        return NewTokens(request, (sample.token,), logprobs, None)

    def _end(
        self, request: Request, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], finish: FinishReason
    ) -> NewTokens:
        request.finish = finish
        request.goal = request.computed
        return NewTokens(request, tokens, logprobs, finish)

    def check(self) -> None:
        """Raise AssertionError unless pages and page tables agree."""
        self.cache.check([request.pages for request in self.requests()])
        for request in self.requests():
            assert len(request.keys) <= len(request.pages), f"request {request.number}: more keys than pages"
            assert request.computed <= len(request.pages) * self.page_tokens, f"request {request.number}: no page"
            for page, key in zip(request.pages, () if request.held else request.keys, strict=False):
                assert self.cache.key(page) == key, f"request {request.number}: page {page} has another key"
