// Weights of few bits past many tokens on sm_90: out[m, r] = a[r] · x[m], by wgmma.
//
// a: packed [rows, width], scales and zeros [rows, width >> group_shift]; out [m, rows]. Rows of packed weights are
// multiples of 16 bytes. The weights are the left operand, in registers: a thread reads 16 consecutive bytes of a row
// and calls their pairs the k-pairs that the instruction wants of it, multiplied by their scale; one scale a row
// (BY_ROW) multiplies the sums instead. The tokens are the right operand, in shared memory, by tiles that `arrange` has
// written beforehand as they lie there: in the weights' order of columns, swizzled. So a tile is one bulk copy, and no
// address is computed while multiplying.
//
// A tile of results is 128 rows x TOKENS tokens. There is one block a processor, and it makes one tile after another:
// one thread copies, two groups of four warps multiply 64 rows each. While a group's product of 64 columns runs, it
// unpacks the next 64; the weights of AHEAD rounds are on their way from memory, which with 64 tokens is what binds.
// While a group writes its results, the first weights and tokens of its next tile are already here, and the other
// group multiplies. The tiles after the first `whole` do not fill the processors: each is cut into equal parts of
// `share` blocks of columns, one a processor, whose sums in float32 are joined by `join`, in their order.
//
// A product reads its left operand and writes its sums after the instruction was issued, until it is waited for. The
// compiler orders neither around a wait, so `hold` does: registers pass through it before they are read or reused.
//
// Compiled for sm_90a with few_bits.cuh's -D options and ZEROS=0|1, BY_ROW=0|1 (without zeros), TOKENS=64|128|256,
// STAGES, AHEAD.

#include "few_bits.cuh"

constexpr int kBlockColumns = 64;                              // of a copied tile: 128 bytes
constexpr int kStepColumns = 128;                              // of one round of weight loads: two tiles
constexpr int kLoads = BITS / 4;                               // 16-byte loads a row and round
constexpr int kThreadColumns = kStepColumns / 4 / kLoads;      // of one load
constexpr int kTileBytes = TOKENS * kBlockColumns * 2;
constexpr int kAtom = TOKENS < 128 ? TOKENS : 128;             // tokens of one instruction
constexpr int kAtoms = TOKENS / kAtom;
constexpr int kPitch = 64 + 8;                                 // elements between tokens, where results are turned
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

constexpr int kArrangeRows = 16, kPieces = kStepColumns / 8;  // pieces of 16 bytes in a step of a row

union Piece {
    uint4 whole;
    element of[8];
    __device__ Piece() : whole() {}
};

__device__ inline Piece piece_at(const element* p) {
    Piece piece;
    if (reinterpret_cast<unsigned long long>(p) % 16 == 0)
        piece.whole = *reinterpret_cast<const uint4*>(p);
    else
        for (int i = 0; i < 8; ++i) piece.of[i] = p[i];
    return piece;
}

// x [m, width] -> tiles [token tile][column block][TOKENS rows of 128 bytes, 16-byte pieces xor-ed with the row]. GATED:
// of silu(x) * up. A block: 128 columns of 16 rows.
template <bool GATED>
__device__ inline void arrange_rows(const element* x, const element* up, element* tiles, long long x_stride, int m,
                                    int width, int blocks) {
    asm volatile("griddepcontrol.launch_dependents;");  // those wait until this kernel has ended
    __shared__ __align__(16) element rows[kArrangeRows][kStepColumns + 32];  // two rows in other banks
    const int piece = threadIdx.x % kPieces, column = blockIdx.x * kStepColumns + piece * 8;
    const int first = blockIdx.y * kArrangeRows;
#pragma unroll
    for (int row = threadIdx.x / kPieces; row < kArrangeRows; row += 128 / kPieces) {
        Piece values;
        if (first + row < m && column < width) {
            values = piece_at(x + (first + row) * x_stride + column);
            if (GATED) {
                const Piece others = piece_at(up + (first + row) * x_stride + column);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float gate = wide(values.of[i]);
                    values.of[i] = narrow(gate / (1.0f + __expf(-gate)) * wide(others.of[i]));
                }
            }
        }
        *reinterpret_cast<uint4*>(&rows[row][piece * 8]) = values.whole;
    }
    __syncthreads();
    const long long tile = (long long)(first / TOKENS) * blocks + blockIdx.x * 2 + piece / 8;
    element* to = tiles + (tile * TOKENS + first % TOKENS) * kBlockColumns;
#pragma unroll
    for (int row = threadIdx.x / kPieces; row < kArrangeRows; row += 128 / kPieces) {
        Piece values;
#pragma unroll
        for (int i = 0; i < 8; ++i) values.of[i] = rows[row][column_of(piece * 8 + i)];
        *reinterpret_cast<uint4*>(to + row * kBlockColumns + (piece % 8 ^ row % 8) * 8) = values.whole;
    }
}

extern "C" __global__ void arrange(const element* __restrict__ x, element* __restrict__ tiles, long long x_stride, int m,
                                   int width, int blocks) {
    arrange_rows<false>(x, nullptr, tiles, x_stride, m, width, blocks);
}

