"""Which backend an address belongs to: its scheme says. And which one `auto` takes on this machine."""

from pathlib import Path
from typing import Literal

from shared.errors import ConfigError
from shared.transport import tcp, ucx, ucx_engine
from shared.transport.base import Listener, Stream

Transport = Literal["auto", "tcp", "ucx"]


async def listen(address: str) -> Listener:
    """Listen on an address, for example tcp://127.0.0.1:0 (port 0: a free one). Raises ConfigError."""
    return await (ucx.listen(address) if address.startswith("ucx:") else tcp.listen(address))


async def connect(address: str) -> Stream:
    """Connect to an address; the caller bounds the wait. Raises PeerLost or ConfigError."""
    return await (ucx.connect(address) if address.startswith("ucx:") else tcp.connect(address))


def choose(wanted: Transport) -> tuple[str, str]:
    """Return the scheme, tcp or ucx, that this setting means here, and why. Raises ConfigError."""
    if wanted == "tcp":
        return "tcp", "asked for"
    if wanted == "ucx":
        if not ucx_engine.is_installed():
            raise ConfigError("transport ucx needs UCXX: pip install 'ghostserve[ucx]'")
        return "ucx", "asked for"
    if not ucx_engine.is_installed():
        return "tcp", "UCXX is not installed"
    if devices := rdma_devices():
        return "ucx", f"RDMA over {', '.join(devices)}"
    return "tcp", "no RDMA device, and over plain sockets it is the faster and the leaner as measured"


def cuda_present() -> bool:
    """Say whether this machine has a CUDA device and its driver."""
    return Path("/dev/nvidiactl").exists()


def rdma_devices() -> list[str]:
    """Return the names of this machine's RDMA devices."""
    return sorted(device.name for device in Path("/sys/class/infiniband").glob("*"))
