"""The field and the matrices, against their definitions."""

import itertools
import random

import numpy as np
import pytest

from kernels.errors import CodecError
from kernels.generator import decode_matrix, generator_matrix, parity_matrix
from kernels.gf256 import TABLE, inverse, invert, matrix_multiply, multiply_slowly


def test_the_table_is_multiplication_by_the_definition() -> None:
    expected = [[multiply_slowly(a, b) for b in range(256)] for a in range(256)]
    assert np.array_equal(TABLE, np.array(expected, dtype=np.uint8))


def test_known_products() -> None:
    assert multiply_slowly(0x80, 2) == 0x1D  # x^8 = x^4 + x^3 + x^2 + 1
    assert multiply_slowly(0x53, 1) == 0x53
    assert multiply_slowly(0xFF, 0) == 0


def test_every_element_but_zero_has_an_inverse() -> None:
    assert all(TABLE[a, inverse(a)] == 1 for a in range(1, 256))
    with pytest.raises(CodecError):
        inverse(0)


def test_inverse_times_matrix_is_one() -> None:
    random_bytes = np.random.default_rng(1)
    for size in (1, 2, 5, 16):
        matrix = random_bytes.integers(0, 256, (size, size), dtype=np.uint8)
        assert np.array_equal(matrix_multiply(matrix, invert(matrix)), np.eye(size, dtype=np.uint8))
    with pytest.raises(CodecError):
        invert(np.ones((2, 2), dtype=np.uint8))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (8, 4), (32, 4), (200, 56), (1, 255), (255, 1)])
def test_the_first_parity_is_the_xor_of_the_data(k: int, m: int) -> None:
    assert parity_matrix(k, m).shape == (m, k)
    assert (parity_matrix(k, m)[0] == 1).all()
    assert (parity_matrix(k, m) != 0).all()


def test_any_k_shards_give_all_others_for_small_codes() -> None:
    for k, m in itertools.product(range(1, 7), range(1, 4)):
        for sources in itertools.combinations(range(k + m), k):
            invert(generator_matrix(k, m)[list(sources)])  # raises if these k shards were not enough


def test_any_k_shards_give_all_others_for_the_largest_codes() -> None:
    chooser = random.Random(2)
    for k, m in ((128, 128), (250, 6), (100, 156)):
        for _ in range(4):
            sources = chooser.sample(range(k + m), k)
            decode = decode_matrix(k, m, sources, range(k))
            assert np.array_equal(matrix_multiply(decode, generator_matrix(k, m)[sources]), np.eye(k, dtype=np.uint8))


@pytest.mark.parametrize(("k", "m"), [(0, 1), (1, 0), (-1, 3), (200, 57), (256, 1)])
def test_impossible_codes_are_refused(k: int, m: int) -> None:
    with pytest.raises(CodecError):
        parity_matrix(k, m)


@pytest.mark.parametrize("sources", [[0, 1], [0, 1, 1], [0, 1, 5], [0, 1, -1], [0, 1, 2, 3]])
def test_impossible_sources_are_refused(sources: list[int]) -> None:
    with pytest.raises(CodecError):
        decode_matrix(3, 2, sources, [4])