extern "C" __global__ void arrange_gated(const element* __restrict__ gate, const element* __restrict__ up,
                                         element* __restrict__ tiles, long long stride, int m, int width, int blocks) {
    arrange_rows<true>(gate, up, tiles, stride, m, width, blocks);
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
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
                 "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
                 "%59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
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
    const uint4* values[2];  // of a thread's rows, from its first column
    const scale_type* scales[2];
    const scale_type* zeros[2];
    int column, end, group_shift;  // its first column, and where this block's columns end
};

// 128 columns of two rows, as loaded.
struct Packed {
    uint4 at[2][kLoads];
#if !BY_ROW
    scale_type scale[2][kLoads];
#endif
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

__device__ inline void load(Packed& w, const Matrix& a, unsigned k) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int kk = k + kStepColumns / kLoads * i + a.column;
        const bool inside = kk < a.end;
#if !BY_ROW
        const int group = inside ? kk >> a.group_shift : 0;
#endif
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            w.at[h][i] = inside ? stream(a.values[h] + (k / kThreadColumns + 4 * i)) : make_uint4(0, 0, 0, 0);
#if !BY_ROW
            w.scale[h][i] = __ldg(a.scales[h] + group);
#endif
#if ZEROS
            w.zero[h][i] = __ldg(a.zeros[h] + group);
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

// The left operands of products 2 * part and 2 * part + 1 of column block `half` of a step.
__device__ inline void unpack_part(unsigned (&left)[4][4], const Packed& w, int half, int part) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int i = BITS == 4 ? 0 : half;
        const unsigned words[4] = {w.at[h][i].x, w.at[h][i].y, w.at[h][i].z, w.at[h][i].w};
        unsigned pairs[4];
#pragma unroll
        for (int j = 0; j < 4 / kPairs; ++j) {
            unsigned some[kPairs];
            unpack(some, words[BITS == 4 ? 2 * half + part : 2 * part + j]);
#pragma unroll
            for (int q = 0; q < kPairs; ++q) pairs[kPairs * j + q] = some[q];
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            unsigned& to = left[2 * part + q / 2][q % 2 * 2 + h];
#if BY_ROW
            to = pairs[q];
#else
            const float scale = widen(w.scale[h][i]);
            if (kExact) {
#if ZEROS
                const float zero = widen(w.zero[h][i]) - kCentre;
#else
                const float zero = 0.0f;
#endif
                const float2 v = widen_pair(pairs[q]);
                to = pair_of((v.x - zero) * scale, (v.y - zero) * scale);
            } else {
                to = fma2(pairs[q], pair_of(scale, scale), both(0x8000));
            }
#endif
        }
    }
}

// Consecutive blocks of columns of one tile, that a block of threads multiplies. No count: there are none left.
struct Segment {
    int tile, first, count;
};

// The i-th of this block's segments: whole tiles, then a part of one.
__device__ inline Segment segment(int i, int blocks, int whole, int share, int tail) {
    const int tile = blockIdx.x + i * gridDim.x, part = tile - whole;
    if (tile < whole) return {tile, 0, blocks};
    if (part >= int(gridDim.x) || part * share >= tail * blocks) return {};
    return {whole + part * share / blocks, part * share % blocks, share};
}

