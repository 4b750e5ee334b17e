"""Which backend an address belongs to: its scheme says."""

from shared.transport import tcp
from shared.transport.base import Listener, Stream


async def listen(address: str) -> Listener:
    """Listen on an address, for example tcp://127.0.0.1:0 (port 0: a free one). Raises ConfigError."""
    return await tcp.listen(address)


async def connect(address: str) -> Stream:
    """Connect to an address; the caller bounds the wait. Raises PeerLost or ConfigError."""
    return await tcp.connect(address)
