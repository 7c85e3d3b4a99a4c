// Attention of one query token over many keys: out = softmax(scale * q kᵀ) v, for groups of up to 8 query heads.
//
// q [B, 1, H * group, DIM], k and v [B, S, H, DIM] with any strides of 16-byte multiples and unit last stride, out
// [B, 1, H * group, DIM]; bf16 or fp16; DIM 64 or 128; sm_80 and later. Bound by reading k and v once.
//
// Each warp takes 16 keys at a time and no other warp waits for it until the end. Keys and values go from global memory
// straight into the registers of mma.m16n8k16 and never through shared memory:
// - scoresᵀ = k qᵀ: 16 keys are the tall operand, the group's heads its 8 columns. A sum over dimensions may run in any
//   order, so each thread reads 16 consecutive bytes of a key and calls them the four pairs the instruction wants of
//   it; q lies in the same order.
// - outᵀ = vᵀ pᵀ: 16 dimensions are the tall operand. Each thread reads 8 dimensions of two adjacent keys and pairs
//   them; which dimension is which row is free, so a thread's rows are the 8 that it read.
// - pᵀ is the scores' layout but transposed, 8 × 8 at a time: one movmatrix each.
// The maximum that exponents are relative to is renewed only where a score passes it by more than 2^8: such weights are
// still exact enough in 16 bits, and warps need not agree on it. Warps are joined through shared memory in a fixed
// order, splits of the keys by the second kernel here.
//
// Keys are dealt in steps of 16: warp w of a split takes every WARPS-th step of the split's range, or, interleaved,
// every (splits * WARPS)-th of all. Before the wait for the kernel before, which may still write q, k and v, the first
// AHEAD steps are asked into L2; nothing is read. The next kernel may start as soon as every block here runs.
//
// Compiled with -D HALF=0|1 (bf16|fp16), DIM, WARPS, BLOCKS (that a processor should hold), DEPTH (steps in registers),
// AHEAD.

#if HALF
#include <cuda_fp16.h>
typedef __half element;
#define TYPE "f16"
__device__ inline element narrow(float x) { return __float2half_rn(x); }
#else
#include <cuda_bf16.h>
typedef __nv_bfloat16 element;
#define TYPE "bf16"
__device__ inline element narrow(float x) { return __float2bfloat16_rn(x); }
#endif

constexpr int kStep = 16;
constexpr int kHeads = 8;
constexpr int kPieces = DIM / 32;  // 64 bytes of a key, 16 a thread
constexpr int kHalves = DIM / 64;  // 128 bytes of a value, 16 a thread
constexpr int kJoined = WARPS * DIM > 1024 ? 64 : DIM;  // dimensions joined at a time, for 48 KiB of shared memory
constexpr int kStride = kJoined + 4;                    // floats of a row in shared memory: no bank twice
constexpr float kLow = -1e30f;                          // below any score, and finite: differences of it are numbers
constexpr float kSlack = 8.0f;
constexpr int kSplitsMax = 128;
static_assert(WARPS >= kPieces, "each of the first warps reads one piece of q");

struct Words {
    unsigned at[4];
};

struct Keys {
    Words at[2][kPieces];  // keys g and g + 8, with g = lane / 4
};

struct Values {
    Words at[4][kHalves];  // keys 2t, 2t + 1, 2t + 8, 2t + 9, with t = lane % 4
};

struct Query {
    struct alignas(16) Piece {
        Words words;
        __device__ Words again() const {  // from shared memory each time: 16 registers that loads in flight can use
            Words w;
            asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                         : "r"(unsigned(__cvta_generic_to_shared(this))));
            return w;
        }
    } at[kPieces][32];  // what each lane gives to the products: head g, the dimensions of its keys' pieces
};

struct Sums {
    float at[kHalves][4][4];  // dimension 8g + 2i + (e / 2) of a half, head 2t + e % 2
    float top[2], total[2];   // of heads 2t and 2t + 1; the total is this thread's
};

// Where a warp is: what it loads next.
struct Place {
    const element *k, *v;  // this thread's part of its first key: of key g, of key 2t
    long long k_stride, v_stride, k_advance, v_advance;  // from key to key, from step to step of the warp
    int length;
};

__device__ inline Words stream(const element* p) {  // read once: keep it out of L1
    Words w;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "l"(p));
    return w;
}

__device__ inline int warp_index() {  // the same for all its threads, which the compiler then knows
    return __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
}

__device__ inline unsigned lane_index() { return threadIdx.x % 32; }

