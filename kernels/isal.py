"""Backend for CPUs: Intel ISA-L's ec_encode_data, called through ctypes (which releases the GIL) on separate buffers.

Source: isa-l/include/erasure_code.h. Its tables are made from our matrices; its own matrix generators are not used.
"""

import ctypes
import ctypes.util
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from kernels.errors import CodecError
from kernels.gf256 import Matrix

_TABLE_BYTES = 32  # for each coefficient: products with the low and with the high half of a byte


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
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(path)
        library.ec_init_tables.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        library.ec_init_tables.restype = None
        library.ec_encode_data.argtypes = [
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        library.ec_encode_data.restype = None
    except (OSError, AttributeError) as error:
        raise CodecError(f"ISA-L at {path} can't be used: {error}") from error
    return library


_MAX_CALL = 1 << 30  # bytes of a shard in one call: its length is an int


class Tables:
    """A matrix [rows, columns] prepared for ISA-L; immutable, for any number of threads."""

    def __init__(self, matrix: Matrix):
        self.rows, self.columns = matrix.shape
        contiguous = np.ascontiguousarray(matrix)
        self._tables = np.empty(self.rows * self.columns * _TABLE_BYTES, dtype=np.uint8)
        _library().ec_init_tables(self.columns, self.rows, contiguous.ctypes.data, self._tables.ctypes.data)
        self._pointers = ctypes.c_void_p * self.columns
        self._targets = ctypes.c_void_p * self.rows

    def apply(self, length: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Write target[i] = sum over j of matrix[i, j] * source[j], length bytes at these addresses.

        The caller guarantees that the memory is there, and that targets overlap nothing.
        """
        encode, tables = _library().ec_encode_data, self._tables.ctypes.data
        for start in range(0, length, _MAX_CALL):
            step = min(_MAX_CALL, length - start)
            encode(
                step,
                self.columns,
                self.rows,
                tables,
                self._pointers(*(address + start for address in sources)),
                self._targets(*(address + start for address in targets)),
            )
