"""The requests of a group: taken or refused, streamed to the gateways, ended when nobody waits any more."""

import logging
from array import array
from dataclasses import dataclass, field

import numpy as np

from services.coordinator.events import Peer
from services.coordinator.outbox import Outbox
from services.coordinator.scheduling.scheduler import Completed, NewTokens, Request, Scheduler
from services.coordinator.views.traces import Traces
from shared.messages import Accepted, DigestDone, DigestPlan, Failed, NextTokens, Refused, Submit, Tokens
from shared.types import ModelInfo, id_array, pack_ids, root_key

log = logging.getLogger(__name__)

PROMPT_LOGPROBS = 256
"""In one message, of which a prompt takes as many as it needs: a frame has an end, and others wait behind it."""


@dataclass(slots=True)
class Ticket:
    """A request that a gateway waits for."""

    request_id: str
    gateway: Peer
    request: Request


@dataclass(slots=True)
class Digests:
    """The ranks' hashes of one request's KV, as they come in."""

    plan: int
    request: Request
    values: dict[int, str] = field(default_factory=dict)


class Requests:
    """Tickets between gateways and the scheduler's requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: ModelInfo,
        size: int,
        outbox: Outbox,
        traces: Traces,
    ):
        self._scheduler = scheduler
        self._model = model
        self._size = size
        self._outbox = outbox
        self._traces = traces
        self._tickets: dict[str, Ticket] = {}
        self._unhashed: dict[int, Request] = {}
        """Finished requests that wait for their digests."""
        self._digests: dict[int, Digests] = {}
        self._plans = 0

    def submit(self, gateway: Peer, submit: Submit) -> None:
        """Queue a request, or refuse it and say why. One that was accepted before goes on after its last token."""
        params = submit.request
        resumed, known = submit.generated is not None, self._tickets.get(params.request_id)
        if resumed and known is not None:
            self._end(known)  # its gateway lost the channel, and is back before that is known here
        refusal = self._refusal(submit, resumed=resumed)
        if refusal is not None:
            self._outbox.send(gateway, refusal)
            return
        root = root_key(self._model.fingerprint, params.cache_salt)
        if submit.generated is None:
            request = self._scheduler.add(params, root)
        else:
            request = self._scheduler.resume(params, root, id_array(submit.generated))
        self._tickets[params.request_id] = Ticket(params.request_id, gateway, request)
        self._traces.submitted(request)
        log.debug("queued", extra={"request": params.request_id, "prompt_tokens": request.prompt_tokens})
        self._outbox.send(gateway, Accepted(params.request_id))
        if request.finish is not None and params.kv_digest:
            self._unhashed[request.number] = request
        elif request.finish is not None:
            self._send(request, NewTokens(request, (), (), request.finish), ())

    def _refusal(self, submit: Submit, *, resumed: bool) -> Refused | None:
        params, limit, vocabulary = submit.request, self._scheduler.max_model_len, self._model.vocab_size
        name = params.request_id
        if name in self._tickets:
            return Refused(name, 400, "duplicate_request", "a request of this id is running")
        if submit.fingerprint not in ("", self._model.fingerprint):
            return Refused(name, 503, "other_model", "another model is served now than the request was made for")
        if self._scheduler.full and not resumed:
            waiting = len(self._scheduler.waiting)
            return Refused(name, 429, "queue_full", f"{waiting} requests are waiting; try again later")
        try:
            prompt, generated = id_array(params.prompt), id_array(submit.generated or b"")
        except ValueError:
            return Refused(name, 400, "invalid_prompt", "the prompt is not a list of token ids", "prompt")
        if not prompt or not all(_within(ids, vocabulary) for ids in (prompt, generated)):
            text = f"a prompt has 1 or more token ids from 0 to {vocabulary - 1}"
            return Refused(name, 400, "invalid_prompt", text, "prompt")
        if len(prompt) + params.max_tokens > limit:
            text = (
                f"{len(prompt)} prompt tokens and {params.max_tokens} to generate are more than the context of {limit}"
            )
            return Refused(name, 400, "context_length_exceeded", text, "max_tokens")
        return None

    def fail(self, request_id: str, reason: str) -> None:
        """A request can't be finished: its client is told, and it ends."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._outbox.send(ticket.gateway, Failed(request_id, reason))
            self._end(ticket)

    def abort(self, gateway: Peer, request_id: str) -> None:
        """Nobody waits for this request any more."""
        ticket = self._tickets.get(request_id)
        if ticket is not None and ticket.gateway == gateway:
            self._end(ticket)

    def gateway_gone(self, gateway: Peer) -> None:
        """A gateway is lost, and with it all who wait behind it."""
        for ticket in [each for each in self._tickets.values() if each.gateway == gateway]:
            self._end(ticket)

    def deliver(self, completed: Completed) -> None:
        """Stream what a step gave: one message for each gateway, but for what has more to tell than a token."""
        batches: dict[Peer, tuple[list[str], list[int]]] = {}
        for request in completed.went_on:
            if (ticket := self._tickets.get(request.params.request_id)) is not None:
                names, tokens = batches.setdefault(ticket.gateway, ([], []))
                names.append(ticket.request_id)
                tokens.append(request.tokens[-1])
        for gateway, (names, tokens) in batches.items():
            self._outbox.send(gateway, NextTokens(tuple(names), pack_ids(tokens)))
        for output in completed.others:
            self._deliver(output)

    def _deliver(self, output: NewTokens) -> None:
        """A finished request that is to be hashed keeps its last message back until it is."""
        request = output.request
        self._traces.delivered(output)
        if request.params.kv_digest and output.finish is not None:
            self._unhashed[request.number] = request
            output = NewTokens(request, output.tokens, output.logprobs, None)
        self._send(request, output, ())

    def _send(self, request: Request, output: NewTokens, digests: tuple[str, ...]) -> None:
        ticket = self._tickets.get(request.params.request_id)
        if ticket is None:
            return
        first = len(request.tokens) - request.prompt_tokens <= len(output.tokens)
        if output.tokens or output.finish:
            of_prompt = request.prompt_logprobs if first else []
            last = max(0, len(of_prompt) - 1) // PROMPT_LOGPROBS * PROMPT_LOGPROBS
            for start in range(0, last, PROMPT_LOGPROBS):
                part = tuple(of_prompt[start : start + PROMPT_LOGPROBS])
                self._outbox.send(ticket.gateway, Tokens(ticket.request_id, b"", (), part, None, 0))
            self._outbox.send(
                ticket.gateway,
                Tokens(
                    request_id=ticket.request_id,
                    tokens=pack_ids(output.tokens),
                    logprobs=output.logprobs,
                    prompt_logprobs=tuple(of_prompt[last:]),
                    finish_reason=output.finish,
                    cached_tokens=request.cached_tokens,
                    kv_digests=digests,
                ),
            )
        if output.finish is not None:
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        del self._tickets[ticket.request_id]
        self._digests.pop(ticket.request.number, None)
        self._unhashed.pop(ticket.request.number, None)
        self._traces.ended(ticket.request)
        log.debug("ended", extra={"request": ticket.request_id, "finish": ticket.request.finish or "aborted"})
        self._scheduler.remove(ticket.request)

    # -- digests -----------------------------------------------------------------------------------------------------

    def interrupted(self) -> None:
        """The epoch is over: its digests are asked for again."""
        self._digests.clear()

    def ask_digests(self, epoch: int) -> None:
        """Have finished requests hashed that asked for it, once their KV is whole."""
        for request in self._unhashed.values():
            runs = request.number in self._scheduler.running and not request.remaining and not request.held
            if runs and request.number not in self._digests:
                self._plans += 1
                self._digests[request.number] = Digests(self._plans, request)
                self._outbox.to_ranks(DigestPlan(epoch, self._plans, pack_ids(request.pages), request.computed))

    def digest_done(self, message: DigestDone) -> None:
        """A rank's hash is there; with the last one the request ends."""
        for digests in list(self._digests.values()):
            if digests.plan == message.digest:
                digests.values[message.rank] = message.value
                if len(digests.values) == self._size:
                    values = tuple(digests.values[rank] for rank in range(self._size))
                    self._send(digests.request, NewTokens(digests.request, (), (), digests.request.finish), values)


def _within(ids: "array[int]", vocabulary: int) -> bool:
    """Whether all are tokens of the model; in numpy, since there may be a million."""
    tokens = np.frombuffer(ids, dtype=np.int32)
    return not len(tokens) or bool(tokens.min() >= 0 and tokens.max() < vocabulary)
