"""What a parity store breaks in itself when a drill tells it to; armed only by --fault-dir."""

import os

from services.parity_store.store import Store
from shared import faults


def arm(store: Store, folder: str) -> None:
    """From now on this store can be told to damage its shards."""

    def views() -> list[memoryview]:
        table = store.table
        return [table.view(shard) for group in table.groups for key in table.keys(group) for shard in table.stripe(key)]

    def flip() -> None:
        for view in views():
            view[0] ^= 1

    def scramble() -> None:
        for view in views():
            view[:] = os.urandom(len(view))

    faults.obey(faults.folder(folder), {"corrupt:parity": flip, "garbage": scramble, "heal": lambda: None})
