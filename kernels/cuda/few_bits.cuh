// Weights of 4 and 8 bits in registers: a 32-bit word as pairs of bf16 or fp16, ready for mma.
//
// -D HALF=0|1 (bf16|fp16), BITS=4|8, FLOAT8=0|1 (e4m3 where BITS is 8), SCALE=0|1|2 (scales of fp16, bf16, float32).
//
// Pair i of a word holds columns i and i + kColumns / 2 of it: the two come out of the word by one shift and one mask.
// A sum over columns may run in any order, so the other operand is put into the same order and nothing is moved here.
// Every integer is exact in both types: it is or-ed into the mantissa of a power of two, which is then subtracted.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if HALF
typedef __half element;
#define TYPE "f16"
__device__ inline element narrow(float x) { return __float2half_rn(x); }
__device__ inline float wide(element x) { return __half2float(x); }
#else
typedef __nv_bfloat16 element;
#define TYPE "bf16"
__device__ inline element narrow(float x) { return __float2bfloat16_rn(x); }
__device__ inline float wide(element x) { return __bfloat162float(x); }
#endif

#if SCALE == 0
typedef __half scale_type;
__device__ inline float widen(scale_type x) { return __half2float(x); }
#elif SCALE == 1
typedef __nv_bfloat16 scale_type;
__device__ inline float widen(scale_type x) { return __bfloat162float(x); }
#else
typedef float scale_type;
__device__ inline float widen(scale_type x) { return x; }
#endif

constexpr int kColumns = 32 / BITS;      // columns of a word
constexpr int kPairs = kColumns / 2;     // pairs of a word
constexpr float kCentre = BITS == 4 ? 8.0f : 0.0f;  // what unpack has subtracted

__device__ inline unsigned both(unsigned low) { return low << 16 | low; }

__device__ inline unsigned fma2(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

template <unsigned MASK, unsigned BITS_SET>
__device__ inline unsigned masked(unsigned word) {  // (word & MASK) | BITS_SET, one instruction
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "n"(MASK), "n"(BITS_SET));
    return d;
}

// One word: kPairs pairs of value (int8, fp8) or of value - 8 (int4).
__device__ inline void unpack(unsigned (&pair)[kPairs], unsigned word) {
#if BITS == 4 && HALF  // 1024 + q, or 1024 + 16 q, in fp16
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned shifted = word >> (4 * i);
        pair[i] = fma2(masked<0x000F000Fu, 0x64006400u>(shifted), both(0x3C00), both(0xE408));      // - 1032
        pair[i + 1] = fma2(masked<0x00F000F0u, 0x64006400u>(shifted), both(0x2C00), both(0xD480));  // / 16 - 72
    }
#elif BITS == 4  // 128 + q in bf16
#pragma unroll
    for (int i = 0; i < 4; ++i)
        pair[i] = fma2(masked<0x000F000Fu, 0x43004300u>(word >> (4 * i)), both(0x3F80), both(0xC308));  // - 136
#elif FLOAT8 && HALF  // the exponent's bias grows from 7 to 15
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned high = i ? word : word << 8;
        pair[i] = fma2((high & 0x80008000u) | (high >> 1 & 0x3F803F80u), both(0x5C00), both(0x8000));
    }
#elif FLOAT8  // from 7 to 127
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned high = i ? word : word << 8;
        pair[i] = fma2((high & 0x80008000u) | (high >> 4 & 0x07F007F0u), both(0x7B80), both(0x8000));
    }
#elif HALF  // 1024 + 128 + value in fp16
    const unsigned shifted = word ^ 0x80808080u;
    pair[0] = fma2(__byte_perm(shifted, 0x64646464u, 0x4240), both(0x3C00), both(0xE480));
    pair[1] = fma2(__byte_perm(shifted, 0x64646464u, 0x4341), both(0x3C00), both(0xE480));
#else  // 128 + the low seven bits, less 128 or 256 by the sign bit, which is bf16's lowest exponent bit there
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned low = masked<0x007F007Fu, 0x43004300u>(word >> (8 * i));
        pair[i] = fma2(masked<0x00800080u, 0x43004300u>(word >> (8 * i)), both(0xBF80), low);
    }
#endif
}
