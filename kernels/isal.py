"""Backend for CPUs: Intel ISA-L's ec_encode_data, called through cffi (which releases the GIL) on separate buffers.

cffi and not ctypes, because looking up a buffer's address costs it 0.2 us instead of 1.2, and a page is encoded in 15.

Source: isa-l/include/erasure_code.h. Its tables are made from our matrices; its own matrix generators are not used.
"""

import ctypes.util
import threading
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from kernels.errors import CodecError
from kernels.gf256 import Matrix

_FUNCTIONS = """
void ec_init_tables(int columns, int rows, char *matrix, char *tables);
void ec_encode_data(int length, int columns, int rows, char *tables, char **sources, char **targets);
"""
_TABLE_BYTES = 32  # for each coefficient: products with the low and with the high half of a byte
_MAX_CALL = 1 << 30  # bytes of a shard in one call, whose length is an int
_THREAD_BYTES = 8 << 20  # of sources, that make a thread worth its start: ISA-L takes 0.5 ms for them
_PAST_ALL = 1 << 65  # further than any shard from the end of memory
_LINE = 64  # threads write different cache lines

_ffi: Any = cffi.FFI()
_ffi.cdef(_FUNCTIONS)
_read = _ffi.from_buffer
_write = partial(_ffi.from_buffer, require_writable=True)
_ADDRESSES = _ffi.typeof("uintptr_t *")
_POINTERS = _ffi.typeof("char **")


def library_path() -> str:
    """Return where libisal is: the system's, or the one bundled in the pyeclib wheel. Raises CodecError if neither."""
    system = ctypes.util.find_library("isal")
    if system:
        return system
    try:
        bundled = [Path(str(file.locate())) for file in distribution("pyeclib").files or () if "libisal" in file.name]
    except PackageNotFoundError:
        bundled = []
    for path in bundled:
        if path.exists():
            return str(path)
    raise CodecError("ISA-L is not here: install the system package libisal2, or the Python package pyeclib")


@cache
def library() -> Any:
    """Return libisal, with ec_init_tables and ec_encode_data. Raises CodecError."""
    path = library_path()
    try:
        loaded = _ffi.dlopen(path)
        _ = loaded.ec_init_tables, loaded.ec_encode_data
    except (OSError, AttributeError) as error:
        raise CodecError(f"ISA-L at {path} can't be used: {error}") from error
    return loaded


class Tables:
    """A matrix [rows, columns] prepared for ISA-L; immutable, for any number of threads."""

    def __init__(self, matrix: Matrix, threads: int = 1):
        self.rows, self.columns = matrix.shape
        self._threads = threads
        self._shards = _ffi.typeof(f"char *[{self.columns + self.rows}]")
        self._numbers = _ffi.typeof(f"uintptr_t[{self.columns + self.rows}]")
        self._tables = _ffi.new("char[]", self.rows * self.columns * _TABLE_BYTES)
        self._encode = library().ec_encode_data
        library().ec_init_tables(self.columns, self.rows, _read(np.ascontiguousarray(matrix)), self._tables)

    def apply(self, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        """Write target[i] = sum over j of matrix[i, j] * source[j], for contiguous buffers of equal length.

        Raises CodecError if they are not that, too few or many, read-only where written, or if a target overlaps.
        """
        rows, columns = self.rows, self.columns
        if len(sources) != columns or len(targets) != rows:
            raise CodecError(
                f"{len(sources)} sources and {len(targets)} targets given; {columns} and {rows} are needed"
            )
        try:
            views = [*map(_read, sources), *map(_write, targets)]
        except (TypeError, ValueError, BufferError) as error:
            raise CodecError(
                f"a shard is a contiguous buffer in this host's memory, writable if a target: {error}"
            ) from error
        lengths = {*map(len, views)}
        if len(lengths) > 1:
            raise CodecError(f"shards of unequal length: {sorted(lengths)}")
        (length,) = lengths
        if not length:
            return
        pointers = _ffi.new(self._shards, views)
        addresses = _ffi.unpack(_ffi.cast(_ADDRESSES, pointers), columns + rows)
        check_apart(addresses, columns, length)
        if self._in_one_call(length):
            self._encode(length, columns, rows, self._tables, pointers, pointers + columns)
        else:
            self._apply_in_parts(addresses, length)

    def apply_at(self, addresses: Any, length: int) -> None:
        """Do the same for stripes of shards given by address, uint64 [stripes, shards], contiguous.

        The caller guarantees what apply checks. Stripes that follow each other in memory are coded as one.
        """
        follows = (np.diff(addresses, axis=0) == length).all(axis=1)
        firsts = np.flatnonzero(np.concatenate([[True], ~follows]))[: len(addresses)]
        lengths = (np.diff(firsts, append=len(addresses)) * length).tolist()
        stripes = np.ascontiguousarray(addresses[firsts])
        table = _ffi.cast(_POINTERS, stripes.ctypes.data)
        for number, size in enumerate(lengths):
            if self._in_one_call(size):
                pointers = table + number * (self.columns + self.rows)
                self._encode(size, self.columns, self.rows, self._tables, pointers, pointers + self.columns)
            else:
                self._apply_in_parts(stripes[number].tolist(), size)

    def _in_one_call(self, length: int) -> bool:
        return length < _MAX_CALL and (self._threads == 1 or length * self.columns < 2 * _THREAD_BYTES)

    def _apply_in_parts(self, addresses: Sequence[int], length: int) -> None:
        """Code a long stripe in threads: ISA-L runs without the GIL."""
        threads = max(1, min(self._threads, length * self.columns // _THREAD_BYTES))
        size = min(_MAX_CALL, -(-length // threads))
        size += -size % _LINE
        parts = [(start, min(start + size, length)) for start in range(0, length, size)]
        if threads == 1:
            for part in parts:
                self._apply_part(addresses, *part)
            return
        workers = [threading.Thread(target=self._apply_part, args=(addresses, *part)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _apply_part(self, addresses: Sequence[int], start: int, end: int) -> None:
        shards = _ffi.new(self._numbers, [address + start for address in addresses] if start else addresses)
        pointers = _ffi.cast(_POINTERS, shards)
        self._encode(end - start, self.columns, self.rows, self._tables, pointers, pointers + self.columns)


def check_apart(addresses: Sequence[int], columns: int, length: int) -> None:
    """Raise CodecError if a target, which are those after the first columns, overlaps another shard."""
    in_order = [-length, *sorted(addresses), _PAST_ALL]
    for start in addresses[columns:]:
        place = in_order.index(start)
        if in_order[place + 1] - start < length or start - in_order[place - 1] < length:
            raise CodecError("a target overlaps another shard")
