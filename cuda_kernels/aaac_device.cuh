// What every AAAC kernel is made of: raw loads, the byte table look-up, integer dot products, half types.
//
// nvcc, NVRTC and, for the tests, a plain C++ compiler read this file; on the host the few instructions without a C spelling are emulated.
//
// The unit of work of a thread is 16 index bytes of a run: 16 weights from the low nibbles and, 32 weights later, 16 from the high ones.
// Each of the two halves has one selector and one scale code, whatever the type.

#ifndef AAAC_DEVICE_CUH
#define AAAC_DEVICE_CUH

#include "aaac_decode.cuh"

#if defined(__CUDACC_RTC__)
typedef unsigned short     uint16_t;
typedef int                int32_t;
typedef long long          int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long aaac_address;
#else
typedef uintptr_t aaac_address;
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define AAAC_DEV static __device__ __forceinline__
#else
#define AAAC_DEV static inline
#endif

// For a kernel's parameters by value: a grid constant is indexed where it is, otherwise each thread copies it to its stack. Needs Volta
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
#define AAAC_GRID_CONSTANT __grid_constant__
#else
#define AAAC_GRID_CONSTANT
#endif

constexpr int AAAC_UNIT = 32; // weights per unit

//
// instructions
//

// PTX prmt: byte i of the result is byte (nibble i of s) & 7 of b:a; bit 3 of the nibble asks for that byte's sign instead, as 0x00 or 0xFF.
// Not __byte_perm, which spends an instruction on clearing bit 3.
AAAC_DEV uint32_t aaac_prmt(uint32_t a, uint32_t b, uint32_t s) {
#if defined(__CUDA_ARCH__)
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
    return r;
#else
    const uint64_t pool = (uint64_t) b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = s >> 4*i & 15;
        const uint32_t byte   = (uint32_t) (pool >> 8*(nibble & 7)) & 0xFF;
        r |= (nibble < 8 ? byte : byte >> 7 ? 0xFFu : 0u) << 8*i;
    }
    return r;
#endif
}

// sum of 4 products of signed bytes, added to c
AAAC_DEV int aaac_dp4a(uint32_t a, uint32_t b, int c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 610
    return __dp4a((int) a, (int) b, c);
#else
    for (int i = 0; i < 4; ++i) {
        c += (int8_t) (a >> 8*i) * (int8_t) (b >> 8*i);
    }
    return c;
#endif
}

// bits shift .. shift + 31 of hi:lo, shift 0 .. 32
AAAC_DEV uint32_t aaac_funnel(uint32_t lo, uint32_t hi, uint32_t shift) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_rc(lo, hi, shift);
#else
    return shift == 32 ? hi : (uint32_t) (((uint64_t) hi << 32 | lo) >> shift);
#endif
}

AAAC_DEV float aaac_as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
#endif
}

AAAC_DEV uint32_t aaac_as_uint(float f) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(f);
#else
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
#endif
}

//
// 16-bit floats. Own types, so that NVRTC needs no header of the toolkit; their bits are those of __half and __nv_bfloat16
//

struct aaac_f16  { uint16_t bits; };
struct aaac_bf16 { uint16_t bits; };

AAAC_DEV float aaac_to_float(float x) { return x; }

AAAC_DEV float aaac_to_float(aaac_bf16 x) { return aaac_as_float((uint32_t) x.bits << 16); }

AAAC_DEV float aaac_to_float(aaac_f16 x) {
#if defined(__CUDA_ARCH__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
#elif defined(AAAC_EMULATE)
    _Float16 h;
    memcpy(&h, &x.bits, sizeof(h));
    return (float) h;
#else
    (void) x;
    return 0.0f; // nvcc's host pass parses device code but never runs it
#endif
}

// both round to nearest, ties to even
template <class O> AAAC_DEV O aaac_from_float(float x);

#if defined(__CUDACC__)
#define AAAC_SPECIAL template <> __device__ __forceinline__
#else
#define AAAC_SPECIAL template <> inline
#endif

AAAC_SPECIAL float aaac_from_float<float>(float x) { return x; }