__device__ inline bool whole(const Place& p, int step) { return kStep * step + kStep <= p.length; }

// Of the keys of a step: row r of the products is key 8r + g, rows r of the values are 2t, 2t + 1, 2t + 8, 2t + 9.
__device__ inline int key_of_row(int r) { return 8 * r + lane_index() / 4; }
__device__ inline int key_of_value(int r) { return r / 2 * 8 + r % 2 + 2 * (lane_index() % 4); }

__device__ inline void load(Keys& keys, Place& p, int step) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool inside = whole(p, step) || kStep * step + key_of_row(r) < p.length;
#pragma unroll
        for (int j = 0; j < kPieces; ++j)
            keys.at[r][j] = inside ? stream(p.k + 8 * r * p.k_stride + 32 * j) : Words{};
    }
    p.k += p.k_advance;
}

__device__ inline void load(Values& values, Place& p, int step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // past the length they must be zero: no weight makes a NaN nothing
        const bool inside = whole(p, step) || kStep * step + key_of_value(r) < p.length;
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
            values.at[r][h] = inside ? stream(p.v + (r / 2 * 8 + r % 2) * p.v_stride + 64 * h) : Words{};
    }
    p.v += p.v_advance;
}

__device__ inline void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c[e]: key g + 8 * (e / 2), head 2t + e % 2.
__device__ inline void score(float (&c)[4], const Keys& keys, const Query& query) {
    float odd[4] = {};  // two sums: products that wait for each other are half as many
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] = 0.0f;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        const Words &a = keys.at[0][j], &b = keys.at[1][j];
        const Words q = query.at[j][lane_index()].again();
        multiply(c, a.at[0], b.at[0], a.at[1], b.at[1], q.at[0], q.at[1]);
        multiply(odd, a.at[2], b.at[2], a.at[3], b.at[3], q.at[2], q.at[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] += odd[e];
}

__device__ inline float nothing() { return -__int_as_float(0x7F800000); }  // minus infinity

__device__ inline unsigned pack(float low, float high) {
    unsigned both;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ inline unsigned transpose(unsigned pair) {
    unsigned out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The scores' weights, as the product with the values takes them.
__device__ inline void weigh(unsigned (&weights)[2], Sums& sums, float (&c)[4], float scale_log2, const Place& p,
                             int step) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] *= scale_log2;
    if (!whole(p, step)) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (kStep * step + key_of_row(e / 2) >= p.length) c[e] = nothing();
    }
    float highest[2] = {fmaxf(c[0], c[2]), fmaxf(c[1], c[3])};
    const bool passed = highest[0] > sums.top[0] + kSlack || highest[1] > sums.top[1] + kSlack;
    if (__any_sync(0xFFFFFFFF, passed)) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2)
                highest[e] = fmaxf(highest[e], __shfl_xor_sync(0xFFFFFFFF, highest[e], lanes));
            const float top = fmaxf(sums.top[e], highest[e]);
            const float factor = exp2_fast(sums.top[e] - top);
            sums.top[e] = top;
            sums.total[e] *= factor;
#pragma unroll
            for (int h = 0; h < kHalves; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums.at[h][i][e] *= factor;
                    sums.at[h][i][2 + e] *= factor;
                }
        }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        c[e] = exp2_fast(c[e] - sums.top[e % 2]);
        sums.total[e % 2] += c[e];
    }
    weights[0] = transpose(pack(c[0], c[1]));
    weights[1] = transpose(pack(c[2], c[3]));
}

__device__ inline void accumulate(Sums& sums, const Values& values, const unsigned (&weights)[2]) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned a = values.at[0][h].at[i], b = values.at[1][h].at[i];
            const unsigned c = values.at[2][h].at[i], d = values.at[3][h].at[i];
            multiply(sums.at[h][i], __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410),
                     __byte_perm(c, d, 0x7632), weights[0], weights[1]);
        }
}

__device__ inline void signal() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void await_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The steps that a warp takes: first, first + stride, ... below end.
struct Steps {
    int first, stride, end;
};

__device__ inline Steps steps_of(int split, int splits, int length, int interleaved) {
    const int all = (length + kStep - 1) / kStep, warp = warp_index();
    if (interleaved) return {split * WARPS + warp, splits * WARPS, all};
    const int each = (all + splits - 1) / splits;
    return {split * each + warp, WARPS, min(split * each + each, all)};
}

