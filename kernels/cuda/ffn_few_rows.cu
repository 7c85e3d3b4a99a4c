// The FFN of 1 to 16 tokens: out[m, r] = a[r] · x[m], or silu(a[r] · x[m]) * (b[r] · x[m]).
//
// a, b [rows, width], x [m, width], out [m, rows]; bf16 or fp16, 16-byte aligned, width a multiple of 8; sm_80 and
// later. Bound by reading a and b once. The weights go from global memory straight into the registers of mma.m16n8k16
// and never through shared memory: a sum over k may run in any order, so each thread reads 16 consecutive bytes of a
// row and calls them the four k-pairs that the instruction wants of it, and reads x the same way.
//
// A block owns TILES * 16 rows; its WARPS warps take steps of 32 * STEPS elements of k in turn, keep two steps'
// loads in flight, and add up through shared memory in a fixed order.
//
// Compiled with -D HALF=0|1 (bf16|fp16), GATED=0|1, COLUMNS=1|2 (groups of 8 tokens), TILES, WARPS, STEPS, BLOCKS
// (blocks a processor should hold).

#if HALF
#include <cuda_fp16.h>
typedef __half element;
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
__device__ inline element narrow(float x) { return __float2half_rn(x); }
#else
#include <cuda_bf16.h>
typedef __nv_bfloat16 element;
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
__device__ inline element narrow(float x) { return __float2bfloat16_rn(x); }
#endif

constexpr int kMatrices = GATED ? 2 : 1;
constexpr int kRows = 16 * TILES;

struct Accumulator {
    float at[kMatrices][TILES][COLUMNS][4];
};

// One step of weights: for each 32-element piece, 8 elements of row g and of row g + 8 of every tile.
struct Weights {
    uint4 at[STEPS][kMatrices][TILES][2];
};

__device__ inline uint4 stream(const element* p) {  // read once: keep it out of L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ inline void multiply(float (&c)[4], uint4 top, uint4 bottom, uint4 x) {
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(top.x), "r"(bottom.x), "r"(top.y), "r"(bottom.y), "r"(x.x), "r"(x.y));
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(top.z), "r"(bottom.z), "r"(top.w), "r"(bottom.w), "r"(x.z), "r"(x.w));
}

struct Problem {
    const element* x;
    const element* weights[2];
    long long x_stride;
    int m, rows, width, first_row;
};

__device__ inline void load(Weights& w, const Problem& p, int k) {
    const int group = (threadIdx.x % 32) / 4;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int kk = k + 32 * s + 8 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < kMatrices; ++i)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    // Past the last row any row will do (nothing of it is stored); past the width it must be zero.
                    const int row = min(p.first_row + 16 * t + 8 * h + group, p.rows - 1);
                    w.at[s][i][t][h] = kk < p.width ? stream(p.weights[i] + (long long)row * p.width + kk)
                                                    : make_uint4(0, 0, 0, 0);
                }
    }
}

__device__ inline void accumulate(Accumulator& c, const Weights& w, const Problem& p, int k) {
    const int group = (threadIdx.x % 32) / 4;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int kk = k + 32 * s + 8 * (threadIdx.x % 4);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            const int token = 8 * n + group;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (token < p.m && kk < p.width) x = __ldg(reinterpret_cast<const uint4*>(p.x + token * p.x_stride + kk));
#pragma unroll
            for (int i = 0; i < kMatrices; ++i)
#pragma unroll
                for (int t = 0; t < TILES; ++t) multiply(c.at[i][t][n], w.at[s][i][t][0], w.at[s][i][t][1], x);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    ffn_few_rows(const element* __restrict__ x, const element* __restrict__ a, const element* __restrict__ b,
                 element* __restrict__ out, long long x_stride, int m, int rows, int width) {
    __shared__ float sums[WARPS][kMatrices][COLUMNS * 8][kRows + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Problem p{x, {a, b}, x_stride, m, rows, width, int(blockIdx.x) * kRows};

    Accumulator c = {};
    constexpr int kStride = 32 * STEPS * WARPS;
    Weights even, odd;  // past the width, steps load nothing and add zeros
    int k = 32 * STEPS * warp;
    load(even, p, k);
    load(odd, p, k + kStride);
    for (; k < width; k += 2 * kStride) {
        accumulate(c, even, p, k);
        load(even, p, k + 2 * kStride);
        accumulate(c, odd, p, k + kStride);
        load(odd, p, k + 3 * kStride);
    }

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
