"""The one tree of errors. A library's own exception is translated by the module that wraps the library.

GhostError
├── ConfigError            a setting is wrong: what it was, what is allowed
├── ProtocolError          a peer sent something that is not a valid frame
├── PeerLost               a connection broke, or its peer did not answer in time
│   └── DeadlineExceeded   the peer is there, but did not answer in time
│       └── CutOff         a rank can't reach the place where all of an epoch meet
├── Fenced                 the sender's epoch is older than the receiver's
├── CommunicatorAborted    a collective ended because its epoch ended or a peer died
├── StoreFull              a parity store has no room
├── ShardMissing           a shard is not where the index says
├── ChecksumMismatch       bytes are not those that were recorded
├── ModelError             a model can't be loaded or split as asked
└── RequestRejected        a request can't be served: its HTTP status, code and parameter
"""


class GhostError(Exception):
    """Base of every error that GhostServe raises on purpose."""


class ConfigError(GhostError):
    """A setting is wrong. The message says what it was and what is allowed."""


class ProtocolError(GhostError):
    """A peer sent something that is not a valid frame; its connection is closed."""


class PeerLost(GhostError):
    """A connection broke or could not be made."""


class DeadlineExceeded(PeerLost):
    """A peer did not answer within the deadline given."""


class CutOff(DeadlineExceeded):
    """A rank's host can't reach the place where all ranks of the epoch meet."""


class Fenced(GhostError):
    """Something of an older epoch tried to have an effect."""


class CommunicatorAborted(GhostError):
    """A collective ended early: its epoch was aborted, or a peer is gone."""


class StoreFull(GhostError):
    """A parity store has no room for the shard."""


class ShardMissing(GhostError):
    """A shard that the index names is not in the store."""


class ChecksumMismatch(GhostError):
    """Bytes differ from the checksum recorded for them."""


class ModelError(GhostError):
    """A model can't be loaded, or not split into the ranks asked for."""


class RequestRejected(GhostError):
    """A request can't be served.

    Attributes: status (HTTP), code (OpenAI's error code), param (the offending field, if one).
    """

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request", param: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
