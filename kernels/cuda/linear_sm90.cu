// Weights of few bits past many tokens on sm_90: out[m, r] = a[r] · x[m], by wgmma.
//
// a: packed [rows, width], scales and zeros [rows, width >> group_shift]; out [m, rows]. Rows of packed weights are
// multiples of 16 bytes. The weights are the left operand, in registers: a thread reads 16 consecutive bytes of a row
// and calls their pairs the k-pairs that the instruction wants of it, multiplied by their scale. The tokens are the
// right operand, in shared memory, by tiles that `arrange` has written beforehand as they lie there: in the weights'
// order of columns, swizzled. So a tile is one bulk copy, and no address is computed while multiplying.
//
// A block makes 128 rows x TOKENS tokens of one of gridDim.y parts of the columns: one thread copies, two groups of four
// warps multiply 64 rows each. While a group's product of 64 columns runs, it unpacks the next 64; the weights of AHEAD
// rounds are on their way from memory, which with 64 tokens is what binds. Parts are written in float32 and joined by
// `join`, in their order.
//
// A product reads its left operand and writes its sums after the instruction was issued, until it is waited for. The
// compiler orders neither around a wait, so `hold` does: registers pass through it before they are read or reused.
//
// Compiled for sm_90a with few_bits.cuh's -D options and ZEROS=0|1, TOKENS=64|128|256, STAGES, AHEAD.

#include "few_bits.cuh"

constexpr int kBlockColumns = 64;                              // of a copied tile: 128 bytes
constexpr int kStepColumns = 128;                              // of one round of weight loads: two tiles
constexpr int kLoads = BITS / 4;                               // 16-byte loads a row and round
constexpr int kThreadColumns = kStepColumns / 4 / kLoads;      // of one load
constexpr int kTileBytes = TOKENS * kBlockColumns * 2;
constexpr int kAtom = TOKENS < 128 ? TOKENS : 128;             // tokens of one instruction
constexpr int kAtoms = TOKENS / kAtom;
constexpr bool kExact = ZEROS || (HALF ? SCALE != 0 : SCALE != 1);  // scale in float32, round once

// The column of the matrix at position p of a step of 128: see unpack for the order inside a word.
__device__ inline int column_of(int p) {
    const int product = p / 16, second = p % 16 / 8, thread = p % 8 / 2, parity = p % 2;
#if BITS == 4
    return 32 * thread + 8 * (product / 2) + 2 * (product % 2) + second + 4 * parity;
#else
    return 64 * (product / 4) + 16 * thread + 4 * (product % 4) + second + 2 * parity;
#endif
}

// x [m, width] -> tiles [token tile][column block][TOKENS rows of 128 bytes, 16-byte pieces xor-ed with the row].
extern "C" __global__ void arrange(const element* __restrict__ x, element* __restrict__ tiles, long long x_stride, int m,
                                   int width, int blocks) {
    const int c = threadIdx.x, first = blockIdx.x * kStepColumns;  // a block: 128 columns of 8 rows of a token tile
    __shared__ element rows[8][kStepColumns];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = blockIdx.y * 8 + i;
        rows[i][c] = row < m && first + c < width ? x[row * x_stride + first + c] : narrow(0.0f);
    }
    __syncthreads();
    const long long tile = (long long)(blockIdx.y * 8 / TOKENS) * blocks + blockIdx.x * 2 + c / kBlockColumns;
    element* to = tiles + (tile * TOKENS + blockIdx.y * 8 % TOKENS) * kBlockColumns;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        to[i * kBlockColumns + ((c % kBlockColumns / 8) ^ i) * 8 + c % 8] = rows[i][column_of(c)];
}

__device__ inline unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ inline void await(unsigned long long* barrier, unsigned phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            address(barrier)),
        "r"(phase)
        : "memory");
}

