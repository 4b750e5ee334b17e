"""Silent damage is found, located where the code can, and repaired."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.checksum import sum_checksum
from kernels.codec import Buffer, checksum, make_codec
from kernels.errors import CodecError
from kernels.verify import Verdict, repair, verify
from tests.pure.test_codec import random_shards


def stripe(k: int, m: int, length: int = 5000) -> list[Buffer]:
    shards = random_shards(k, length, seed=k) + [np.empty(length, dtype=np.uint8) for _ in range(m)]
    make_codec(k, m).encode(shards[:k], shards[k:])
    return shards


@settings(max_examples=80)
@given(data=st.data())
def test_one_flipped_byte_is_found_and_repaired(data: st.DataObject) -> None:
    k, m = data.draw(st.integers(1, 16)), data.draw(st.integers(2, 4))
    codec, shards = make_codec(k, m), stripe(k, m)
    whole = [shard.copy() for shard in shards]
    number, place = data.draw(st.integers(0, k + m - 1)), data.draw(st.integers(0, 4999))
    shards[number][place] ^= data.draw(st.integers(1, 255))
    verdict = verify(codec, shards[:k], shards[k:])
    assert verdict == Verdict(intact=False, damaged=(number,))
    repair(codec, shards[:k], shards[k:], verdict)
    assert all(np.array_equal(a, b) for a, b in zip(shards, whole, strict=True))


@pytest.mark.parametrize("number", range(9))
def test_one_parity_finds_damage_but_not_where(number: int) -> None:
    codec, shards = make_codec(8, 1), stripe(8, 1)
    shards[number][77] ^= 1
    verdict = verify(codec, shards[:8], shards[8:])
    assert verdict == Verdict(intact=False)
    with pytest.raises(CodecError, match="not known which"):
        repair(codec, shards[:8], shards[8:], verdict)


def test_an_intact_stripe_is_left_alone() -> None:
    codec, shards = make_codec(5, 2), stripe(5, 2)
    sums = [checksum(shard) for shard in shards]
    for known in (None, sums):
        verdict = verify(codec, shards[:5], shards[5:], known)
        assert verdict == Verdict(intact=True)
        repair(codec, shards[:5], shards[5:], verdict)
    assert sums == [checksum(shard) for shard in shards]


def test_a_shard_lost_as_a_whole_and_two_at_different_places() -> None:
    codec, shards = make_codec(4, 2), stripe(4, 2, length=3 << 20)
    whole = [shard.copy() for shard in shards]
    shards[2][:] = 0xEE
    assert verify(codec, shards[:4], shards[4:]).damaged == (2,)
    shards[2][:] = whole[2]
    shards[0][5] ^= 9
    shards[5][3_000_000] ^= 9
    verdict = verify(codec, shards[:4], shards[4:])
    assert verdict.damaged == (0, 5)
    repair(codec, shards[:4], shards[4:], verdict)
    assert all(np.array_equal(a, b) for a, b in zip(shards, whole, strict=True))


def test_checksums_name_as_many_damaged_shards_as_parity_can_repair() -> None:
    codec, shards = make_codec(6, 3), stripe(6, 3)
    sums = [checksum(shard) for shard in shards]
    for number in (1, 4, 7):
        shards[number][100] ^= 0x55  # all at one place, where syndromes alone can't tell them apart
    assert verify(codec, shards[:6], shards[6:]) == Verdict(intact=False)
    verdict = verify(codec, shards[:6], shards[6:], sums)
    assert verdict.damaged == (1, 4, 7)
    repair(codec, shards[:6], shards[6:], verdict)
    assert sums == [checksum(shard) for shard in shards]
    shards[3][4999] ^= 1
    made_on_a_gpu = [sum_checksum(shard) for shard in shards]
    shards[3][4999] ^= 1
    assert verify(codec, shards[:6], shards[6:], made_on_a_gpu, sum_checksum).damaged == (3,)
    with pytest.raises(CodecError, match="a checksum for each"):
        verify(codec, shards[:6], shards[6:], sums[:-1])
