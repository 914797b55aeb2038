#pragma once

// AVX-512 with VNNI.
//
// vpdpbusd multiplies unsigned by signed bytes, and can take the signed ones from memory with a broadcast. So the
// weights are the unsigned side: 128 is added to the levels, and sums of the activations (act_view::corr) take it out
// again.

#include "kernels-common.h"

#include <immintrin.h>

namespace aaac {

constexpr int TILE_ROWS    = 16;
constexpr int TILE_COLS    = 16;
constexpr int DOT_ROWS     = 4;
constexpr int DOT_COLS     = 4;
constexpr int MAX_DOT_COLS = 16;
constexpr int CHUNK        = 256; // weights of a row that dot_rows takes at once
constexpr int LEVEL_OFFSET = 128;
constexpr float SCALE_FACTOR = 2.0f; // in weight_chunk::scale

using vec_i = __m512i;
using vec_f = __m512;
using vec_w = __m512i;

struct levels_table {
    __m512i book[2]; // one codebook in each 128-bit lane, for vpshufb
    __m512i both;    // the two codebooks one after the other, twice, for vpermb
    float   d;
    int     m;

    explicit levels_table(const aaac_params * p) : d(p->d), m(p->m) {
        for (int i = 0; i < 2; ++i) {
            const __m128i levels = _mm_loadu_si128((const __m128i *) p->codebooks[i]);
            book[i] = _mm512_broadcast_i32x4(_mm_xor_si128(levels, _mm_set1_epi8((char) 0x80))); // + 128
        }
        both = _mm512_mask_blend_epi64(0xCC, book[0], book[1]);
    }
};

// Return which bytes of a run take the second codebook: each of the 4 selector bits becomes 16 bits.
inline __mmask64 selector_mask(uint32_t selectors) {
    alignas(64) static const uint64_t mask[16] = {
        0x0000000000000000, 0x000000000000ffff, 0x00000000ffff0000, 0x00000000ffffffff,
        0x0000ffff00000000, 0x0000ffff0000ffff, 0x0000ffffffff0000, 0x0000ffffffffffff,
        0xffff000000000000, 0xffff00000000ffff, 0xffff0000ffff0000, 0xffff0000ffffffff,
        0xffffffff00000000, 0xffffffff0000ffff, 0xffffffffffff0000, 0xffffffffffffffff,
    };
    return _cvtu64_mask64(mask[selectors]);
}

// Return the levels of 64 indices. A bit of selectors chooses the codebook for each.
inline __m512i masked_look_up(const levels_table & t, __m512i idx, __mmask64 selectors) {
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(t.book[0], idx), selectors, t.book[1], idx);
}

// Return the levels of a run of 64 weights.
inline __m512i run_levels(const levels_table & t, const uint8_t * qs, uint32_t selectors) {
    const __m256i q  = _mm256_loadu_si256((const __m256i *) qs);
    const __m512i lh = _mm512_inserti64x4(_mm512_castsi256_si512(q), _mm256_srli_epi16(q, 4), 1);
    return masked_look_up(t, _mm512_and_si512(lh, _mm512_set1_epi8(0x0F)), selector_mask(selectors));
}

inline void decode_run(const levels_table & t, const uint8_t * qs, uint32_t selectors, uint8_t * out) {
    _mm512_store_si512(out, run_levels(t, qs, selectors));
}

inline float quantize_block(const float * x, int8_t * q) {
    const __m512 x0 = _mm512_loadu_ps(x);
    const __m512 x1 = _mm512_loadu_ps(x + 16);
    const float amax = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
    const float d    = amax/127.0f;
    const __m512 id  = _mm512_set1_ps(inverse_scale(d));
    _mm_storeu_si128((__m128i *) (q +  0), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x0, id))));
    _mm_storeu_si128((__m128i *) (q + 16), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x1, id))));
    return d;
}

//
// dot_rows, 256 weights (4 runs) at a time
//
// The index bytes of the 4 runs are interleaved, so that all 4 levels of a lane belong to one group of 16. Two lanes
// hold the products of a group:
//
//     128-bit part j of p[0] | run j/2, group j%2 | run j/2 + 2, group j%2 |      p[1]: groups 2 + j%2
//                            |  2 lanes           |  2 lanes               |
//
// One addition of neighbours then gives the exact integer sums of all 16 groups in one vector. Its lane 4*j + e is run
// j/2 + 2*(e%2), group j%2 + 2*(e/2). Scales and activations are brought to the same order.