AAAC_SPECIAL aaac_bf16 aaac_from_float<aaac_bf16>(float x) {
    const uint32_t bits = aaac_as_uint(x); // a decoded weight is never NaN, and a NaN activation stays one but for its payload
    aaac_bf16 r;
    r.bits = (uint16_t) ((bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 | 0x40 : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
    return r;
}

AAAC_SPECIAL aaac_f16 aaac_from_float<aaac_f16>(float x) {
    aaac_f16 r;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
#elif defined(AAAC_EMULATE)
    const _Float16 h = (_Float16) x;
    memcpy(&r.bits, &h, sizeof(h));
#else
    (void) x;
    r.bits = 0;
#endif
    return r;
}

//
// blocks
//

// 16 index bytes as they lie in memory, and the block's header
struct aaac_raw {
    uint32_t q[4];
    uint32_t head;
};

// 16 bytes at a + 2 for an even address a: 34 and 66 byte blocks leave only 2 byte alignment, and eight 2 byte loads would cost the load unit
// more than the arithmetic costs the rest. Five aligned words hold the 16 bytes; they may end 2 bytes past them, but start in the same tensor.
AAAC_DEV void aaac_load_unaligned(const uint8_t * a, uint32_t * q) {
    const uint32_t   odd   = (uint32_t) (aaac_address) a & 2;
    const uint32_t * words = (const uint32_t *) (a - odd);
    const uint32_t   shift = odd ? 32 : 16;
    uint32_t w[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        w[i] = words[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        q[i] = aaac_funnel(w[i], w[i + 1], shift);
    }
}

// One struct per type. v: unit of the block; half: 0 for the low nibbles, 1 for the high ones.
struct aaac_g16 {
    static constexpr int size  = sizeof(block_aaac4_g16);
    static constexpr int units = QK_AAAC4_G16/AAAC_UNIT;

    AAAC_DEV void load(const uint8_t * block, int v, aaac_raw & raw) {
        const uint32_t * words = (const uint32_t *) block; // 36 byte blocks keep the tensor's 4 byte alignment
        raw.head = words[0];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            raw.q[i] = words[1 + 4*v + i];
        }
    }
    AAAC_DEV uint32_t code    (uint32_t head, int v, int half) { return head >> 8*(v + 2*half) & 0x7F; }
    AAAC_DEV uint32_t selector(uint32_t head, int v, int half) { return head >> (8*(v + 2*half) + 7) & 1; }
};

struct aaac_g32 {
    static constexpr int size  = sizeof(block_aaac4_g32);
    static constexpr int units = QK_AAAC4_G32/AAAC_UNIT;

    AAAC_DEV void load(const uint8_t * block, int v, aaac_raw & raw) {
        raw.head = *(const uint16_t *) block;
        aaac_load_unaligned(block + 16*v, raw.q);
    }
    AAAC_DEV uint32_t code    (uint32_t head, int v, int half) { (void) v; return head >> 8*half & 0x3F; }
    AAAC_DEV uint32_t selector(uint32_t head, int v, int half) { return head >> (8*half + 6 + v) & 1; }
};

struct aaac_g128 {
    static constexpr int size  = sizeof(block_aaac4_g128);
    static constexpr int units = QK_AAAC4_G128/AAAC_UNIT;

    AAAC_DEV void load(const uint8_t * block, int v, aaac_raw & raw) {
        raw.head = *(const uint16_t *) block;
        aaac_load_unaligned(block + 16*v, raw.q);
    }
    AAAC_DEV uint32_t code    (uint32_t head, int v, int half) { (void) v; (void) half; return head & 0x7F; }
    AAAC_DEV uint32_t selector(uint32_t head, int v, int half) { return head >> (8 + 4*(v/2) + v % 2 + 2*half) & 1; }
};

// u: unit of the row
template <class T>
AAAC_DEV void aaac_load(const uint8_t * row, int u, aaac_raw & raw) {
    T::load(row + (int64_t) (u/T::units)*T::size, u % T::units, raw);
}

//
// levels
//

// Both codebooks as look-up tables, in shared memory: a thread picks the 16 bytes of its selector with one load.
//   level  the 16 levels of a book, 4 to a word
//   split  the same book as two tables of 8, for aaac_lookup_split: low in the first 2 words, high in the last 2
struct alignas(16) aaac_tables {
    uint32_t level[AAAC_N_CODEBOOKS][4];
    uint32_t split[AAAC_N_CODEBOOKS][4];
};

// A look-up in 8 levels that an index of the other 8 misses yields that place's sign, 0 or -1: prmt's bit 3 says so. Choose the tables such that
// these strays make the difference come out right, and low - high needs no merge:
//     index i < 8:   low[i] - sign(high[i])    = level[i]
//     index i + 8:   sign(low[i]) - high[i]    = level[i + 8]
// It has a solution in int8 for every ascending pair within [-127, 127]; a test goes through all of them.
AAAC_FN void aaac_split_level(int first, int second, int * low, int * high) {
    const int low_sign = first <= 0 ? -1 : 0;
    *high = low_sign - second;
    *low  = first + (*high < 0 ? -1 : 0);
}

// Fills the tables with the first 16 threads; a barrier must follow.
AAAC_DEV void aaac_make_tables(const aaac_params & p, int thread, aaac_tables * tables) {
    if (thread < 16) {
        const int book = thread/8;
        const int i    = thread % 8;
        const int first  = p.codebooks[book][i];
        const int second = p.codebooks[book][i + 8];
        int8_t * level = (int8_t *) tables->level[book];
        int8_t * split = (int8_t *) tables->split[book];
        level[i]     = (int8_t) first;
        level[i + 8] = (int8_t) second;
        int low, high;
        aaac_split_level(first, second, &low, &high);
        split[i]     = (int8_t) low;
        split[i + 8] = (int8_t) high;
    }
}

// 16 bytes at once, where p is 16 byte aligned
AAAC_DEV void aaac_load16(const void * p, uint32_t * w) {
#if defined(__CUDACC__)
    const uint4 v = *(const uint4 *) p;
    w[0] = v.x; w[1] = v.y; w[2] = v.z; w[3] = v.w;
#else
    memcpy(w, p, 16);
#endif
}

// Eight indices that share a table, from two words of index bytes: nibble 2b of the result is from byte b of q0, nibble 2b + 1 from byte b of q1.
// prmt wants its selectors in consecutive nibbles; this order costs a shift and a merge for 8, natural order would cost three times that.
AAAC_DEV uint32_t aaac_low_indices (uint32_t q0, uint32_t q1) { return (q0 & 0x0F0F0F0Fu) | (q1 << 4 & 0xF0F0F0F0u); }
AAAC_DEV uint32_t aaac_high_indices(uint32_t q0, uint32_t q1) { return (q0 >> 4 & 0x0F0F0F0Fu) | (q1 & 0xF0F0F0F0u); }

// The order that follows from it: place of weight i of 16 in "table order" (0 4 1 5 2 6 3 7, 8 12 9 13 10 14 11 15)
AAAC_FN int aaac_place(int i) { return (i & 8) | (i & 3) << 1 | (i >> 2 & 1); }

// levels of 8 indices x, 4 to a word
AAAC_DEV void aaac_lookup(const uint32_t * t, uint32_t x, uint32_t * out) {
    const uint32_t index = x & 0x77777777u;
    const uint32_t merge = 0x32103210u | (x >> 1 & 0x44444444u); // byte i of the table of the first 8 levels, or of the second
    out[0] = aaac_prmt(aaac_prmt(t[0], t[1], index),       aaac_prmt(t[2], t[3], index),       merge);
    out[1] = aaac_prmt(aaac_prmt(t[0], t[1], index >> 16), aaac_prmt(t[2], t[3], index >> 16), merge >> 16);
}

// the same as a difference low - high of bytes, from a split table
AAAC_DEV void aaac_lookup_split(const uint32_t * t, uint32_t x, uint32_t * low, uint32_t * high) {
    const uint32_t other = x ^ 0x88888888u;
    low [0] = aaac_prmt(t[0], t[1], x);
    low [1] = aaac_prmt(t[0], t[1], x >> 16);
    high[0] = aaac_prmt(t[2], t[3], other);
    high[1] = aaac_prmt(t[2], t[3], other >> 16);
}

// levels of one half of a unit in table order: 16 in 4 words
AAAC_DEV void aaac_levels(const uint32_t * table, const uint32_t * q, int half, uint32_t * out) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t x = half ? aaac_high_indices(q[2*i], q[2*i + 1]) : aaac_low_indices(q[2*i], q[2*i + 1]);
        aaac_lookup(table, x, out + 2*i);
    }
}