__device__ inline void arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ inline unsigned long long descriptor(const void* tile) {  // 128-byte swizzle, 8 rows are 1024 bytes
    return (unsigned long long)(address(tile) >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define C32(i) C16(i), C16(i + 16)

__device__ inline void multiply(float (&c)[kAtom / 2], const unsigned* a, unsigned long long b) {
#if TOKENS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : C32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
                 "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
                 "%61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : C32(0), C32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

__device__ inline void hold(float (&c)[kAtoms][kAtom / 2]) {
#pragma unroll
    for (int n = 0; n < kAtoms; ++n)
#pragma unroll
        for (int i = 0; i < kAtom / 2; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

__device__ inline void hold(unsigned (&left)[4][4]) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(left[q][i])::"memory");
}

struct Matrix {
    const uint4* values;
    const scale_type* scales;
    const scale_type* zeros;
    int row[2];
    int width, end, groups, group_shift;  // end: of this block's columns
};

// 128 columns of two rows, as loaded.
struct Packed {
    uint4 at[2][kLoads];
    scale_type scale[2][kLoads];
#if ZEROS
    scale_type zero[2][kLoads];
#endif
};

__device__ inline uint4 stream(const uint4* p) {  // read once by this processor: keep it out of L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

__device__ inline void load(Packed& w, const Matrix& a, int k) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int kk = k + kStepColumns / kLoads * i + kThreadColumns * (int(threadIdx.x) % 4);
        const bool inside = kk < a.end;
        const int group = inside ? kk >> a.group_shift : 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            w.at[h][i] = inside ? stream(a.values + ((long long)a.row[h] * a.width + kk) / kThreadColumns)
                                : make_uint4(0, 0, 0, 0);
            w.scale[h][i] = __ldg(a.scales + (long long)a.row[h] * a.groups + group);
#if ZEROS
            w.zero[h][i] = __ldg(a.zeros + (long long)a.row[h] * a.groups + group);
#endif
        }
    }
}

__device__ inline unsigned pair_of(float low, float high) {
#if HALF
    const __half2 v = __floats2half2_rn(low, high);
#else
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
#endif
    return *reinterpret_cast<const unsigned*>(&v);
}

__device__ inline float2 widen_pair(unsigned pair) {
#if HALF
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
#else
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
#endif
}

// The left operands of the four products of column block `half` of a step.
__device__ inline void unpack_block(unsigned (&left)[4][4], const Packed& w, int half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int i = BITS == 4 ? 0 : half;
        const unsigned words[4] = {w.at[h][i].x, w.at[h][i].y, w.at[h][i].z, w.at[h][i].w};
        const float scale = widen(w.scale[h][i]);
        unsigned pairs[8];
#pragma unroll
        for (int j = 0; j < 8 / kPairs; ++j) {
            unsigned some[kPairs];
            unpack(some, BITS == 4 ? words[2 * half + j] : words[j]);
#pragma unroll
            for (int q = 0; q < kPairs; ++q) pairs[kPairs * j + q] = some[q];
        }
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            if (kExact) {
#if ZEROS
                const float zero = widen(w.zero[h][i]) - kCentre;
#else
                const float zero = 0.0f;
#endif
                const float2 v = widen_pair(pairs[q]);
                left[q / 2][q % 2 * 2 + h] = pair_of((v.x - zero) * scale, (v.y - zero) * scale);
            } else {
                left[q / 2][q % 2 * 2 + h] = fma2(pairs[q], pair_of(scale, scale), both(0x8000));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_sm90(const element* __restrict__ tiles, const uint4* __restrict__ values, const scale_type* __restrict__ scales,
                const scale_type* __restrict__ zeros, element* __restrict__ out, float* __restrict__ parts, int m, int rows,
                int width, int groups, int group_shift, int blocks, int token_tiles) {
    extern __shared__ __align__(1024) unsigned char shared[];  // STAGES tiles; at the end, the results
    __shared__ unsigned long long full[STAGES], empty[STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = blockIdx.x / token_tiles * 128, token_tile = blockIdx.x % token_tiles;
    const int mine = blocks / gridDim.y, first_block = blockIdx.y * mine;  // a multiple of 2 * AHEAD

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(full + s)));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(address(empty + s)));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 8 && lane == 0) {
            const unsigned char* source =
                reinterpret_cast<const unsigned char*>(tiles) + ((long long)token_tile * blocks + first_block) * kTileBytes;
            for (int k = 0; k < mine; ++k) {
                const int s = k % STAGES;
                await(empty + s, (k / STAGES + 1) & 1);
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(full + s)),
                             "n"(kTileBytes)
                             : "memory");
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        address(shared + s * kTileBytes)),
                    "l"(source + (long long)k * kTileBytes), "n"(kTileBytes), "r"(address(full + s))
                    : "memory");
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

    const int local = 16 * warp + lane / 4, first_column = first_block * kBlockColumns;
    Matrix a{values, scales, zeros, {}, width, min(width, first_column + mine * kBlockColumns), groups, group_shift};
