"""Silent damage: which shards of a stripe are not what they were, with their recorded checksums or without.

Without checksums, parity computed anew from the data differs from the stored parity by the syndromes S_i. Bytes at one
position damaged by e in data shard j give S_i = P[i, j] * e, in parity shard i only S_i = e. No two of these are
multiples of each other for m >= 2, so where one shard alone is damaged it is known which; different positions may have
different ones. For m = 1 there is one syndrome: damage is found, but not whose. For m = 2 two shards damaged at one
position can look like a third; recorded checksums are never wrong in this way, so give them where there are any.

Source: H. P. Anvin, "The mathematics of RAID-6", on recovery from corruption; here for any m.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.codec import Buffer, Codec, checksum
from kernels.errors import CodecError
from kernels.generator import parity_matrix
from kernels.gf256 import TABLE, inverse

_CHUNK = 1 << 20  # bytes of a shard looked at together: bounds the memory for syndromes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verify found. Not intact and no shard named: there is damage, but more than can be located."""

    intact: bool
    damaged: tuple[int, ...] = ()  # shard numbers: data 0..k-1, parity k..k+m-1


def verify(
    codec: Codec,
    data: Sequence[Buffer],
    parity: Sequence[Buffer],
    checksums: Sequence[int] | None = None,
    made_by: Callable[[Buffer], int] = checksum,
) -> Verdict:
    """Say which shards of a stripe in host memory are damaged.

    checksums: those recorded, data then parity, made_by checksum on a CPU, sum_checksum on a GPU. They name any number
    of damaged shards. Without them, any damage up to
    m shards is found, and located for m >= 2 if no position has it in more than one shard. Raises CodecError.
    """
    shards = [*data, *parity]
    if len(data) != codec.k or len(parity) != codec.m or (checksums is not None and len(checksums) != len(shards)):
        raise CodecError(f"a stripe has {codec.k} + {codec.m} shards, and a checksum for each if any")
    if checksums is not None:
        wrong = tuple(i for i, shard in enumerate(shards) if made_by(shard) != checksums[i])
        return Verdict(not wrong, wrong)
    damaged: set[int] = set()
    for start in range(0, data[0].size, _CHUNK):
        part = slice(start, start + _CHUNK)
        syndromes = np.empty((codec.m, data[0][part].size), dtype=np.uint8)
        codec.encode([shard[part] for shard in data], list(syndromes))
        syndromes ^= np.stack([shard[part] for shard in parity])
        errors = syndromes[:, syndromes.any(axis=0)]
        if not errors.shape[1]:
            continue
        where = _locate(codec, errors)
        if where is None:
            return Verdict(intact=False)
        damaged |= where
    if len(damaged) > codec.m:
        return Verdict(intact=False)
    return Verdict(not damaged, tuple(sorted(damaged)))


def repair(codec: Codec, data: Sequence[Buffer], parity: Sequence[Buffer], verdict: Verdict) -> None:
    """Rebuild in place the shards that verify named. Raises CodecError if it could name none, or too many."""
    if verdict.intact:
        return
    shards = [*data, *parity]
    if not verdict.damaged:
        raise CodecError("the stripe is damaged, but it is not known which shards are")
    plan = codec.plan(set(range(len(shards))) - set(verdict.damaged), verdict.damaged)
    codec.reconstruct(plan, [shards[source] for source in plan.sources], [shards[target] for target in plan.targets])


def _locate(codec: Codec, errors: npt.NDArray[np.uint8]) -> set[int] | None:
    """Return the one shard damaged at each position, given syndromes [m, positions], none all 0; None if more are."""
    if codec.m == 1:
        return None
    unexplained = np.ones(errors.shape[1], dtype=bool)
    found: set[int] = set()
    for shard, column in enumerate(_patterns(codec.k, codec.m)):
        first = int(np.flatnonzero(column)[0])
        size = TABLE[inverse(int(column[first])), errors[first]]  # what this shard's damage would have to be
        explained = unexplained & (TABLE[column[:, None], size[None, :]] == errors).all(axis=0)
        if explained.any():
            found.add(shard)
            unexplained &= ~explained
    return None if unexplained.any() else found


def _patterns(k: int, m: int) -> npt.NDArray[np.uint8]:
    """Return [k + m, m]: the syndromes of damage 1 in each shard."""
    return np.concatenate([parity_matrix(k, m).T, np.eye(m, dtype=np.uint8)])
