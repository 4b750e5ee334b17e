"""What a parity store breaks in itself when a drill tells it to; armed only by --fault-dir."""

import os
from typing import Any, NoReturn

from services.parity_store.store import Store
from shared import faults
from shared.errors import StoreFull


def arm(store: Store, folder: str) -> None:
    """From now on this store can be told to damage its shards."""

    def views() -> list[memoryview]:
        table = store.table
        return [table.view(shard) for group in table.groups for key in table.keys(group) for shard in table.stripe(key)]

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise StoreFull("no room: a drill says so")

    def flip() -> None:
        for view in views():
            view[0] ^= 1

    def scramble() -> None:
        for view in views():
            view[:] = os.urandom(len(view))

    def fill() -> None:
        store.table.begin = refuse  # type: ignore[method-assign]

    def heal() -> None:
        vars(store.table).pop("begin", None)

    faults.obey(faults.folder(folder), {"corrupt:parity": flip, "garbage": scramble, "full": fill, "heal": heal})
