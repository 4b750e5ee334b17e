"""What a replay tells: the core's own log, with the time at which it happened then, and who came and went."""

import logging
from collections.abc import Callable, Sequence

from services.coordinator.events import Answered, Came, Effect, Event, Left, Peer, Said, Tick
from services.coordinator.group import Group
from services.coordinator.recording.replay import sent
from services.coordinator.recording.segments import Entry
from shared import logs


class Narrator(logging.Handler):
    """Prints what the core logs, with the time at which it happened then, and where it is asked for each event."""

    def __init__(self, tell: Callable[[str, str], None], began: float, *, events: bool):
        """`tell` prints a line in a style of rich's; `began`: the core's clock at the beginning."""
        super().__init__(logging.DEBUG)
        self._tell = tell
        self._began = began
        self._events = events
        self._entry: Entry | None = None
        self._peers: dict[Peer, str] = {}
        self._formatter = logs.Bare()

    def __enter__(self) -> None:
        core = logging.getLogger("services.coordinator")
        self._before = core.level, core.propagate
        core.addHandler(self)
        core.setLevel(logging.DEBUG)
        core.propagate = False

    def __exit__(self, *_: object) -> None:
        core = logging.getLogger("services.coordinator")
        core.removeHandler(self)
        core.level, core.propagate = self._before

    def begins(self, entry: Entry, group: Group) -> None:
        """See Watcher."""
        self._entry = entry
        self._peers = group.peers()

    def ended(self, entry: Entry, group: Group, outputs: Sequence[Effect]) -> None:
        """See Watcher."""
        if isinstance(entry.event, Came):
            self._peers = group.peers()
            self._print(f"{self._peers.get(entry.event.peer)} connects", "green")
        if self._events:
            told = ", ".join(map(sent, outputs))
            self._print(self._shown(entry.event) + (f" -> {told}" if told else ""), "dim")
        self._entry = None

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the core's."""
        if self._entry is not None:
            style = "yellow" if record.levelno >= logging.WARNING else "dim" if record.levelno < logging.INFO else ""
            self._print(self._formatter.format(record), style)

    def _print(self, text: str, style: str) -> None:
        if self._entry is not None:
            at = f"{self._entry.now - self._began:10.3f} s  #{self._entry.number:<7} "
            self._tell(at + text, style)

    def _shown(self, event: Event) -> str:
        match event:
            case Tick():
                return "tick"
            case Said(peer, message):
                return f"{self._peers.get(peer, f'peer {peer}')}: {message}"
            case Left(peer, reason):
                return f"{self._peers.get(peer, f'peer {peer}')} disconnects: {reason}"
            case Answered(number, answer):
                return f"answer to question {number}: {answer}"
            case Came(peer, hello):
                return f"{self._peers.get(peer)}: {hello}"
