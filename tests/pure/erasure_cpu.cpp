// kernels/erasure.cu itself, compiled for the CPU: just enough of CUDA to run it thread by thread over its grid.
// Test driver: kernel_on_cpu.py. Threads run one after another: its only barrier is in add_to_sums, which is another one here.

struct Index {
    unsigned x, y;
};
static Index blockIdx, threadIdx;

struct uint4 {
    unsigned x, y, z, w;
};
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(threads)

// Loads and stores check their alignment and count themselves: a GPU faults where a CPU would not.
static unsigned long long bytes_loaded, bytes_stored, misaligned;

template <typename T> static T __ldcs(const T *from) {
    misaligned += reinterpret_cast<unsigned long long>(from) % sizeof(T) != 0;
    bytes_loaded += sizeof(T);
    T value;
    __builtin_memcpy(&value, from, sizeof(T));
    return value;
}

template <typename T> static void __stcs(T *to, T value) {
    misaligned += reinterpret_cast<unsigned long long>(to) % sizeof(T) != 0;
    bytes_stored += sizeof(T);
    __builtin_memcpy(to, &value, sizeof(T));
}

static unsigned sign_bytes(unsigned a) {
    unsigned signs = 0;
    for (int byte = 0; byte < 4; ++byte)
        if (a >> (8 * byte + 7) & 1) signs |= 0xFFu << 8 * byte;
    return signs;
}

template <int N> static void add_to_sums(unsigned long long *sums, const unsigned long long (&values)[N]) {
    for (int i = 0; i < N; ++i) sums[i] += values[i];
}

#ifdef ANY_MATRIX  // one binary for all matrices of a shape: compiling each of thousands would take an hour
static unsigned char matrix[TARGETS][SOURCES];
#define MATRIX matrix
extern "C" void set_matrix(const unsigned char *coefficients) { __builtin_memcpy(matrix, coefficients, sizeof(matrix)); }
#endif

#include "erasure.cu"

// Counters: bytes loaded, bytes stored, misaligned accesses.
extern "C" void run_grid(int width, unsigned blocks, unsigned stripes, const Batch *batch, unsigned long long *counters) {
    bytes_loaded = bytes_stored = misaligned = 0;
    for (blockIdx.y = 0; blockIdx.y < stripes; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < BLOCK; ++threadIdx.x) {
                if (width == 16) code_16(*batch);
                if (width == 4) code_4(*batch);
                if (width == 1) code_1(*batch);
            }
    counters[0] += bytes_loaded, counters[1] += bytes_stored, counters[2] += misaligned;
}
