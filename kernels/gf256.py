"""Arithmetic in GF(2^8) with polynomial 0x11D, for matrices; shards themselves are multiplied by the backends.

Source: J. S. Plank, "A Tutorial on Reed-Solomon Coding for Fault-Tolerance in RAID-like Systems", 1997; the polynomial
x^8 + x^4 + x^3 + x^2 + 1 is also that of Linux RAID 6 and of ISA-L.
"""

import numpy as np
import numpy.typing as npt

from kernels.errors import CodecError

POLYNOMIAL = 0x11D
Matrix = npt.NDArray[np.uint8]


def multiply_slowly(a: int, b: int) -> int:
    """Return a * b by the definition: multiply polynomials over GF(2), reduce by POLYNOMIAL. For tables and tests."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= POLYNOMIAL << (bit - 8)
    return product


def _tables() -> tuple[list[int], list[int]]:
    """Return powers of the generator 2 (twice around, so that sums of logarithms need no modulo), and logarithms."""
    power, exponents, logarithms = 1, [0] * 510, [0] * 256
    for exponent in range(255):
        exponents[exponent] = exponents[exponent + 255] = power
        logarithms[power] = exponent
        power = multiply_slowly(power, 2)
    return exponents, logarithms


_EXP, _LOG = _tables()


def multiply(a: int, b: int) -> int:
    """Return a * b."""
    return _EXP[_LOG[a] + _LOG[b]] if a and b else 0


def inverse(a: int) -> int:
    """Return 1 / a. Raises CodecError for 0."""
    if not a:
        raise CodecError("0 has no inverse")
    return _EXP[255 - _LOG[a]]


TABLE: Matrix = np.array([[multiply(a, b) for b in range(256)] for a in range(256)], dtype=np.uint8)
"""TABLE[a, b] = a * b."""
TABLE.setflags(write=False)


def matrix_multiply(a: Matrix, b: Matrix) -> Matrix:
    """Return the product of a [n, l] and b [l, p]."""
    product = np.zeros((a.shape[0], b.shape[1]), dtype=np.uint8)
    for step in range(a.shape[1]):
        product ^= TABLE[a[:, step, None], b[step]]
    return product


def invert(matrix: Matrix) -> Matrix:
    """Return the inverse of a square matrix by Gauss-Jordan elimination. Raises CodecError if it has none."""
    size = matrix.shape[0]
    both = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        candidates = np.flatnonzero(both[column:, column])
        if not candidates.size:
            raise CodecError("the matrix has no inverse")
        pivot = column + int(candidates[0])
        both[[column, pivot]] = both[[pivot, column]]
        both[column] = TABLE[inverse(int(both[column, column])), both[column]]
        factors = both[:, column].copy()
        factors[column] = 0
        both ^= TABLE[factors[:, None], both[column]]
    return np.ascontiguousarray(both[:, size:])