template <class T>
struct chunk_order {
    // the word with the header of the lane's run: 0 .. 15 are words of the first 2 runs, 16 .. 31 of the last 2
    int32_t header[16];
    int32_t code[16];        // first bit of the lane's scale code in this word
    uint8_t selector[2][64]; // for each byte of p[0], p[1]: the bit of its selector in the 64 bits of headers beside it

    // Return how many bits precede the header of a run in its word.
    static constexpr int shift(int run) { return T::header(run % 2) % 4*8; }

    constexpr chunk_order() : header(), code(), selector() {
        for (int lane = 0; lane < 16; ++lane) {
            const int run = lane/8 + 2*(lane % 2), group = lane/4 % 2 + lane % 4/2*2;
            header[lane]  = T::header(run % 2)/4 + 16*(run/2);
            code[lane]    = shift(run) + T::code_bit(group);
        }
        for (int i = 0; i < 2*64; ++i) {
            const int run = i % 64/32 + i % 16/8*2, group = i % 32/16 + i/64*2;
            selector[i/64][i % 64] = (uint8_t) (run/2*32 + shift(run) + T::selector_bit(run % 2, group));
        }
    }
};

template <class T> alignas(64) static constexpr chunk_order<T> order;

// The activations of one column in that order.
struct act_chunk {
    __m512i q[4];
    __m512i corr; // for each group one of its two lanes: those of p[0] are 0, 2, ..., those of p[1] are 1, 3, ...
    __m512  d;

    void load(const act_view & act, int64_t i, int64_t k) {
        const int8_t * a = act.q + i;
        for (int h = 0; h < 2; ++h) {
            const __m512i x = load_halves(a + 32*h,       a + 32*h + 64);
            const __m512i y = load_halves(a + 32*h + 128, a + 32*h + 192);
            q[2*h + 0] = _mm512_unpacklo_epi64(x, y);
            q[2*h + 1] = _mm512_unpackhi_epi64(x, y);
        }
        const int n = (int) (k - i < 256 ? k - i : 256);
        const __m512i c = _mm512_maskz_loadu_epi32((__mmask16) ((1u << n/16) - 1), act.corr + i/16);
        corr = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15), c);
        d = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5, 2, 6, 3, 7, 2, 6, 3, 7),
                                  _mm512_maskz_loadu_ps((__mmask16) ((1u << n/32) - 1), act.d + i/32));
    }

    static __m512i load_halves(const void * a, const void * b) {
        const __m256i x = _mm256_loadu_si256((const __m256i *) a);
        const __m256i y = _mm256_loadu_si256((const __m256i *) b);
        return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    }
};

// The weights of one row in that order.
template <class T>
struct weight_chunk {
    __m512i levels[4];
    __m512  scale; // SCALE_FACTOR*f(code). The caller multiplies its sum by the tensor's d

