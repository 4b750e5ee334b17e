// target[i] = sum over j of matrix[i][j] * source[j] over GF(2^8), polynomial 0x11D, for a batch of stripes in one launch.
// Encoding and reconstructing are this with different matrices. Every source byte is loaded once, every target byte
// stored once, 16 bytes at a time; no tables, and no shared memory or barriers but for sums.
//
// Defined by the caller (kernels/launch.py), so that loops unroll and coefficients fold into the instructions:
//   SOURCES, TARGETS   rows and columns of the matrix
//   COEFFICIENTS       its elements, row by row, comma-separated
//   VECTORS            vectors of each source that one thread has in flight
//   BLOCK              threads of a block
//   STRIPES            stripes that the argument has room for
//   SUMS               1: add the checksum of every shard, source or target, to what the caller cleared; 0: none
//
// Multiplication: byte-parallel on packed words. With c = sum of 2^b over its bits b, a target is evaluated by Horner's
// rule over b: double, then add the sources whose coefficient has bit b. That takes 7 doublings for a target however many
// sources there are, and none for a row of ones. After H. P. Anvin, "The mathematics of RAID-6", on doubling in words.

#ifndef MATRIX  // a build for the CPU (tests/pure/erasure_cpu.cpp) has one that changes
__device__ constexpr unsigned char MATRIX[TARGETS][SOURCES] = {COEFFICIENTS};
#endif

constexpr int SHARDS = SOURCES + TARGETS;

// The one argument: by value, so that a launch needs no memory and no copy of its own.
struct Batch {
    unsigned long long shards[STRIPES][SHARDS + SUMS];  // addresses: sources, targets, and of [SHARDS] sums
    unsigned long long length;                          // bytes of each shard
};

#ifdef __CUDACC__
// 0xFF for each byte of a whose top bit is set, 0 for the others: prmt's selectors 8 to 11 repeat the sign of a byte.
static __device__ __forceinline__ unsigned sign_bytes(unsigned a) {
    unsigned signs;
    asm("prmt.b32 %0, %1, 0, 0xBA98;" : "=r"(signs) : "r"(a));
    return signs;
}

// The sum of a warp's values, all of whose threads call this: in parts whose sums fit 32 bits.
static __device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
    constexpr unsigned PART = (1u << 27) - 1, ALL = 0xFFFFFFFFu;
    const unsigned low = __reduce_add_sync(ALL, static_cast<unsigned>(value) & PART);
    const unsigned middle = __reduce_add_sync(ALL, static_cast<unsigned>(value >> 27) & PART);
    const unsigned high = __reduce_add_sync(ALL, static_cast<unsigned>(value >> 54));
    return low + (static_cast<unsigned long long>(middle) << 27) + (static_cast<unsigned long long>(high) << 54);
}

// Add a block's values, all of whose threads call this, to N sums in memory. One addition a block and sum gets there:
// blocks that run at once are mostly of one stripe, whose sums lie together, and memory adds to one place after another.
template <int N>
static __device__ __forceinline__ void add_to_sums(unsigned long long *sums, const unsigned long long (&values)[N]) {
    __shared__ unsigned long long warps[BLOCK / 32][N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const unsigned long long sum = warp_sum(values[i]);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < N) {
        unsigned long long sum = 0;
#pragma unroll
        for (int warp = 0; warp < BLOCK / 32; ++warp) sum += warps[warp][threadIdx.x];
        atomicAdd(sums + threadIdx.x, sum);
    }
}
#endif

// 2 * (each byte of a), plus b. Bytes with the top bit set lose it to the left and take 0x1D, the rest of 0x11D.
static __device__ __forceinline__ unsigned double_and_add(unsigned a, unsigned b) {
    return ((a << 1) & 0xFEFEFEFEu) ^ ((sign_bytes(a) & 0x1D1D1D1Du) ^ b);
}

// A shard's checksum (kernels/checksum.py): the sum of its little-endian words, each by a weight that its place decides.
struct Sums {
    unsigned long long value[SHARDS] = {};

    // Add `words` that begin at this byte of the shard: vectors or words of 4 bytes each, or one byte.
    template <int LANES>
    __device__ __forceinline__ void add(int shard, const unsigned (&words)[LANES], unsigned long long offset) {
        if (!SUMS) return;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            unsigned weight = static_cast<unsigned>(offset / 4) + lane + 0x9E3779B9u;
            weight = (weight ^ weight >> 16) * 0x7FEB352Du;
            weight = (weight ^ weight >> 15) * 0x846CA68Bu;
            weight ^= weight >> 16;
            const unsigned word = words[lane] << 8 * (offset % 4);
            value[shard] += static_cast<unsigned long long>(word) * weight;
        }
    }
};

