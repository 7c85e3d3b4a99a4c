// Weights of few bits past 1 to 16 tokens: out[m, r] = a[r] · x[m], or silu(a[r] · x[m]) * (b[r] · x[m]).
//
// a and b: packed [rows, width], scales and zeros [rows, width >> group_shift] (one a row where the shift passes the
// width); x [m, width], out [m, rows]; sm_80 and later. Rows of packed weights are multiples of 4 * WORDS bytes, all
// addresses are 16-byte aligned. Bound by reading the weights once.
//
// The weights go from global memory straight into the registers of mma.m16n8k16 as its tall operand, the tokens are
// its columns. A thread reads WORDS consecutive words of a row and calls their pairs the k-pairs that the instruction
// wants of it, and puts x into that order. The 4 * WORDS words that four threads read of a row, a piece, lie in one
// group: its sum is scaled in float32 and added up. A zero point costs one more product, that of x with ones:
// sum((q - zero) x) = sum((q - 8) x) - (zero - 8) sum(x).
//
// A block owns TILES * 16 rows; its WARPS warps take steps of STEPS pieces in turn, keep two steps' loads in flight,
// and add up through shared memory in a fixed order. The first step is asked into L2 before the wait for the kernel
// before (weights are never its output, but a prefetch of them would be harmless even then).
//
// Compiled with few_bits.cuh's -D options and ZEROS=0|1, GATED=0|1, COLUMNS=1|2 (groups of 8 tokens), WORDS=1|2|4,
// TILES, WARPS, STEPS, BLOCKS (blocks a processor should hold).

#include "few_bits.cuh"

constexpr int kMatrices = GATED ? 2 : 1;
constexpr int kRows = 16 * TILES;
constexpr int kThreadColumns = WORDS * kColumns;
constexpr int kPieceColumns = 4 * kThreadColumns;

struct Matrix {
    const unsigned* values;
    const scale_type* scales;
    const scale_type* zeros;
};

struct Problem {
    const element* x;
    Matrix matrices[2];
    long long x_stride;
    int m, rows, width, groups, group_shift, first_row;
};

struct Words {
    unsigned at[WORDS];
};

// One step of weights: of row g and of row g + 8 of every tile.
struct Weights {
    Words words[STEPS][kMatrices][TILES][2];
    scale_type scales[STEPS][kMatrices][TILES][2];
#if ZEROS
    scale_type zeros[STEPS][kMatrices][TILES][2];
#endif
};

struct Accumulator {
    float at[kMatrices][TILES][COLUMNS][4];
};

__device__ inline Words stream(const unsigned* p) {  // read once: keep it out of L1
    Words w;
#if WORDS == 4
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "l"(p));
#elif WORDS == 2
    asm volatile("ld.global.nc.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(w.at[0]), "=r"(w.at[1]) : "l"(p));
#else
    asm volatile("ld.global.nc.L2::256B.u32 %0, [%1];" : "=r"(w.at[0]) : "l"(p));
#endif
    return w;
}

__device__ inline int row_of(const Problem& p, int tile, int half) {
    // Past the last row any row will do: nothing of it is stored.
    return min(p.first_row + 16 * tile + 8 * half + int(threadIdx.x) % 32 / 4, p.rows - 1);
}

__device__ inline const unsigned* place(const Problem& p, int matrix, int row, int k) {
    return p.matrices[matrix].values + ((long long)row * p.width + k) / kColumns;
}

__device__ inline int thread_column(int k, int step) {
    return k + kPieceColumns * step + kThreadColumns * (int(threadIdx.x) % 4);
}

__device__ inline void load(Weights& w, const Problem& p, int k) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int kk = thread_column(k, s);
        const bool inside = kk < p.width;
        const int group = inside ? kk >> p.group_shift : 0;
#pragma unroll
        for (int i = 0; i < kMatrices; ++i)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = row_of(p, t, h);
                    w.words[s][i][t][h] = inside ? stream(place(p, i, row, kk)) : Words{};
                    const long long at = (long long)row * p.groups + group;
                    w.scales[s][i][t][h] = __ldg(p.matrices[i].scales + at);
#if ZEROS
                    w.zeros[s][i][t][h] = __ldg(p.matrices[i].zeros + at);
#endif
                }
    }
}

__device__ inline void multiply(float (&c)[4], const unsigned* top, const unsigned* bottom, const unsigned* x) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(top[0]), "r"(bottom[0]), "r"(top[1]), "r"(bottom[1]), "r"(x[0]), "r"(x[1]));
}

