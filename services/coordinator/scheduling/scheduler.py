"""What the next step computes: continuous batching, chunked prefill, over the page pool. Pure: no clock, no socket.

What a step costs here grows with the sequences in it, not with what they hold.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from services.coordinator.protection.host import Span
from services.coordinator.protection.rates import StepBound
from services.coordinator.scheduling.batches import BatchBuilder
from services.coordinator.scheduling.prefix_cache import PrefixCache
from shared.messages import Batch, Sample
from shared.types import FinishReason, GenerationRequest, PageKey, TokenLogprob, id_array, next_page_key

PREFILL_SHARE = 4
"""One part of so many of a step's tokens goes to prefill, if there is any, before all that decode have their turn."""
PAGES_MATCHED = 2048
"""Of a newcomer's prefix, so many pages are looked up in a step: a long one's keys take more time than others have."""


@dataclass(slots=True, eq=False)
class Request:
    """One request in work. KV is valid for its first `computed` tokens; `keys` name its sealed pages."""

    number: int
    params: GenerationRequest
    root: PageKey
    tokens: "array[int]"
    prompt_tokens: int
    limit: int
    """Tokens at which it ends."""
    stops: tuple[int, ...]
    """Tokens that end it."""
    computed: int = 0
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    keys: list[PageKey] = field(default_factory=list)
    chain: list[PageKey] = field(default_factory=list)
    """Keys of its full pages as far as they were wanted, sealed or not: tokens never change, so each is hashed once."""
    told: int = -1
    """Entries of its page table that this epoch's ranks know; -1: they don't know it."""
    protected: int = 0
    """Pages from its start that had parity at the ledger's setback number `protected_at`."""
    protected_at: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    goal: int = 0
    """Tokens whose KV is wanted: all; once finished, those that had it."""
    ahead: int = 0
    """Tokens after the first `computed` that steps in flight compute."""
    unknown: int = 0
    """Tokens after the known ones that steps in flight draw, and whose KV will be wanted if nothing ends it before."""
    held: bool = False
    """After a loss, until what of its KV can be restored is: it takes part in no step."""
    resumed: bool = False
    """An earlier coordinator had it in work."""
    had: int = 0
    """Tokens that had KV then, or when slices were last lost: until they have it again, they are recomputed."""

    @property
    def request_id(self) -> str:
        """As its client knows it."""
        return self.params.request_id

    @property
    def remaining(self) -> int:
        """Tokens that are known but have no KV yet. One: it decodes."""
        return self.goal - self.computed

    @property
    def decodes(self) -> bool:
        """Whether all but the last of its tokens have KV, or had it."""
        return self.goal - max(self.computed, self.had) == 1

    @property
    def recomputing(self) -> int:
        """Tokens that had KV and are to have it again."""
        return max(0, self.had - self.computed)


Step = dict[int, tuple[Request, int]]
"""The requests in a step, by number, and so many tokens of each."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a step gave for one request: new tokens to stream, and whether it has ended."""

    request: Request
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completed:
    """What a step gave: requests that have one more token, the last of their `tokens`, and all others."""

    went_on: list[Request]
    others: list[NewTokens]