__device__ inline void ask(Place p, const Steps& steps) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
        const int step = steps.first + a * steps.stride;
        if (step >= steps.end) return;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int j = 0; j < kPieces; ++j)
                if (kStep * step + key_of_row(r) < p.length)
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.k + 8 * r * p.k_stride + 32 * j));
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int h = 0; h < kHalves; ++h)
                if (kStep * step + key_of_value(r) < p.length)
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.v + (r / 2 * 8 + r % 2) * p.v_stride + 64 * h));
        p.k += p.k_advance;
        p.v += p.v_advance;
    }
#endif
}

__device__ inline int length_of(const int* lens, long long batch, int lens_words, int s) {
    if (lens == nullptr) return s;
    int length;  // the low word of 64 bits will do
    asm volatile("ld.volatile.global.s32 %0, [%1];" : "=r"(length) : "l"(lens + batch * lens_words));
    return max(0, min(length, s));
}

// Every step of this warp; DEPTH steps' loads are in flight.
__device__ inline void attend(Sums& sums, Query& query, Place p, const Steps& steps, const element* q,
                              float scale_log2, bool used) {
    Keys keys[DEPTH];
    Values values[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
        const int step = steps.first + d * steps.stride;
        if (step < steps.end) {
            load(keys[d], p, step);
            load(values[d], p, step);
        }
    }
    const int warp = warp_index();
    if (warp < kPieces) query.at[warp][lane_index()].words = used ? stream(q + 32 * warp) : Words{};
    __syncthreads();
    for (int first = steps.first; first < steps.end; first += DEPTH * steps.stride) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int step = first + d * steps.stride, next = step + DEPTH * steps.stride;
            if (step >= steps.end) break;
            float c[4];
            unsigned weights[2];
            score(c, keys[d], query);
            if (next < steps.end) load(keys[d], p, next);
            weigh(weights, sums, c, scale_log2, p, step);
            accumulate(sums, values[d], weights);
            if (next < steps.end) load(values[d], p, next);
        }
    }
}

struct Joined {
    float top[WARPS][kHeads], total[WARPS][kHeads];
    alignas(16) float at[WARPS][kHeads][kStride];
};


// Four neighbouring results, rounded.
__device__ inline void store(element* p, float4 x) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack(x.x, x.y), pack(x.z, x.w));
}

__device__ inline float4 operator*(float4 x, float f) { return make_float4(x.x * f, x.y * f, x.z * f, x.w * f); }

__device__ inline void add(float4& sum, float4 x, float f) {
    sum.x += x.x * f;
    sum.y += x.y * f;
    sum.z += x.z * f;
    sum.w += x.w * f;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    attention_decode(const element* q, const element* k, const element* v, const int* lens, element* out,
                     float* partial, float* lse, long long q_batch, long long q_head, long long k_batch,
                     long long k_key, long long k_head, long long v_batch, long long v_key, long long v_head,
                     long long out_batch, long long out_head, float scale_log2, int s, int heads, int group, int splits,
                     int interleaved, int lens_words) {
    __shared__ Joined joined;
    __shared__ Query query;
    const int split = blockIdx.x, head_index = blockIdx.y;
    const int warp = warp_index(), lane = lane_index();
    const long long batch = head_index / heads, head = head_index % heads;
    const element* first_k = k + batch * k_batch + head * k_head + lane / 4 * k_key + 8 * (lane % 4);
    const element* first_v = v + batch * v_batch + head * v_head + lane % 4 * 2 * v_key + 8 * (lane / 4);
    // Their terms are the same for all steps, and the compiler would add them up each time.
    asm volatile("" : "+l"(first_k), "+l"(first_v));
    const auto place = [&](const Steps& steps, int length) {
        const long long first = kStep * steps.first, advance = kStep * steps.stride;
        return Place{first_k + first * k_key, first_v + first * v_key, k_key, v_key, advance * k_key,
                     advance * v_key, length};
    };
    int length = length_of(lens, batch, lens_words, s);
    Steps steps = steps_of(split, splits, length, interleaved);
    Place p = place(steps, length);
    ask(p, steps);  // the length may still change: here it only chooses what to ask
    signal();
    await_predecessor();

    if (const int now = length_of(lens, batch, lens_words, s); now != length) {
        length = now;
        steps = steps_of(split, splits, length, interleaved);
        p = place(steps, length);
    }
    Sums sums = {};
    sums.top[0] = sums.top[1] = kLow;
    attend(sums, query, p, steps,
           q + batch * q_batch + (head * group + lane / 4) * q_head + 8 * (lane % 4), scale_log2, lane / 4 < group);

#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2)
            sums.total[e] += __shfl_xor_sync(0xFFFFFFFF, sums.total[e], lanes);
        if (lane < 4) {
            joined.top[warp][2 * lane + e] = sums.top[e];
            joined.total[warp][2 * lane + e] = sums.total[e];
        }
    }
#pragma unroll
    for (int pass = 0; pass < DIM / kJoined; ++pass) {
        if (pass > 0) __syncthreads();
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int h = 0; h < kJoined / 64; ++h)
#pragma unroll
                for (int j = 0; j < 2; ++j) {  // dimensions 8g + 4j to 8g + 4j + 3 lie at 32j + 4g
                    const auto& c = sums.at[pass * (kJoined / 64) + h];
                    *reinterpret_cast<float4*>(&joined.at[warp][2 * (lane % 4) + e][64 * h + 32 * j + lane / 4 * 4]) =
                        make_float4(c[2 * j][e], c[2 * j][2 + e], c[2 * j + 1][e], c[2 * j + 1][2 + e]);
                }
        __syncthreads();
        for (int i = threadIdx.x; i < kHeads * kJoined / 4; i += 32 * WARPS) {
            const int row = i / (kJoined / 4), place = i % (kJoined / 4);
            const int dim = pass * kJoined + place / 16 * 64 + place % 8 * 8 + place % 16 / 8 * 4;
            float top = kLow, total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) top = fmaxf(top, joined.top[w][row]);
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float weight = exp2_fast(joined.top[w][row] - top);
                total += joined.total[w][row] * weight;
                add(sum, *reinterpret_cast<const float4*>(&joined.at[w][row][4 * place]), weight);
            }
            if (row >= group) continue;
            const bool empty = total == 0.0f;
            sum = sum * (1.0f / (empty ? 1.0f : total));
            if (splits == 1) {
                store(out + batch * out_batch + (head * group + row) * out_head + dim, sum);
                continue;
            }
            const long long at = ((long long)split * gridDim.y + head_index) * group + row;
            *reinterpret_cast<float4*>(partial + at * DIM + dim) = sum;
            if (dim == 0) lse[at] = empty ? nothing() : top + log2f(total);
        }
    }
}