// The x of one word, in the order of its pairs.
__device__ inline void load_x(unsigned (&pair)[kPairs], const element* p) {
#if BITS == 4
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    pair[0] = __byte_perm(v.x, v.z, 0x5410);
    pair[1] = __byte_perm(v.x, v.z, 0x7632);
    pair[2] = __byte_perm(v.y, v.w, 0x5410);
    pair[3] = __byte_perm(v.y, v.w, 0x7632);
#else
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    pair[0] = __byte_perm(v.x, v.y, 0x5410);
    pair[1] = __byte_perm(v.x, v.y, 0x7632);
#endif
}

__device__ inline void accumulate(Accumulator& total, const Weights& w, const Problem& p, int k) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int kk = thread_column(k, s);
        Accumulator piece = {};
#if ZEROS
        float sum[COLUMNS][4] = {};
#endif
#pragma unroll
        for (int j = 0; j < WORDS; ++j) {
            unsigned x[COLUMNS][kPairs];
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) {
                const int token = 8 * n + int(threadIdx.x) % 32 / 4;
#pragma unroll
                for (int i = 0; i < kPairs; ++i) x[n][i] = 0;
                if (token < p.m && kk < p.width) load_x(x[n], p.x + token * p.x_stride + kk + kColumns * j);
            }
#pragma unroll
            for (int i = 0; i < kMatrices; ++i)
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    unsigned top[kPairs], bottom[kPairs];
                    unpack(top, w.words[s][i][t][0].at[j]);
                    unpack(bottom, w.words[s][i][t][1].at[j]);
#pragma unroll
                    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                        for (int q = 0; q < kPairs; q += 2)
                            multiply(piece.at[i][t][n], top + q, bottom + q, x[n] + q);
                }
#if ZEROS
            const unsigned ones[2] = {both(HALF ? 0x3C00 : 0x3F80), both(HALF ? 0x3C00 : 0x3F80)};
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int q = 0; q < kPairs; q += 2) multiply(sum[n], ones, ones, x[n] + q);
#endif
        }
#pragma unroll
        for (int i = 0; i < kMatrices; ++i)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float part = piece.at[i][t][n][e];
#if ZEROS
                        part -= (widen(w.zeros[s][i][t][e / 2]) - kCentre) * sum[n][e];
#endif
                        total.at[i][t][n][e] += widen(w.scales[s][i][t][e / 2]) * part;
                    }
    }
}

__device__ inline void await_predecessor(const Problem& p, int k) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int s = 0; s < 2 * STEPS; ++s) {
        const int kk = thread_column(k + (s / STEPS) * kPieceColumns * STEPS * WARPS, s % STEPS);
#pragma unroll
        for (int i = 0; i < kMatrices; ++i)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (kk < p.width) asm volatile("prefetch.global.L2 [%0];" ::"l"(place(p, i, row_of(p, t, h), kk)));
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    linear_few_rows(const element* __restrict__ x, const unsigned* __restrict__ a, const scale_type* __restrict__ a_scales,
                    const scale_type* __restrict__ a_zeros, const unsigned* __restrict__ b,
                    const scale_type* __restrict__ b_scales, const scale_type* __restrict__ b_zeros,
                    element* __restrict__ out, long long x_stride, int m, int rows, int width, int groups,
                    int group_shift) {
    __shared__ float sums[WARPS][kMatrices][COLUMNS * 8][kRows + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Problem p{x,    {{a, a_scales, a_zeros}, {b, b_scales, b_zeros}}, x_stride, m, rows, width, groups, group_shift,
                    int(blockIdx.x) * kRows};

    Accumulator c = {};
    constexpr int kStride = kPieceColumns * STEPS * WARPS;
    Weights even, odd;  // past the width, steps load nothing and add zeros
    int k = kPieceColumns * STEPS * warp;
    await_predecessor(p, k);
    load(even, p, k);
    load(odd, p, k + kStride);
    for (; k < width; k += 2 * kStride) {
        accumulate(c, even, p, k);
        load(even, p, k + 2 * kStride);
        accumulate(c, odd, p, k + kStride);
        load(odd, p, k + 3 * kStride);
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif

#pragma unroll
    for (int i = 0; i < kMatrices; ++i)
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)  // e: column parity, then upper or lower half of the rows
                    sums[warp][i][8 * n + lane % 4 * 2 + e % 2][16 * t + e / 2 * 8 + lane / 4] = c.at[i][t][n][e];
    __syncthreads();

    for (int j = threadIdx.x; j < COLUMNS * 8 * kRows; j += 32 * WARPS) {
        const int token = j / kRows, row = j % kRows;
        if (token >= m || p.first_row + row >= rows) continue;
        float total[2] = {0.0f, 0.0f};
        for (int w = 0; w < WARPS; ++w)
            for (int i = 0; i < kMatrices; ++i) total[i] += sums[w][i][token][row];
        const float y = GATED ? total[0] / (1.0f + expf(-total[0])) * total[1] : total[0];
        out[(long long)token * rows + p.first_row + row] = narrow(y);
    }
}