// What one load moves is worked on as LANES words of packed bytes.
template <typename Vector> struct Lanes {  // unsigned or unsigned char
    static constexpr int LANES = 1;
    static __device__ __forceinline__ void load(unsigned (&to)[1], const Vector *from) { to[0] = __ldcs(from); }
    static __device__ __forceinline__ void store(Vector *to, const unsigned (&from)[1]) {
        __stcs(to, static_cast<Vector>(from[0]));
    }
};

template <> struct Lanes<uint4> {
    static constexpr int LANES = 4;
    static __device__ __forceinline__ void load(unsigned (&to)[4], const uint4 *from) {
        const uint4 vector = __ldcs(from);  // read once: leave the caches to others
        to[0] = vector.x, to[1] = vector.y, to[2] = vector.z, to[3] = vector.w;
    }
    static __device__ __forceinline__ void store(uint4 *to, const unsigned (&from)[4]) {
        __stcs(to, make_uint4(from[0], from[1], from[2], from[3]));
    }
};

template <typename Vector>
static __device__ __forceinline__ void load_sources(unsigned (&source)[SOURCES][Lanes<Vector>::LANES],
                                                    const unsigned long long *shards, unsigned long long offset) {
#pragma unroll
    for (int j = 0; j < SOURCES; ++j)
        Lanes<Vector>::load(source[j], reinterpret_cast<const Vector *>(shards[j] + offset));
}

// One word of target i by Horner's rule; nothing is doubled before the highest bit that its row has.
template <int LANES>
static __device__ __forceinline__ unsigned target_word(const unsigned (&source)[SOURCES][LANES], int i, int lane) {
    unsigned target = 0;
    bool begun = false;
#pragma unroll
    for (int bit = 7; bit >= 0; --bit) {
        const bool doubles = begun;
        unsigned sum = 0;
#pragma unroll
        for (int j = 0; j < SOURCES; ++j)
            if (MATRIX[i][j] >> bit & 1) {
                sum ^= source[j][lane];
                begun = true;
            }
        target = doubles ? double_and_add(target, sum) : sum;
    }
    return target;
}

template <typename Vector>
static __device__ __forceinline__ void store_targets(const unsigned (&source)[SOURCES][Lanes<Vector>::LANES],
                                                     const unsigned long long *shards, unsigned long long offset,
                                                     Sums &sums) {
    constexpr int LANES = Lanes<Vector>::LANES;
#pragma unroll
    for (int j = 0; j < SOURCES; ++j) sums.add(j, source[j], offset);
#pragma unroll
    for (int i = 0; i < TARGETS; ++i) {
        unsigned target[LANES];
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) target[lane] = target_word<LANES>(source, i, lane);
        sums.add(SOURCES + i, target, offset);
        Lanes<Vector>::store(reinterpret_cast<Vector *>(shards[SOURCES + i] + offset), target);
    }
}

// One block codes BLOCK * VECTORS vectors of one stripe: blockIdx.y says which stripe, blockIdx.x where in it. The shards
// of a stripe have the same address modulo the vector's size, so after a head of single bytes all are aligned. For sums
// there is no head: words are counted from the beginning of a shard.
template <typename Vector> static __device__ __forceinline__ void code(const Batch &batch) {
    const unsigned long long *shards = batch.shards[blockIdx.y];
    const unsigned long long misaligned = -shards[0] % sizeof(Vector);
    const unsigned long long head = misaligned < batch.length ? misaligned : batch.length;
    const unsigned long long vectors = (batch.length - head) / sizeof(Vector);
    const unsigned long long first = blockIdx.x * (unsigned long long)(BLOCK * VECTORS) + threadIdx.x;

    Sums sums;
    unsigned source[VECTORS][SOURCES][Lanes<Vector>::LANES];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        if (first + v * BLOCK < vectors)
            load_sources<Vector>(source[v], shards, head + (first + v * BLOCK) * sizeof(Vector));
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
        if (first + v * BLOCK < vectors)
            store_targets<Vector>(source[v], shards, head + (first + v * BLOCK) * sizeof(Vector), sums);

    const unsigned long long loose = batch.length - vectors * sizeof(Vector);  // bytes of head and tail: at most 30
    if (sizeof(Vector) > 1 && blockIdx.x == 0 && threadIdx.x < loose) {
        const unsigned long long offset = threadIdx.x < head ? threadIdx.x : threadIdx.x + vectors * sizeof(Vector);
        unsigned byte[SOURCES][1];
        load_sources<unsigned char>(byte, shards, offset);
        store_targets<unsigned char>(byte, shards, offset, sums);
    }
    if (SUMS) add_to_sums(reinterpret_cast<unsigned long long *>(shards[SHARDS]), sums.value);
}

#define KERNEL(name, Vector) \
    extern "C" __global__ void __launch_bounds__(BLOCK) name(const __grid_constant__ Batch batch) { code<Vector>(batch); }

KERNEL(code_16, uint4)
KERNEL(code_4, unsigned)
KERNEL(code_1, unsigned char)
