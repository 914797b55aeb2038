// The parts of every AAAC kernel: raw loads, the byte table look-up, integer dot products, half types.
//
// nvcc and NVRTC compile this file. For the tests a plain C++ compiler does too, so the few instructions that C cannot
// express are emulated on the host.
//
// A unit is the work of one thread: 16 index bytes of a run. Their low nibbles are 16 weights, and their high nibbles
// are the 16 weights that start 32 later. Each of these two halves has one selector and one scale code in every type.

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

// For structures that a kernel takes by value. A grid constant is indexed where it is. Without this, each thread copies
// it to its stack. Needs Volta.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 700
#define AAAC_GRID_CONSTANT __grid_constant__
#else
#define AAAC_GRID_CONSTANT
#endif

constexpr int AAAC_UNIT = 32; // weights per unit

//
// instructions
//

// PTX prmt: byte i of the result is byte (nibble i of s) & 7 of b:a. If bit 3 of the nibble is set, it is the sign of
// this byte instead, as 0x00 or 0xFF. __byte_perm would spend an instruction on clearing bit 3.
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

// Return c plus the sum of 4 products of signed bytes.
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

// Return bits shift .. shift + 31 of hi:lo, for a shift of 0 .. 32.
AAAC_DEV uint32_t aaac_funnel(uint32_t lo, uint32_t hi, uint32_t shift) {
#if defined(__CUDA_ARCH__)
    return __funnelshift_rc(lo, hi, shift);
#else
    return shift == 32 ? hi : (uint32_t) (((uint64_t) hi << 32 | lo) >> shift);
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
// 16-bit floats, with the bits of __half and __nv_bfloat16. Own types, so that NVRTC needs no header of the toolkit.
//

struct aaac_f16  { uint16_t bits; };
struct aaac_bf16 { uint16_t bits; };

// 16 bytes, which one instruction loads or stores
template <class O> struct alignas(16) aaac_pack { O x[16/sizeof(O)]; };

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
    return 0.0f; // never runs: nvcc's pass for the host only parses device code
#endif
}

// Round to nearest, ties to even.
template <class O> AAAC_DEV O aaac_from_float(float x);

#if defined(__CUDACC__)
#define AAAC_SPECIAL template <> __device__ __forceinline__
#else
#define AAAC_SPECIAL template <> inline
#endif

AAAC_SPECIAL float aaac_from_float<float>(float x) { return x; }