// the same in natural order
AAAC_DEV void aaac_levels_natural(const uint32_t * table, const uint32_t * q, int half, uint32_t * out) {
    uint32_t t[4];
    aaac_levels(table, q, half, t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        out[2*i]     = aaac_prmt(t[2*i], t[2*i + 1], 0x6420);
        out[2*i + 1] = aaac_prmt(t[2*i], t[2*i + 1], 0x7531);
    }
}

// sum over one half of a unit of level times activation, both in table order: exact
AAAC_DEV int aaac_dot_half(const uint32_t * levels, const uint32_t * a) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum = aaac_dp4a(levels[i], a[i], sum);
    }
    return sum;
}

// Look-up and dot in one, for few columns. Twice the dot products and no merge: dp4a runs beside the unit that prmt and the logic share.
AAAC_DEV int aaac_dot_half_split(const uint32_t * split, const uint32_t * q, int half, const uint32_t * a) {
    int low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t x = half ? aaac_high_indices(q[2*i], q[2*i + 1]) : aaac_low_indices(q[2*i], q[2*i + 1]);
        uint32_t l[2], h[2];
        aaac_lookup_split(split, x, l, h);
        low  = aaac_dp4a(l[1], a[2*i + 1], aaac_dp4a(l[0], a[2*i], low));
        high = aaac_dp4a(h[1], a[2*i + 1], aaac_dp4a(h[0], a[2*i], high));
    }
    return low - high;
}

// f(code) from a multiplier 1 << (23 - m): one integer multiply-add, which does not compete with the look-ups
AAAC_DEV float aaac_factor(uint32_t code, uint32_t multiplier) {
    return code == 0 ? 0.0f : aaac_as_float(code*multiplier + 0x3F800000u);
}

// byte i of a word as a signed level
AAAC_DEV float aaac_level_to_float(uint32_t word, int i) { return (float) (int8_t) (word >> 8*i); }

#endif // AAAC_DEVICE_CUH
