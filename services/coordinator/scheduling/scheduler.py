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
class Sequence:
    """One request in work. KV is valid for its first `computed` tokens; `keys` name its sealed pages."""

    number: int
    request: GenerationRequest
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
        return self.request.request_id

    @property
    def remaining(self) -> int:
        """Tokens that are known but have no KV yet. One: it decodes."""
        return self.goal - self.computed


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's share of the step in flight: so many tokens, which fill pages of these keys."""

    sequence: Sequence
    count: int
    seals: list[PageKey]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What a step gave for one sequence: new tokens to stream, and whether it has ended."""

    sequence: Sequence
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason | None


class Scheduler:
    """Sequences waiting and running. `plan` says what to compute, `complete` takes the result; one step at a time."""

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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._computed: list[tuple[Sequence, int]] = []
        """What the last step that was completed computed: sequences, and each one's first position."""
        self._in_flight: list[Part] = []
        self._next_number = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """Whether no further request may wait."""
        return len(self.waiting) >= self.max_waiting + max(0, self.max_batch - len(self.running))

    def add(self, request: GenerationRequest, root: PageKey) -> Sequence:
        """Queue a request whose length was checked against `max_model_len`."""
        tokens = unpack_ids(request.prompt)
        sequence = Sequence(self._next_number, request, root, tokens, len(tokens), goal=len(tokens))
        self._next_number += 1
        self.waiting.append(sequence)
        return sequence

    def resume(self, request: GenerationRequest, root: PageKey, generated: list[int]) -> Sequence:
        """Queue a request that an earlier coordinator had in work, with the tokens that it streamed."""
        if generated:
            request = replace(request, prompt_logprobs=None)  # they went out with the first token
        sequence = self.add(request, root)
        sequence.resumed = True
        sequence.tokens.extend(generated)
        ended = 0 < request.max_tokens <= len(generated) or len(sequence.tokens) >= self.max_model_len
        sequence.finish = "length" if generated and ended else None
        sequence.goal = len(sequence.tokens) - (sequence.finish is not None)
        sequence.had = len(sequence.tokens) - 1 if generated else 0
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, finished or not; its pages are given back. Harmless if it has ended already."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def sequences(self) -> Iterator[Sequence]:
        """All sequences that have not ended."""
        yield from self.running
        yield from self.waiting

    # -- a step ------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._in_flight)

    def plan(self, limit: int | None = None) -> tuple[SequenceStep, ...]:
        """The next step: decoding sequences first, then prefill in chunks, then newcomers. Empty: nothing to do.

        `limit`: tokens at most, where steps are to be shorter than usual.
        """
        if self._in_flight:
            raise AssertionError("a step is in flight")
        budget, preemptions = min(self.max_step_tokens, limit or self.max_step_tokens), self.preemptions
        for sequence in sorted(self.running, key=lambda each: each.remaining > 1):
            if budget and sequence.remaining and not sequence.held and sequence in self.running:
                budget -= self._schedule(sequence, min(sequence.remaining, budget))
        while self.waiting and budget and len(self.running) < self.max_batch and preemptions == self.preemptions:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._schedule(sequence, min(sequence.remaining, budget))
        return tuple(self._step(part) for part in self._in_flight)

    def complete(self, samples: tuple[Sample, ...]) -> list[NewTokens]:
        """Take the result of the step in flight: KV is valid, pages seal, tokens are appended."""
        drawn = {sample.sequence: sample for sample in samples}
        outputs = []
        in_flight, self._in_flight = self._in_flight, []
        self._computed = []
        for part in in_flight:
            sequence, start = part.sequence, part.sequence.computed
            if sequence not in self.running:
                continue
            sequence.computed += part.count
            self._seal(part)
            self._computed.append((sequence, start))
            sample = drawn.get(sequence.number)
            if sample is None:
                continue
            have = len(sequence.prompt_logprobs)
            sequence.prompt_logprobs.extend(sample.prompt_logprobs[max(0, have - start) :])
            if sequence.computed == len(sequence.tokens) and sequence.finish is None:
                outputs.append(self._append(sequence, sample))
        return outputs

    def spans(self) -> Iterator[Span]:
        """What the last step wrote to the last page of each sequence that goes on, unless it filled all of it."""
        size = self.page_tokens
        for sequence, start in self._computed:
            end = sequence.computed  # 0: it has ended
            first = max(start, (end - 1) // size * size)
            if end > start and (end % size or end - first < size):
                yield Span(sequence.pages[first // size], first % size, (end - 1) % size + 1)

    def rollback(self) -> None:
        """Forget the step in flight: its epoch has ended, so nothing of it counts."""
        self._in_flight = []

    # -- recovery ----------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """Slices of pages are gone: no running sequence takes part in a step before it is truncated to what it has."""
        for sequence in self.running:
            sequence.held = True

    def readmit(self) -> None:
        """Resumed sequences take what is in the pool of their pages, even where slices are missing, and run again."""
        for sequence in [each for each in self.waiting if each.resumed]:
            if len(self.running) < self.max_batch:
                if sequence.request.prompt_logprobs is None:
                    self._match(sequence, whole=False)
                sequence.held = True
                self.waiting.remove(sequence)
                self.running.append(sequence)

    def truncate(self, sequence: Sequence, tokens: int) -> int:
        """KV is valid for `tokens` tokens only; the rest is recomputed. Returns how many tokens that are."""
        lost, pages = max(sequence.computed, sequence.had) - tokens, -(-tokens // self.page_tokens)
        self.cache.release(sequence.pages[pages:])
        del sequence.pages[pages:]
        del sequence.keys[tokens // self.page_tokens :]
        sequence.computed, sequence.had, sequence.held = tokens, 0, False
        return lost

    # -- inside ------------------------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence) -> bool:
        """Find its prefix in the pool, and see that the rest of its known tokens fits."""
        if sequence.request.prompt_logprobs is None:
            self._match(sequence, whole=True)
            if not (sequence.cached_tokens or sequence.resumed):
                sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
        wanted = -(-sequence.goal // self.page_tokens) - len(sequence.pages)
        if wanted <= self.cache.available:
            return True
        self._give_back(sequence)
        return False

    def _match(self, sequence: Sequence, *, whole: bool) -> None:
        reusable = (sequence.goal - 1) // self.page_tokens
        sequence.keys = self._chain(sequence, 0, reusable)
        sequence.pages = self.cache.match(sequence.keys, whole=whole)
        del sequence.keys[len(sequence.pages) :]
        sequence.computed = len(sequence.pages) * self.page_tokens

    def _schedule(self, sequence: Sequence, count: int) -> int:
        """Put `count` tokens of a running sequence into the step, preempting the youngest where pages lack."""
        full, rest = divmod(sequence.computed + count, self.page_tokens)
        needed = full + (rest > 0) - len(sequence.pages)
        while needed > 0:
            pages = self.cache.allocate(needed)
            if pages is not None:
                sequence.pages.extend(pages)
                break
            victim = self._youngest(sequence)
            if victim is not None:
                self._preempt(victim)
            if victim in (sequence, None):
                return 0
        self._in_flight.append(Part(sequence, count, self._chain(sequence, len(sequence.keys), full)))
        return count

    def _youngest(self, asking: Sequence) -> Sequence | None:
        scheduled = {id(part.sequence) for part in self._in_flight}
        return max(
            (each for each in self.running if id(each) not in scheduled and (each.finish is None or each is asking)),
            key=lambda each: each.number,
            default=None,
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.cache.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.computed, sequence.held = [], [], 0, False

    def _step(self, part: Part) -> SequenceStep:
        sequence, request = part.sequence, part.sequence.request
        start, end = sequence.computed, sequence.computed + part.count
        samples = end == len(sequence.tokens) and sequence.finish is None
        prompt_logprobs = request.prompt_logprobs if start < sequence.prompt_tokens else None
        history = samples and request.sampling.needs_history
        return SequenceStep(
            sequence=sequence.number,
            tokens=pack_ids(sequence.tokens[start:end]),
            start=start,
            prompt_tokens=sequence.prompt_tokens,
            pages=pack_ids(sequence.pages[: -(-end // self.page_tokens)]),
            logits="all" if prompt_logprobs is not None else "last" if samples else "none",
            sampling=request.sampling if samples else None,
            prompt_logprobs=prompt_logprobs,
            next_token=sequence.tokens[end] if end < len(sequence.tokens) else -1,
            prompt=request.prompt if history else b"",
            history=pack_ids(sequence.tokens[sequence.prompt_tokens :]) if history else b"",
            seals=pack_keys(part.seals),
        )

    def _chain(self, sequence: Sequence, start: int, end: int) -> list[PageKey]:
        """Keys of the pages start .. end - 1 of a sequence; those before are sealed."""
        keys, parent = [], sequence.keys[start - 1] if start else sequence.root
        for page in range(start, end):
            parent = next_page_key(parent, sequence.tokens[page * self.page_tokens : (page + 1) * self.page_tokens])
            keys.append(parent)
        return keys

    def _seal(self, part: Part) -> None:
        sequence = part.sequence
        for page, key in enumerate(part.seals, len(sequence.keys)):
            sequence.keys.append(key)
            sequence.pages[page] = self.cache.seal(sequence.pages[page], key)

    def _append(self, sequence: Sequence, sample: Sample) -> NewTokens:
        request = sequence.request
        if len(sequence.tokens) == sequence.prompt_tokens:
            self.prompt_tokens += sequence.prompt_tokens
        stops = sample.token in request.stop_token_ids or (
            sample.token in self.eos_token_ids and not request.ignore_eos
        )
        produced = len(sequence.tokens) - sequence.prompt_tokens
        if request.max_tokens == 0:
            return self._end(sequence, (), (), "length")
        if stops:
            return self._end(sequence, (), (), "stop")
        sequence.tokens.append(sample.token)
        self.generated_tokens += 1
        logprobs = (sample.logprob,) if sample.logprob is not None else ()
        if produced + 1 >= request.max_tokens or len(sequence.tokens) >= self.max_model_len:
            return self._end(sequence, (sample.token,), logprobs, "length")
        sequence.goal = len(sequence.tokens)
        return NewTokens(sequence, (sample.token,), logprobs, None)

    def _end(
        self, sequence: Sequence, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], finish: FinishReason
    ) -> NewTokens:
        sequence.finish = finish
        sequence.goal = sequence.computed
        return NewTokens(sequence, tokens, logprobs, finish)

    def check(self) -> None:
        """Raise AssertionError unless pages and page tables agree."""
        self.cache.check([sequence.pages for sequence in self.sequences()])
        for sequence in self.sequences():
            assert len(sequence.keys) <= len(sequence.pages), f"sequence {sequence.number}: more keys than pages"
            assert sequence.computed <= len(sequence.pages) * self.page_tokens, f"sequence {sequence.number}: no page"
            for page, key in zip(sequence.pages, () if sequence.held else sequence.keys, strict=False):
                assert self.cache.key(page) == key, f"sequence {sequence.number}: page {page} has another key"