extern "C" __global__ void __launch_bounds__(384, 1)
    linear_sm90(const element* __restrict__ tiles, const uint4* __restrict__ values, const scale_type* __restrict__ scales,
                const scale_type* __restrict__ zeros, element* __restrict__ out, float* __restrict__ parts, int m, int rows,
                int width, int groups, int group_shift, int blocks, int token_tiles, int whole, int share, int tail) {
    extern __shared__ __align__(1024) unsigned char shared[];  // STAGES tiles, then each group's results
    __shared__ unsigned long long full[STAGES], empty[STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(full + s)));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(address(empty + s)));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > 8 || lane > 0) return;
        asm volatile("griddepcontrol.wait;" ::: "memory");  // the tiles are `arrange`'s
        unsigned at = 0;
        for (int i = 0;; ++i) {
            const Segment now = segment(i, blocks, whole, share, tail);
            if (now.count == 0) return;
            const unsigned char* source = reinterpret_cast<const unsigned char*>(tiles) +
                                          ((long long)(now.tile % token_tiles) * blocks + now.first) * kTileBytes;
            for (int k = 0; k < now.count; ++k, ++at) {
                const unsigned s = at % STAGES;
                await(empty + s, (at / STAGES + 1) & 1);
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
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

    const int group = warp / 4, local = 16 * warp + lane / 4;
    Matrix a;
    a.column = kThreadColumns * (lane % 4);
    a.group_shift = group_shift;
    const auto row_of = [&](const Segment& segment, int h) -> long long {
        return min(segment.tile / token_tiles * 128 + local + 8 * h, rows - 1);
    };
    int column;  // of the weights that are loaded next
    const auto turn_to = [&](const Segment& next) {
        column = next.first * kBlockColumns;
        a.end = min(width, column + next.count * kBlockColumns);  // none left: loads are of zeros
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long row = row_of(next, h);
            a.values[h] = values + row * (width / kThreadColumns) + lane % 4;
            a.scales[h] = scales + row * groups;
            a.zeros[h] = zeros + row * groups;
        }
    };
    Packed packed[AHEAD];
    unsigned left[2][4][4] = {};
    Segment now = segment(0, blocks, whole, share, tail);
    turn_to(now);
#pragma unroll
    for (int d = 0; d < AHEAD; ++d, column += kStepColumns) load(packed[d], a, column);
    unpack_part(left[0], packed[0], 0, 0);
    unpack_part(left[0], packed[0], 0, 1);
    unsigned at = 0;
    for (int i = 1; now.count > 0; ++i) {
        const Segment next = segment(i, blocks, whole, share, tail);
#if BY_ROW
        const float scale_of[2] = {widen(__ldg(scales + row_of(now, 0))), widen(__ldg(scales + row_of(now, 1)))};
#endif
        float c[kAtoms][kAtom / 2];
#pragma unroll
        for (int n = 0; n < kAtoms; ++n)
#pragma unroll
            for (int j = 0; j < kAtom / 2; ++j) c[n][j] = 0.0f;
        hold(c);
        for (int k = 0; k < now.count; k += 2 * AHEAD) {
            if (k + 2 * AHEAD >= now.count) turn_to(next);
#pragma unroll
            for (int d = 0; d < AHEAD; ++d) {
#pragma unroll
                for (int half = 0; half < 2; ++half, ++at) {
                    const unsigned s = at % STAGES;
                    const Packed& after = packed[half == 0 ? d : (d + 1) % AHEAD];
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
                    if (k + 2 * d + half > 0 && lane == 0) arrive(empty + (at - 1) % STAGES);
                    unpack_part(left[1 - half], after, 1 - half, 0);
                    unpack_part(left[1 - half], after, 1 - half, 1);
                    if (half == 0) {
                        load(packed[d], a, column);
                        column += kStepColumns;
                    }
                }
            }
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        hold(left[1]);
        hold(c);
        if (lane == 0) arrive(empty + (at - 1) % STAGES);
#if BY_ROW
#pragma unroll
        for (int n = 0; n < kAtoms; ++n)
#pragma unroll
            for (int j = 0; j < kAtom / 2; ++j) c[n][j] *= scale_of[j % 4 / 2];
#endif

        if (now.tile >= whole) {
            float* to = parts + (long long)blockIdx.x * (TOKENS * 128);
#pragma unroll
            for (int n = 0; n < kAtoms; ++n)
#pragma unroll
                for (int j = 0; j < kAtom / 2; ++j)
                    to[(n * kAtom + j / 4 * 8 + lane % 4 * 2 + j % 2) * 128 + local + j % 4 / 2 * 8] = c[n][j];
        } else {
            element* turned = reinterpret_cast<element*>(shared + STAGES * kTileBytes) + group * (kAtom * kPitch);
            const int first_row = now.tile / token_tiles * 128 + group * 64, thread = threadIdx.x % 128;
#pragma unroll
            for (int n = 0; n < kAtoms; ++n) {
                asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");  // the results before these are read
#pragma unroll
                for (int j = 0; j < kAtom / 2; ++j) {
                    const int token = j / 4 * 8 + lane % 4 * 2 + j % 2, row = local % 64 + j % 4 / 2 * 8;
                    turned[token * kPitch + row] = narrow(c[n][j]);
                }
                asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
                for (int j = thread; j < kAtom * 8; j += 128) {
                    const int token = now.tile % token_tiles * TOKENS + n * kAtom + j / 8, row = first_row + j % 8 * 8;
                    if (token >= m || row >= rows) continue;
                    const element* from = turned + j / 8 * kPitch + j % 8 * 8;
                    element* to = out + (long long)token * rows + row;
                    if (rows % 8 == 0)
                        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
                    else
                        for (int e = 0; e < 8 && row + e < rows; ++e) to[e] = from[e];
                }
            }
        }
        now = next;
    }
}

// parts [tail][parts_a_tile][TOKENS][128] -> out, the tiles from `whole` on: their sums, in order. A block: 128 rows.
extern "C" __global__ void join(const float* __restrict__ parts, element* __restrict__ out, int m, int rows,
                                int token_tiles, int whole, int parts_a_tile) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int from_whole = blockIdx.x / TOKENS, tile = whole + from_whole, place = blockIdx.x % TOKENS;
    const int token = tile % token_tiles * TOKENS + place, row = tile / token_tiles * 128 + threadIdx.x;
    if (token >= m || row >= rows) return;
    const float* from = parts + ((long long)from_whole * parts_a_tile * TOKENS + place) * 128 + threadIdx.x;
    float total = 0.0f;
    for (int i = 0; i < parts_a_tile; ++i) total += from[(long long)i * (TOKENS * 128)];
    out[(long long)token * rows + row] = narrow(total);
}
