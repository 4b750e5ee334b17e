"""Two hosts of protection for tests, driven alike: one made of dictionaries, and the embedded engine's prefix cache."""

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile

from services.coordinator.protection.host import IdlePages
from services.coordinator.scheduling.prefix_cache import PrefixCache
from shared.types import PageKey
from tests.pure.driven_host import Driven


class DictionaryHost(Driven):
    """The least that a host can be."""

    def __init__(self, count: int, *, protect: bool = True, acks: int = 1):
        super().__init__(count, protect=protect, acks=acks)
        self._free = dict.fromkeys(range(count))
        self._idle: dict[int, None] = {}
        self._holders: Counter[int] = Counter()
        self._keys: dict[int, PageKey] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self._free) + len(self._idle):
            return None
        while count > len(self._free):
            self.gone([next(iter(self._idle))])
        taken = [*self._free][:count]
        for page in taken:
            self._hold(page)
        return taken

    def match(self, keys: Iterable[PageKey], *, whole: bool = True) -> list[int]:
        pages = {key: page for page, key in self._keys.items()}
        here = takewhile(lambda page: page is not None, map(pages.get, keys))
        found = [*takewhile(lambda page: not whole or self.ledger.is_whole(page), here)]
        for page in found:
            self._hold(page)
        return found

    def release(self, pages: Iterable[int]) -> None:
        for page in reversed([*pages]):
            assert self._holders[page], f"page {page} released but not held"
            self._holders[page] -= 1
            self._settle(page)

    def seal(self, page: int, key: PageKey) -> int:
        other = next((each for each, known in self._keys.items() if known == key), None)
        if other is not None and other != page and self.ledger.is_whole(other):
            self._hold(other)
            self.release([page])
            return other
        if other != page:
            if other is not None:
                self.gone([other])
                self.ledger.dropped(other)
            self._keys[page] = key
            self.ledger.sealed(page, key)
        return page

    def key(self, page: int) -> PageKey | None:
        return self._keys.get(page)

    def idle(self) -> IdlePages:
        return self._idle.keys()

    def pin(self, page: int) -> None:
        super().pin(page)
        self._idle.pop(page, None)

    def unpin(self, page: int) -> None:
        super().unpin(page)
        self._settle(page)

    def gone(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._keys.pop(page, None)
            self._settle(page)

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        for page, key in pages:
            del self._free[page]
            self._keys[page], self._idle[page] = key, None

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)
        self._free.pop(page, None)

    def _settle(self, page: int) -> None:
        """What nobody holds or reads any more is idle if it has a key, and otherwise nobody's."""
        if self._holders[page] or self.pins[page]:
            return
        if page in self._keys:
            self._idle.setdefault(page)
            return
        self._idle.pop(page, None)
        self.ledger.dropped(page)
        self._free[page] = None


class EmbeddedPages(Driven):
    """The embedded engine's prefix cache and allocator. Their keeper is the ledger, as `Protection` has it there."""

    def __init__(self, count: int, *, protect: bool = True, acks: int = 1):
        super().__init__(count, protect=protect, acks=acks)
        self.cache = PrefixCache(count, self)

    # -- the keeper --------------------------------------------------------------------------------------------------

    def sealed(self, page: int, key: PageKey) -> None:
        self.ledger.sealed(page, key)

    def unused(self, page: int) -> None:
        """Single tokens are not protected here."""

    def dropped(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.ledger.dropped(page)

    # -- pages -------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self.cache.allocator.free

    def allocate(self, count: int) -> list[int] | None:
        return self.cache.allocate(count)

    def match(self, keys: Iterable[PageKey], *, whole: bool = True) -> list[int]:
        return self.cache.match(keys, whole=whole)

    def release(self, pages: Iterable[int]) -> None:
        self.cache.release(pages)

    def seal(self, page: int, key: PageKey) -> int:
        return self.cache.seal(page, key)

    def key(self, page: int) -> PageKey | None:
        return self.ledger.key(page)

    # -- the host ----------------------------------------------------------------------------------------------------

    def idle(self) -> IdlePages:
        return self.cache.idle()

    def pin(self, page: int) -> None:
        super().pin(page)
        self.cache.pin(page)

    def unpin(self, page: int) -> None:
        super().unpin(page)
        self.cache.unpin(page)

    def gone(self, pages: Iterable[int]) -> None:
        self.cache.gone(pages)

    def adopt(self, pages: Iterable[tuple[int, PageKey]]) -> None:
        self.cache.adopt(pages)

    def check(self) -> None:
        super().check()
        self.cache.check(table.pages for table in self.tables)
