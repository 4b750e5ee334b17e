"""What became of a server that lost a worker in mid-stream, in figures and in words. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROMPT_TOKENS, TOKENS = 2000, 64
KILL_AFTER = TOKENS // 3


@dataclass(slots=True)
class Outcome:
    """What became of a server and its stream. Seconds since the kill; None: not while it was watched.

    `healthy_s`: how long /health went on to say 200; None: it never stopped. `token_s`: the first token of the answer
    that the client gets after the kill, on the same stream, or from a server that was started again by hand.
    """

    name: str
    streamed_before: int = 0
    streamed_after: int = 0
    stream_error: str = ""
    stream_ended_s: float | None = None
    healthy_s: float | None = None
    exited_s: float | None = None
    exit_code: int | None = None
    restarted_by_hand: bool = False
    token_s: float | None = None

    @property
    def streamed(self) -> int:
        """Tokens that the client got on its one stream."""
        return self.streamed_before + self.streamed_after

    @property
    def whole(self) -> bool:
        """Whether the stream came to its end."""
        return not self.stream_error and self.streamed == TOKENS


def in_words(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A table: its head, and a row for each thing that a client or an operator sees."""
    tell: dict[str, Callable[[Outcome], str]] = {
        "the client's stream": lambda each: (
            f"{'goes on to its end' if each.whole else 'breaks off'}: {each.streamed} of {TOKENS} tokens"
        ),
        "`/health` says 200": lambda each: (
            "all the time" if each.healthy_s is None else f"for {each.healthy_s:.1f} s more"
        ),
        "the server": lambda each: (
            "lives" if each.exited_s is None else f"exits after {each.exited_s:.1f} s with code {each.exit_code}"
        ),
        "next token of the answer": lambda each: (
            "never"
            if each.token_s is None
            else f"{each.token_s:.2f} s after the kill{', restarted by hand' if each.restarted_by_hand else ''}"
        ),
    }
    head = [f"a worker of three gets SIGKILL after {KILL_AFTER} tokens", *(each.name for each in outcomes)]
    return [head, *([what, *map(told, outcomes)] for what, told in tell.items())]