// One query head: the splits' sums, weighed by their share of the softmax. Block (row of the group, batch and head).
extern "C" __global__ void __launch_bounds__(128)
    combine(const float* partial, const float* lse, element* out, long long out_batch, long long out_head, int heads,
            int group, int splits) {
    constexpr int kWarps = 4, kLoads = 32 / kWarps;
    __shared__ float4 sums[kWarps][DIM / 4];
    signal();  // the kernel after waits for this one's end, and so for the splits'
    await_predecessor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long stride = (long long)gridDim.y * group, at = (long long)blockIdx.y * group + blockIdx.x;
    float weights[kSplitsMax / 32], top = nothing(), total = 0.0f;
#pragma unroll
    for (int c = 0; c < kSplitsMax / 32; ++c) {
        const int split = 32 * c + lane;
        weights[c] = split < splits ? lse[split * stride + at] : nothing();
    }
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int c = 0; c < kSplitsMax / 32; ++c) {
        if (32 * c >= splits) break;
        float4 parts[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
            const int split = 32 * c + kWarps * j + warp;
            if (split < splits && lane < DIM / 4)
                parts[j] = reinterpret_cast<const float4*>(partial + (split * stride + at) * DIM)[lane];
        }
        if (c == 0) {
#pragma unroll
            for (int d = 0; d < kSplitsMax / 32; ++d) top = fmaxf(top, weights[d]);
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, lanes));
#pragma unroll
            for (int d = 0; d < kSplitsMax / 32; ++d) {
                weights[d] = exp2_fast(weights[d] - (top == nothing() ? 0.0f : top));
                total += weights[d];
            }
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) total += __shfl_xor_sync(0xFFFFFFFF, total, lanes);
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
            const float weight = __shfl_sync(0xFFFFFFFF, weights[c], kWarps * j + warp);
            if (weight > 0.0f) add(sum, parts[j], weight);  // a split of no weight may have sums that are no numbers
        }
    }
    if (lane < DIM / 4) sums[warp][lane] = sum;
    __syncthreads();
    if (threadIdx.x >= DIM / 4) return;
    float4 result = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) add(result, sums[w][lane], 1.0f);
    const long long batch = blockIdx.y / heads, head = blockIdx.y % heads;
    store(out + batch * out_batch + (head * group + blockIdx.x) * out_head + 4 * lane,
          result * (1.0f / (total == 0.0f ? 1.0f : total)));
}