class Scheduler:
    """Requests waiting and running. `plan` says what to compute, `complete` takes the result of the oldest step.

    A step may be planned while others are in flight: ranks compute them in order, so that each goes on with what the
    one before it leaves, and what that draws is known to the ranks first. A token too many may be computed of a request
    that a drawn token ends; it counts for nothing, and who gets its page writes it in a later step.
    """

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
        bound: StepBound | None = None,
    ):
        """`bound`: how long a step may take."""
        self.cache = cache
        self.page_tokens = page_tokens
        self.max_step_tokens = max_step_tokens
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.max_model_len = max_model_len
        self.eos_token_ids = tuple(eos_token_ids)
        self._bound = bound
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        """By number; who has waited longest for a step comes first."""
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._computed: Step = {}
        """The last one that was completed."""
        self._in_flight: deque[Step] = deque()
        self._planned: Step = {}
        """The one that is being planned."""
        self._ended: list[int] = []
        """Requests that this epoch's ranks know, and that have given back their pages."""
        self._anew = False
        """Whether the ranks are to forget all that they were told."""
        self._sealed: list[tuple[int, PageKey]] = []
        self._next_number = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether no further request may wait."""
        return len(self.waiting) >= self.max_waiting + max(0, self.max_batch - len(self.running))

    def add(self, params: GenerationRequest, root: PageKey) -> Request:
        """Queue a request whose length was checked against `max_model_len`."""
        tokens = id_array(params.prompt)
        limit = min(len(tokens) + params.max_tokens, self.max_model_len)
        stops = params.stop_token_ids + (() if params.ignore_eos else self.eos_token_ids)
        request = Request(self._next_number, params, root, tokens, len(tokens), limit, stops, goal=len(tokens))
        self._next_number += 1
        self.waiting.append(request)
        return request

    def resume(self, params: GenerationRequest, root: PageKey, generated: Iterable[int]) -> Request:
        """Queue a request that an earlier coordinator had in work, with the tokens that it streamed."""
        received = array("i", generated)
        if received:
            params = replace(params, prompt_logprobs=None)  # they went out with the first token
        request = self.add(params, root)
        request.resumed = True
        request.tokens.extend(received)
        request.finish = "length" if received and len(request.tokens) >= request.limit else None
        request.goal = len(request.tokens) - (request.finish is not None)
        request.had = len(request.tokens) - 1 if received else 0
        return request

    def remove(self, request: Request) -> None:
        """End a request, finished or not; its pages are given back. Harmless if it has ended already."""
        if self.running.pop(request.number, None) is None and request in self.waiting:
            self.waiting.remove(request)
        self._give_back(request)

    def requests(self) -> Iterator[Request]:
        """All requests that have not ended."""
        yield from self.running.values()
        yield from self.waiting

    # -- a step ------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many steps are."""
        return len(self._in_flight)

    def of_step(self, place: int) -> list[Request]:
        """The requests of a step in flight, of which the oldest is at place 0."""
        return [request for request, _ in self._in_flight[place].values()]

    def plan(self, limit: int | None = None) -> Batch:
        """The next step. Empty: nothing to do. `limit`: tokens at most, where steps are to be shorter than usual.

        Each running request has a turn of one token, who has waited longest first; then the prefills that run go on in
        chunks, those first that make up for what was lost, who lacks least before the others, then the oldest; then
        newcomers come. A chunk that is cut, so that the step does not take too long, is the last one. Nobody waits
        for more than (requests / tokens a step) steps, rounded up, and one.
        """
        self.cache.tidy(all_of_it=not self.running)
        budget, preemptions = min(self.max_step_tokens, limit or self.max_step_tokens), self.preemptions
        ready = [each for each in self.running.values() if each.goal + each.unknown > each.computed + each.ahead]
        ready = [each for each in ready if not each.held]
        prefill = [each for each in ready if each.goal + each.unknown > each.computed + each.ahead + 1]
        turns = _turns(len(ready), budget, wanted=bool(prefill) or self._newcomer)
        for request in ready[:turns] if turns < len(ready) else ready:
            if request.number in self.running:
                budget -= self._schedule(request, 1)
        room = budget
        for request in sorted(prefill, key=_order):
            if room and request.number in self.running:
                taken, room = self._prefill(request, room)
                budget -= taken
        while room and self._newcomer and preemptions == self.preemptions and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running[request.number] = request
            taken, room = self._prefill(request, room)
            budget -= taken
        for request in ready[turns:]:  # if those that prefill left something
            if budget and request.number in self.running and request.number not in self._planned:
                budget -= self._schedule(request, 1)
        return self._batch()

    def plan_alone(self, request: Request, limit: int | None = None) -> Batch:
        """A step of one running request, where pages can be had for it; see `plan`."""
        self._prefill(request, min(self.max_step_tokens, limit or self.max_step_tokens))
        return self._batch()

    def complete(self, drawn: Mapping[int, int], samples: Iterable[Sample] = ()) -> Completed:
        """Take the result of the oldest step in flight: KV is valid, pages seal, tokens are appended.

        `drawn`: the next token of each request of which there is nothing else to tell.
        """
        size, told = self.page_tokens, {sample.sequence: sample for sample in samples}
        step = self._computed = self._in_flight.popleft()
        went_on: list[Request] = []
        others: list[NewTokens] = []
        for number, (request, count) in step.items():
            request.ahead -= count
            computed = request.computed = request.computed + count
            if computed // size > len(request.keys):
                self._seal(request, computed // size)
            if number in drawn:
                self._append(request, drawn[number], None, went_on, others)
            elif (sample := told.get(number)) is not None:
                have = len(request.prompt_logprobs)
                request.prompt_logprobs.extend(sample.prompt_logprobs[max(0, have - (computed - count)) :])
                self._append(request, sample.token, sample.logprob, went_on, others)
        return Completed(went_on, others)

    def take_sealed(self) -> list[tuple[int, PageKey]]:
        """Pages that have become full since the last time, and their keys."""
        sealed, self._sealed = self._sealed, []
        return sealed

    def spans(self) -> Iterator[Span]:
        """What the last step wrote to the last page of each request that goes on, unless it filled all of it."""
        size = self.page_tokens
        for request, count in self._computed.values():
            end = request.computed
            if not end:  # it has ended
                continue
            first = max(end - count, (end - 1) // size * size)
            if end % size or end - first < size:
                yield Span(request.pages[first // size], first % size, (end - 1) % size + 1)

    def rollback(self) -> None:
        """Forget the steps in flight: the oldest failed, or their epoch has ended, so nothing of them counts.

        Whether the ranks have seen them or not, they are told all sequences anew.
        """
        self._in_flight.clear()
        self._ended.clear()
        self._anew = True
        for request in self.running.values():
            request.ahead, request.unknown, request.told = 0, 0, -1

    # -- recovery ----------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """Slices of pages are gone: no running request takes part in a step before it is truncated to what it has."""
        if self.waiting:
            self._give_back(self.waiting[0])  # what it was about to begin with may not be whole any more
        for request in self.running.values():
            request.held = True

    def readmit(self) -> None:
        """Resumed requests take what is in the pool of their pages, even where slices are missing, and run again."""
        for request in [each for each in self.waiting if each.resumed]:
            if len(self.running) < self.max_batch:
                if request.params.prompt_logprobs is None:
                    self._match(request, (request.goal - 1) // self.page_tokens, whole=False)
                request.held = True
                self.waiting.remove(request)
                self.running[request.number] = request

    def truncate(self, request: Request, tokens: int) -> int:
        """KV is valid for `tokens` tokens only; the rest is recomputed. Returns how many tokens that are."""
        lost, pages = max(request.computed, request.had) - tokens, -(-tokens // self.page_tokens)
        self.cache.release(request.pages[pages:])
        del request.pages[pages:]
        del request.keys[tokens // self.page_tokens :]
        request.had = tokens + max(0, lost)
        request.computed, request.held = tokens, False
        request.protected = min(request.protected, len(request.keys))
        return lost

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _newcomer(self) -> bool:
        """Whether there is one that there is a place for."""
        return bool(self.waiting) and len(self.running) < self.max_batch

    def _admit(self, request: Request) -> bool:
        """Find its prefix in the pool, some pages a step, and see that the rest of its known tokens fits.

        It keeps what it has found, until it is admitted or others want the room.
        """
        if request.params.prompt_logprobs is None:
            reusable = (request.goal - 1) // self.page_tokens
            most = min(reusable, len(request.pages) + PAGES_MATCHED)
            if self._match(request, most, whole=True) == most < reusable:
                return False
        wanted = -(-request.goal // self.page_tokens) - len(request.pages)
        if wanted > self.cache.available:
            return False
        if not (request.cached_tokens or request.resumed):
            request.cached_tokens = min(request.computed, request.prompt_tokens)
        return True

    def _match(self, request: Request, most: int, *, whole: bool) -> int:
        """Take what is in the pool of its first `most` pages, after those that it has. Returns how many it has then."""
        keys = (self._chained(request, place) for place in range(len(request.pages), most))
        request.pages.extend(self.cache.match(keys, whole=whole))
        request.keys = request.chain[: len(request.pages)]
        request.computed = len(request.pages) * self.page_tokens
        return len(request.pages)

    def _prefill(self, request: Request, room: int) -> tuple[int, int]:
        """Put what a step can bear of the next `room` tokens into it. Returns how many, and for how many there is room.

        There is none where the chunk was cut.
        """
        _, before = self._planned.get(request.number, (request, 0))
        start = request.computed + request.ahead
        wanted = min(room, request.goal + request.unknown - start - before)
        fits = self._bound.fits(start, before + wanted) - before if self._bound else wanted
        taken = self._schedule(request, max(0, min(wanted, fits)))
        return taken, room - taken if fits >= wanted else 0

    def _schedule(self, request: Request, most: int) -> int:
        """Put `most` tokens more of a running request into the step, if it has so many. Returns how many it put."""
        _, before = self._planned.get(request.number, (request, 0))
        start = request.computed + request.ahead
        count = min(request.goal + request.unknown - start, before + most)
        end = start + count
        if end > len(request.pages) * self.page_tokens and not self._take_pages(request, end):
            return 0
        self._planned[request.number] = request, count
        return count - before

    def _take_pages(self, request: Request, end: int) -> bool:
        """Pages for the tokens up to `end`, preempting the youngest where they lack."""
        while True:
            pages = self.cache.allocate(-(-end // self.page_tokens) - len(request.pages))
            if pages is not None:
                request.pages.extend(pages)
                return True
            if self.waiting and self.waiting[0].pages:
                self._give_back(self.waiting[0])
                continue
            victim = self._youngest(request)
            if victim is not None:
                self._preempt(victim)
            if victim in (request, None):
                return False

    def _youngest(self, asking: Request) -> Request | None:
        return max(
            (
                each
                for each in self.running.values()
                if each.number not in self._planned and (each.finish is None or each is asking)
            ),
            key=lambda each: each.number,
            default=None,
        )

    def _preempt(self, request: Request) -> None:
        del self.running[request.number]
        self._give_back(request)
        request.had = 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _give_back(self, request: Request) -> None:
        if request.told >= 0:
            self._ended.append(request.number)
        self._drop(request)
        self.cache.release(request.pages)
        request.pages, request.keys, request.computed, request.held = array("i"), [], 0, False
        request.told, request.protected = -1, 0

    def _drop(self, request: Request) -> None:
        """What steps in flight compute of it counts for nothing."""
        for step in self._in_flight:
            step.pop(request.number, None)
        request.ahead = request.unknown = 0

    def _batch(self) -> Batch:
        """What was planned is in flight: as the ranks are told it. Those in it come last from now on."""
        step, self._planned = self._planned, {}
        if not step:
            return Batch()
        running = self.running
        builder = BatchBuilder(self._ended, anew=self._anew)
        self._ended, self._anew = [], False
        rotate = len(step) < len(running)
        for number, (request, count) in step.items():
            if rotate:
                running[number] = running.pop(number)
            draws = builder.add(request, count)
            request.ahead += count
            request.unknown += draws and request.goal + request.unknown + 1 < request.limit
        self._in_flight.append(step)
        return builder.batch()

    def _chained(self, request: Request, place: int) -> PageKey:
        """The key of a request's full page; those of the pages before it are known."""
        chain = request.chain
        if place == len(chain):
            parent = chain[-1] if chain else request.root
            start = place * self.page_tokens
            chain.append(next_page_key(parent, request.tokens[start : start + self.page_tokens]))
        return chain[place]

    def _seal(self, request: Request, full: int) -> None:
        for place in range(len(request.keys), full):
            key, page = self._chained(request, place), request.pages[place]
            request.keys.append(key)
            self._sealed.append((page, key))
            if (now := self.cache.seal(page, key)) != page:
                request.pages[place] = now
                request.told = min(request.told, place)

    def _append(
        self,
        request: Request,
        token: int,
        logprob: TokenLogprob | None,
        went_on: list[Request],
        others: list[NewTokens],
    ) -> None:
        """What a request's next token makes of it, if all its tokens are computed."""
        length = len(request.tokens)
        if request.computed != length or request.finish is not None:
            return
        first = length == request.prompt_tokens
        if first:
            self.prompt_tokens += length
        if length >= request.limit:
            others.append(self._end(request, (), (), "length"))
        elif token in request.stops:
            others.append(self._end(request, (), (), "stop"))
        else:
            request.tokens.append(token)
            self.generated_tokens += 1
            logprobs = (logprob,) if logprob is not None else ()
            if length + 1 >= request.limit:
                others.append(self._end(request, (token,), logprobs, "length"))
                return
            request.goal = length + 1
            request.unknown -= 1
            if first or logprobs:
                others.append(NewTokens(request, (token,), logprobs, None))
            else:
                went_on.append(request)

    def _end(
        self, request: Request, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], finish: FinishReason
    ) -> NewTokens:
        request.finish = finish
        request.goal = request.computed
        self._drop(request)
        return NewTokens(request, tokens, logprobs, finish)

    def check(self) -> None:
        """Raise AssertionError unless pages and page tables agree."""
        self.cache.check([request.pages for request in self.requests()])
        for request in self.requests():
            assert len(request.keys) <= len(request.pages), f"request {request.number}: more keys than pages"
            assert request.computed <= len(request.pages) * self.page_tokens, f"request {request.number}: no page"
            assert request.told <= len(request.pages), f"request {request.number}: ranks know of more pages than it has"
            for page, key in zip(request.pages, () if request.held else request.keys, strict=False):
                assert self.cache.ledger.key(page) == key, f"request {request.number}: page {page} has another key"


def _order(request: Request) -> tuple[bool, int, int]:
    """By which those that prefill come in their order."""
    return not request.recomputing, request.recomputing, request.number


def _turns(ready: int, budget: int, *, wanted: bool) -> int:
    """How many of `ready` requests have a turn in a step of `budget` tokens; `wanted`: prefill wants a part of it.

    Prefill gets its share as long as all have had a turn after ceil(ready / budget) + 1 steps all the same.
    """
    if not wanted:
        return min(ready, budget)
    bound = -(-ready // budget) + 1
    return min(ready, max(budget - max(1, budget // PREFILL_SHARE), -(-ready // bound)))
