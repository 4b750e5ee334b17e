"""The checksum that the CUDA kernel makes of each shard while it codes it, and the same on a CPU.

A shard is little-endian 32-bit words, the last padded with zeros. Each is multiplied by a 32-bit weight that its place
decides, all of them different and none 0 (up to 6 GiB); the products are summed modulo 2^64. Any damage to one word
changes the sum, as a product of two 32-bit numbers that are not 0 is not 0; of other random damage about one case in
2^63 does not. It is a sum, so that threads may make it in any order: xxh3, which CPUs use otherwise (codec.checksum),
can't be made so. The end of a shard is marked by its length, which is recorded with it: trailing zeros add nothing.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kernels.codec import Buffer

_Words = npt.NDArray[np.uint64]


def sum_checksum(buffer: Buffer | memoryview | bytes) -> int:
    """Return the 64-bit checksum of the bytes."""
    data = np.frombuffer(buffer, dtype=np.uint8)
    words = np.pad(data, (0, -data.size % 4)).view("<u4")
    return int((words * _weights(words.size)).sum(dtype=np.uint64))


@lru_cache(maxsize=4)
def _weights(words: int) -> _Words:
    """Return the weights of a shard's words, as in erasure.cu: places, from a number far from 0 on, mixed.

    Without that number some weights are exactly twice others, and two flipped bits can cancel out.
    Source: C. Wellons, "Prospecting for Hash Functions", 2018: lowbias32, which maps 32 bits one to one, and 0 to 0.
    """
    weight = np.arange(words, dtype=np.uint32) + np.uint32(0x9E3779B9)
    weight = (weight ^ weight >> np.uint32(16)) * np.uint32(0x7FEB352D)
    weight = (weight ^ weight >> np.uint32(15)) * np.uint32(0x846CA68B)
    weight ^= weight >> np.uint32(16)
    return weight.astype(np.uint64)
