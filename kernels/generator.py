"""The erasure code's one definition: generator, and decode matrices by inversion. Every backend computes from these.

Parity row i of data column j is a Cauchy element 1 / (x_i + y_j), each column scaled so that row 0 is all ones: parity
0 is the plain XOR of the data. Scaling columns keeps every square submatrix invertible, so any k of the k + m shards
give the rest, for every k + m <= 256 (the x and y are distinct elements of GF(2^8)).

Source: J. Bloemer et al., "An XOR-Based Erasure-Resilient Coding Scheme", ICSI TR-95-048, 1995 (Cauchy matrices are
MDS); J. S. Plank and L. Xu, "Optimizing Cauchy Reed-Solomon Codes for Fault-Tolerant Network Storage", 2006 (scaling).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from kernels.errors import CodecError
from kernels.gf256 import Matrix, inverse, invert, matrix_multiply, multiply

MAX_SHARDS = 256


def check_size(k: int, m: int) -> None:
    """Raise CodecError unless there is a code of k data and m parity shards."""
    if k < 1 or m < 1 or k + m > MAX_SHARDS:
        raise CodecError(f"no code with k={k}, m={m}: both are at least 1, and k + m at most {MAX_SHARDS}")


@lru_cache(maxsize=64)
def parity_matrix(k: int, m: int) -> Matrix:
    """Return P [m, k] uint8, read-only: parity i = sum over j of P[i, j] * data j. Raises CodecError."""
    check_size(k, m)
    # x_i = i for parity rows, y_j = m + j for data columns: all distinct, so no x_i + y_j is 0.
    parity = np.array([[inverse(i ^ (m + j)) for j in range(k)] for i in range(m)], dtype=np.uint8)
    for column in range(k):
        scale = inverse(int(parity[0, column]))
        parity[:, column] = [multiply(scale, int(x)) for x in parity[:, column]]
    parity.setflags(write=False)
    return parity


def generator_matrix(k: int, m: int) -> Matrix:
    """Return G [k + m, k] uint8: identity over parity_matrix. Shard i = sum over j of G[i, j] * data j."""
    return np.concatenate([np.eye(k, dtype=np.uint8), parity_matrix(k, m)])


def decode_matrix(k: int, m: int, sources: Sequence[int], targets: Sequence[int]) -> Matrix:
    """Return D [len(targets), k] uint8: target t = sum over s of D[t, s] * shard sources[s].

    sources: k distinct shard numbers (data 0..k-1, parity k..k+m-1); targets: any shard numbers. Raises CodecError.
    """
    generator = generator_matrix(k, m)
    if len(sources) != k or len(set(sources)) != k or not all(0 <= shard < k + m for shard in (*sources, *targets)):
        raise CodecError(f"can't compute shards {list(targets)} from {list(sources)} with k={k}, m={m}")
    data_from_sources = invert(generator[list(sources)])
    return matrix_multiply(generator[list(targets)], data_from_sources)