#pragma unroll
    for (int h = 0; h < 2; ++h) a.row[h] = min(first_row + local + 8 * h, rows - 1);
    float c[kAtoms][kAtom / 2];
#pragma unroll
    for (int n = 0; n < kAtoms; ++n)
#pragma unroll
        for (int i = 0; i < kAtom / 2; ++i) c[n][i] = 0.0f;
    Packed packed[AHEAD];
    unsigned left[2][4][4] = {};
#pragma unroll
    for (int d = 0; d < AHEAD; ++d) load(packed[d], a, first_column + d * kStepColumns);
    unpack_block(left[0], packed[0], 0);
    hold(c);
    for (int k = 0; k < mine; k += 2 * AHEAD) {
#pragma unroll
        for (int d = 0; d < AHEAD; ++d) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = k + 2 * d + half, s = at % STAGES;
                await(full + s, at / STAGES & 1);
                hold(left[half]);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                const unsigned long long right = descriptor(shared + s * kTileBytes);
#pragma unroll
                for (int q = 0; q < 4; ++q)
#pragma unroll
                    for (int n = 0; n < kAtoms; ++n)  // 32 bytes of columns, kAtom rows of 128 bytes
                        multiply(c[n], left[half][q], right + 2 * q + n * (kAtom * 128 / 16));
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                hold(left[1 - half]);
                if (at > 0 && lane == 0) arrive(empty + (at - 1) % STAGES);
                if (half == 0) {
                    unpack_block(left[1], packed[d], 1);
                    load(packed[d], a, first_column + (k + 2 * (d + AHEAD)) * kBlockColumns);
                } else {
                    unpack_block(left[0], packed[(d + 1) % AHEAD], 0);
                }
            }
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    hold(left[1]);
    hold(c);

    if (gridDim.y > 1) {
#pragma unroll
        for (int n = 0; n < kAtoms; ++n)
#pragma unroll
            for (int i = 0; i < kAtom / 2; ++i) {
                const int token = token_tile * TOKENS + n * kAtom + i / 4 * 8 + lane % 4 * 2 + i % 2;
                const int row = first_row + local + i % 4 / 2 * 8;
                if (token < m && row < rows) parts[((long long)blockIdx.y * m + token) * rows + row] = c[n][i];
            }
        return;
    }
    constexpr int kPitch = 128 + 8;  // elements between tokens: rows of results, turned through shared memory
    element* turned = reinterpret_cast<element*>(shared);
#pragma unroll
    for (int part = 0; part < kAtoms; ++part) {
        asm volatile("bar.sync 1, 256;" ::: "memory");  // every tile has been read
#pragma unroll
        for (int i = 0; i < kAtom / 2; ++i) {
            const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = local + i % 4 / 2 * 8;
            turned[token * kPitch + row] = narrow(c[part][i]);
        }
        asm volatile("bar.sync 1, 256;" ::: "memory");
        for (int j = threadIdx.x; j < kAtom * 16; j += 256) {
            const int token = token_tile * TOKENS + part * kAtom + j / 16, row = first_row + j % 16 * 8;
            if (token >= m || row >= rows) continue;
            const element* from = turned + j / 16 * kPitch + j % 16 * 8;
            element* to = out + (long long)token * rows + row;
            if (rows % 8 == 0)
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            else
                for (int i = 0; i < 8 && row + i < rows; ++i) to[i] = from[i];
        }
    }
}

// parts [count][elements] -> out [elements]: their sum, in order.
extern "C" __global__ void join(const float* __restrict__ parts, element* __restrict__ out, long long elements, int count) {
    const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= elements) return;
    float total = 0.0f;
    for (int i = 0; i < count; ++i) total += parts[i * elements + at];
    out[at] = narrow(total);
}