    weight_chunk(const levels_table & t, const uint8_t * chunk) {
        constexpr int half = (int) row_bytes<T>(CHUNK)/2;
        const __m512i headers = _mm512_permutex2var_epi32(_mm512_loadu_si512(chunk), _mm512_load_si512(order<T>.header),
                                                          _mm512_loadu_si512(chunk + half));

        const uint8_t * qs = chunk + T::qs(0);
        const __m512i x  = act_chunk::load_halves(qs,        qs        + T::qs(1) - T::qs(0));
        const __m512i y  = act_chunk::load_halves(qs + half, qs + half + T::qs(1) - T::qs(0));
        const __m512i q0 = _mm512_unpacklo_epi64(x, y);
        const __m512i q1 = _mm512_unpackhi_epi64(x, y);
        const auto lo = selectors(headers, order<T>.selector[0]);
        const auto hi = selectors(headers, order<T>.selector[1]);
        levels[0] = look_up(t, q0, lo);
        levels[1] = look_up(t, q1, lo);
        levels[2] = look_up(t, _mm512_srli_epi16(q0, 4), hi);
        levels[3] = look_up(t, _mm512_srli_epi16(q1, 4), hi);

        // Rotate the code to where aaac_scale_factor shifts it. The bits of 2.0 are zero where those of the code may
        // be, so that an "or" adds them: codes & mask | 2.0. SCALE_FACTOR is this 2.
        const __m512i shift = _mm512_sub_epi32(_mm512_set1_epi32(23 - t.m), _mm512_load_si512(order<T>.code));
        const __m512i codes = _mm512_rolv_epi32(headers, shift);
        const __m512i mask  = _mm512_set1_epi32((T::n_codes - 1) << (23 - t.m));
        const __mmask16 nonzero = _mm512_test_epi32_mask(codes, mask);
        scale = _mm512_castsi512_ps(
            _mm512_maskz_ternarylogic_epi32(nonzero, codes, mask, _mm512_set1_epi32(0x40000000), 0xEA));
    }

#if defined(__AVX512VBMI__)
    // Return the selectors as bit 4 of each byte. The bits above it are noise, which does no harm: vpermb ignores bits
    // 6 and 7, and the table holds the codebooks twice for bit 5.
    static __m512i selectors(__m512i headers, const uint8_t * bits) {
        return _mm512_multishift_epi64_epi8(_mm512_sub_epi8(_mm512_load_si512(bits), _mm512_set1_epi8(4)), headers);
    }
    static __m512i look_up(const levels_table & t, __m512i q, __m512i selectors) {
        // the low 4 bits of q and the others of selectors
        const __m512i idx = _mm512_ternarylogic_epi32(q, selectors, _mm512_set1_epi8(0x0F), 0xE4);
        return _mm512_permutexvar_epi8(idx, t.both);
    }
#else
    // Return the selectors as a mask of bytes.
    static __mmask64 selectors(__m512i headers, const uint8_t * bits) {
        const __m512i at   = _mm512_load_si512(bits);
        const __m512i byte = _mm512_and_si512(_mm512_srli_epi16(at, 3), _mm512_set1_epi8(7));
        const __m512i bit  = _mm512_shuffle_epi8(_mm512_set1_epi64((long long) 0x8040201008040201),
                                                 _mm512_and_si512(at, _mm512_set1_epi8(7)));
        return _mm512_test_epi8_mask(_mm512_shuffle_epi8(headers, byte), bit);
    }
    static __m512i look_up(const levels_table & t, __m512i q, __mmask64 selectors) {
        return masked_look_up(t, _mm512_and_si512(q, _mm512_set1_epi8(0x0F)), selectors);
    }
#endif
};

// Add the products of one chunk, each group times its scales, to sum.
template <class T>
__m512 multiply(const weight_chunk<T> & w, const act_chunk & a, __m512 sum) {
    const __m512i c0 = _mm512_maskz_mov_epi32(0x5555, a.corr);
    const __m512i c1 = _mm512_maskz_mov_epi32(0xAAAA, a.corr);
    const __m512i p0 = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(c0, w.levels[0], a.q[0]), w.levels[1], a.q[1]);
    const __m512i p1 = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(c1, w.levels[2], a.q[2]), w.levels[3], a.q[3]);
    const __m512 even = _mm512_shuffle_ps(_mm512_castsi512_ps(p0), _mm512_castsi512_ps(p1), 0x88);
    const __m512 odd  = _mm512_shuffle_ps(_mm512_castsi512_ps(p0), _mm512_castsi512_ps(p1), 0xDD);
    const __m512i p = _mm512_add_epi32(_mm512_castps_si512(even), _mm512_castps_si512(odd));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(p), _mm512_mul_ps(w.scale, a.d), sum);
}

inline float reduce_add(vec_f x)                         { return _mm512_reduce_add_ps(x); }
inline vec_w w_load(const uint8_t * p)                   { return _mm512_loadu_si512(p); }
inline vec_f f_load(const float * p)                     { return _mm512_loadu_ps(p); }
inline void  f_store(float * p, vec_f x)                 { _mm512_storeu_ps(p, x); }
inline vec_f f_set1(float a)                             { return _mm512_set1_ps(a); }
inline vec_f f_zero()                                    { return _mm512_setzero_ps(); }
inline vec_f f_mul(vec_f a, vec_f b)                     { return _mm512_mul_ps(a, b); }
inline vec_f f_fma(vec_f a, vec_f b, vec_f c)            { return _mm512_fmadd_ps(a, b, c); }
inline vec_i i_set1(int32_t a)                           { return _mm512_set1_epi32(a); }
inline vec_i i_add(vec_i a, vec_i b)                     { return _mm512_add_epi32(a, b); }
inline vec_f i_to_f(vec_i a)                             { return _mm512_cvtepi32_ps(a); }
inline vec_i dot4(vec_i acc, vec_w w, const int8_t * a) {
    int32_t four;
    memcpy(&four, a, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
}

} // namespace aaac

#include "kernels-dot-x86.h"
