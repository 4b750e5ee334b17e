"""Connections from one worker to the parity stores, opened when needed and again after a loss."""

import asyncio
from collections.abc import Sequence

from shared.errors import GhostError
from shared.transport.base import GetShards, Outcome, PutShards
from shared.transport.client import BulkClient

LEAST_BYTES_S = 50e6
"""A store slower than this is not waited for: a lost page is recomputed instead."""


class StoreClients:
    """Bulk clients by address. Used on the event loop only."""

    def __init__(self, token: str | None, *, put_deadline_s: float, fetch_deadline_s: float):
        self._token = token or ""
        self._put_deadline_s = put_deadline_s
        self._fetch_deadline_s = fetch_deadline_s
        self._clients: dict[str, asyncio.Task[BulkClient]] = {}

    async def put(self, address: str, request: PutShards, payloads: Sequence[memoryview]) -> tuple[Outcome, ...]:
        """Store shards; for each None once it counts, or why not. An unreachable store refuses all."""
        try:
            client = await self._client(address)
            return await client.put(request, payloads, timeout=self._put_deadline_s)
        except GhostError as error:
            return (error,) * len(request.shards)

    async def get(self, address: str, request: GetShards, into: Sequence[memoryview]) -> tuple[Outcome, ...]:
        """Read shards into buffers; for each None or why it can't be had."""
        try:
            client = await self._client(address)
            deadline_s = self._fetch_deadline_s + sum(request.lengths) / LEAST_BYTES_S
            return await client.get(request, into, timeout=deadline_s)
        except GhostError as error:
            return (error,) * len(request.shards)

    async def _client(self, address: str) -> BulkClient:
        """The open connection to a store; callers that come together share one attempt to open it."""
        task = self._clients.get(address)
        if task is not None and task.done() and (task.cancelled() or task.exception() or not task.result().is_open):
            task = None
        if task is None:
            task = asyncio.create_task(BulkClient.connect(address, token=self._token))
            self._clients[address] = task
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Close all connections."""
        for task in self._clients.values():
            task.cancel()
        for outcome in await asyncio.gather(*self._clients.values(), return_exceptions=True):
            if isinstance(outcome, BulkClient):
                await outcome.close()
        self._clients.clear()