AAAC_SPECIAL aaac_bf16 aaac_from_float<aaac_bf16>(float x) {
    const uint32_t bits = aaac_as_uint(x);
    const bool     nan  = (bits & 0x7FFFFFFFu) > 0x7F800000u; // of an activation, which stays NaN with another payload
    aaac_bf16 r;
    r.bits = (uint16_t) (nan ? bits >> 16 | 0x40 : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
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

// 16 index bytes as they are in memory, and the header of the block.
struct aaac_raw {
    uint32_t q[4];
    uint32_t head;
};

// Load the 16 bytes at a + 2, for an even address a. Blocks of 34 and 66 bytes are aligned to 2 bytes only, and eight
// loads of 2 bytes would take longer than all the arithmetic. So five aligned words are loaded, which hold the 16
// bytes. They start inside the tensor and may end 2 bytes after the 16.
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

// One struct per type. v: unit of the block. half: 0 for the low nibbles, 1 for the high ones.
struct aaac_g16 {
    static constexpr int size  = sizeof(block_aaac4_g16);
    static constexpr int units = QK_AAAC4_G16/AAAC_UNIT;

    AAAC_DEV void load(const uint8_t * block, int v, aaac_raw & raw) {
        const uint32_t * words = (const uint32_t *) block; // aligned to 4 bytes, as 36 is a multiple of 4
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

// Load unit u of a row.
template <class T>
AAAC_DEV void aaac_load(const uint8_t * row, int u, aaac_raw & raw) {
    T::load(row + (int64_t) (u/T::units)*T::size, u % T::units, raw);
}

//
// levels
//

// Both codebooks as look-up tables in shared memory, where a thread loads the 16 bytes of its selector at once.
//   level  the 16 levels of a codebook, 4 to a word
//   split  the same codebook as two tables of 8, for aaac_lookup_split: low in the first 2 words, high in the last 2
struct alignas(16) aaac_tables {
    uint32_t level[AAAC_N_CODEBOOKS][4];
    uint32_t split[AAAC_N_CODEBOOKS][4];
};

// Split levels i (first) and i + 8 (last) between two tables of 8, so that a look-up in both needs no merge.
// An index of the other 8 does not find a level in a table, because of bit 3 of prmt. It finds the sign of entry i, 0
// or -1. The entries are chosen so that the difference low - high is right in spite of this sign:
//     index i < 8:   low[i] - sign(high[i])    = level[i]
//     index i + 8:   sign(low[i]) - high[i]    = level[i + 8]
// This has a solution in int8 for every ascending pair within [-127, 127]. A test tries all of them.
AAAC_FN void aaac_split_level(int first, int last, int * low, int * high) {
    const int low_sign = first <= 0 ? -1 : 0;
    *high = low_sign - last;
    *low  = first + (*high < 0 ? -1 : 0);
}

// Fill the tables with the first 16 threads. A barrier must follow.
AAAC_DEV void aaac_make_tables(const aaac_params & p, int thread, aaac_tables * tables) {
    if (thread < 16) {
        const int book = thread/8;
        const int i    = thread % 8;
        const int first = p.codebooks[book][i];
        const int last  = p.codebooks[book][i + 8];
        int8_t * level = (int8_t *) tables->level[book];
        int8_t * split = (int8_t *) tables->split[book];
        level[i]     = (int8_t) first;
        level[i + 8] = (int8_t) last;
        int low, high;
        aaac_split_level(first, last, &low, &high);
        split[i]     = (int8_t) low;
        split[i + 8] = (int8_t) high;
    }
}

// Load 16 bytes at once. p must be 16 byte aligned.
AAAC_DEV void aaac_load16(const void * p, uint32_t * w) {
#if defined(__CUDACC__)
    const uint4 v = *(const uint4 *) p;
    w[0] = v.x; w[1] = v.y; w[2] = v.z; w[3] = v.w;
#else
    memcpy(w, p, 16);
#endif
}

// Gather 8 indices from two words of index bytes: nibble 2b of the result is from byte b of q0, nibble 2b + 1 from byte
// b of q1. prmt wants its selectors in consecutive nibbles. This order costs a shift and a merge for 8 indices, natural
// order would cost three times as much.
AAAC_DEV uint32_t aaac_low_indices (uint32_t q0, uint32_t q1) { return (q0 & 0x0F0F0F0Fu) | (q1 << 4 & 0xF0F0F0F0u); }
AAAC_DEV uint32_t aaac_high_indices(uint32_t q0, uint32_t q1) { return (q0 >> 4 & 0x0F0F0F0Fu) | (q1 & 0xF0F0F0F0u); }

AAAC_DEV uint32_t aaac_indices(const uint32_t * q, int half) {
    return half ? aaac_high_indices(q[0], q[1]) : aaac_low_indices(q[0], q[1]);
}

// Return the place of weight i of 16 in the order that follows from this, "table order":
// 0 4 1 5 2 6 3 7, 8 12 9 13 10 14 11 15
AAAC_FN int aaac_place(int i) { return (i & 8) | (i & 3) << 1 | (i >> 2 & 1); }

// Look up the levels of 8 indices x, 4 to a word.
AAAC_DEV void aaac_lookup(const uint32_t * t, uint32_t x, uint32_t * out) {
    const uint32_t index = x & 0x77777777u;
    const uint32_t merge = 0x32103210u | (x >> 1 & 0x44444444u); // byte i of the first 8 levels, or of the last 8
    out[0] = aaac_prmt(aaac_prmt(t[0], t[1], index),       aaac_prmt(t[2], t[3], index),       merge);
    out[1] = aaac_prmt(aaac_prmt(t[0], t[1], index >> 16), aaac_prmt(t[2], t[3], index >> 16), merge >> 16);
}

// Look them up in a split table: the levels are the differences low - high of bytes.
AAAC_DEV void aaac_lookup_split(const uint32_t * t, uint32_t x, uint32_t * low, uint32_t * high) {
    const uint32_t other = x ^ 0x88888888u;
    low [0] = aaac_prmt(t[0], t[1], x);
    low [1] = aaac_prmt(t[0], t[1], x >> 16);
    high[0] = aaac_prmt(t[2], t[3], other);
    high[1] = aaac_prmt(t[2], t[3], other >> 16);
}

// Look up the levels of one half of a unit, in table order: 16 in 4 words.
AAAC_DEV void aaac_levels(const uint32_t * table, const uint32_t * q, int half, uint32_t * out) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t x = aaac_indices(q + 2*i, half);
        aaac_lookup(table, x, out + 2*i);
    }
}

// Look up the levels of one half of a unit, in natural order.
AAAC_DEV void aaac_levels_natural(const uint32_t * table, const uint32_t * q, int half, uint32_t * out) {
    uint32_t t[4];
    aaac_levels(table, q, half, t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        out[2*i]     = aaac_prmt(t[2*i], t[2*i + 1], 0x6420);
        out[2*i + 1] = aaac_prmt(t[2*i], t[2*i + 1], 0x7531);
    }
}

// Return the sum of level times activation over one half of a unit, both in table order. It is exact.
AAAC_DEV int aaac_dot_half(const uint32_t * levels, const uint32_t * a) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum = aaac_dp4a(levels[i], a[i], sum);
    }
    return sum;
}

// Return the same sum from indices and a split table, for few columns. This takes twice the dot products and no merge,
// which is faster: prmt and the logic share a unit of the processor, and dp4a runs beside it.
AAAC_DEV int aaac_dot_half_split(const uint32_t * split, const uint32_t * q, int half, const uint32_t * a) {
    int low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t x = aaac_indices(q + 2*i, half);
        uint32_t l[2], h[2];
        aaac_lookup_split(split, x, l, h);
        low  = aaac_dp4a(l[1], a[2*i + 1], aaac_dp4a(l[0], a[2*i], low));
        high = aaac_dp4a(h[1], a[2*i + 1], aaac_dp4a(h[0], a[2*i], high));
    }
    return low - high;
}

// Return f(code), given the multiplier 1 << (23 - m). The integer multiply-add does not compete with the look-ups.
AAAC_DEV float aaac_factor(uint32_t code, uint32_t multiplier) {
    return code == 0 ? 0.0f : aaac_as_float(code*multiplier + 0x3F800000u);
}

// Return byte i of a word as a signed level.
AAAC_DEV float aaac_level_to_float(uint32_t word, int i) { return (float) (int8_t) (word >> 8*i); }

#endif // AAAC_DEVICE_CUH
