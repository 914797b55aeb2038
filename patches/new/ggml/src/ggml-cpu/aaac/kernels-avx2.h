#pragma once

// AVX2, with or without AVX-VNNI.
//
// AVX-VNNI's vpdpbusd wants unsigned weights, so 128 is added to the levels, see kernels-avx512.h. The vpmaddubsw of
// plain AVX2 would saturate on such levels. There the weights stay signed, and one factor of a product gives its sign
// to the other: |w|*sign(a, w).

#include "kernels-common.h"

#include <immintrin.h>

namespace aaac {

constexpr int TILE_ROWS    = 8;
constexpr int TILE_COLS    = 4;
constexpr int DOT_ROWS     = 4;
constexpr int DOT_COLS     = 4;
constexpr int MAX_DOT_COLS = 8;
constexpr int CHUNK        = 128; // weights of a row that dot_rows takes at once
#if defined(__AVXVNNI__)
constexpr int LEVEL_OFFSET = 128;
#else
constexpr int LEVEL_OFFSET = 0;
#endif
constexpr float SCALE_FACTOR = 1.0f; // in weight_chunk::scale

using vec_i = __m256i;
using vec_f = __m256;
using vec_w = __m256i;

struct levels_table {
    __m256i book[2]; // one codebook in each 128-bit lane, for vpshufb
    float   d;
    int     m;

    explicit levels_table(const aaac_params * p) : d(p->d), m(p->m) {
        for (int i = 0; i < 2; ++i) {
            const __m128i levels = _mm_loadu_si128((const __m128i *) p->codebooks[i]);
            book[i] = _mm256_broadcastsi128_si256(_mm_add_epi8(levels, _mm_set1_epi8((char) LEVEL_OFFSET)));
        }
    }
};

// Return the levels of 32 indices. The top bit of each byte of selectors chooses the codebook.
inline __m256i look_up(const levels_table & t, __m256i idx, __m256i selectors) {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(t.book[0], idx), _mm256_shuffle_epi8(t.book[1], idx), selectors);
}

// Return the levels of 32 indices. Selector bit 0 is that of the first 16, bit 1 that of the last 16.
inline __m256i half_levels(const levels_table & t, __m256i idx, uint32_t selectors) {
    const __m128i lo = _mm_set1_epi8((char) -(int) (selectors & 1));
    const __m128i hi = _mm_set1_epi8((char) -(int) (selectors >> 1 & 1));
    return look_up(t, idx, _mm256_set_m128i(hi, lo));
}

// Return the levels of a run of 64 weights as two vectors.
inline void run_levels(const levels_table & t, const uint8_t * qs, uint32_t selectors, __m256i * lo, __m256i * hi) {
    const __m256i q = _mm256_loadu_si256((const __m256i *) qs);
    const __m256i m = _mm256_set1_epi8(0x0F);
    *lo = half_levels(t, _mm256_and_si256(q, m), selectors);
    *hi = half_levels(t, _mm256_and_si256(_mm256_srli_epi16(q, 4), m), selectors >> 2);
}

inline void decode_run(const levels_table & t, const uint8_t * qs, uint32_t selectors, uint8_t * out) {
    run_levels(t, qs, selectors, (__m256i *) out, (__m256i *) (out + 32));
}

inline __m256i dot4_vec(__m256i acc, __m256i w, __m256i a) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, w, a);
#else
    // a pair of products is at most 2*127*127 < 2^15
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

inline float quantize_block(const float * x, int8_t * q) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 v[4];
    __m256 m = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_loadu_ps(x + 8*i);
        m    = _mm256_max_ps(m, _mm256_and_ps(v[i], no_sign));
    }
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    m4 = _mm_max_ss(m4, _mm_movehdup_ps(m4));
    const float  d  = _mm_cvtss_f32(m4)/127.0f;
    const __m256 id = _mm256_set1_ps(inverse_scale(d));
    __m256i n[4];
    for (int i = 0; i < 4; ++i) {
        n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], id));
    }
    // the packs work in 128-bit lanes, so a permutation must bring the groups of 4 back in order
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    const __m256i order  = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *) q, _mm256_permutevar8x32_epi32(packed, order));
    return d;
}

//
// dot_rows, 128 weights (2 runs) at a time, in an order like that of kernels-avx512.h:
// lane 4*j + e of a result is run e%2, group j + 2*(e/2).
//

template <class T>
struct chunk_order {
    int32_t selector[8]; // shift that brings the selector to the top of the header's 32 bits
    int32_t code[8];     // first bit of the scale code

    constexpr chunk_order() : selector(), code() {
        for (int lane = 0; lane < 8; ++lane) {
            const int group = lane/4 + lane % 4/2*2;
            selector[lane] = 31 - T::selector_bit(lane % 2, group);
            code[lane]     = T::code_bit(group);
        }
    }
};

template <class T> alignas(32) static constexpr chunk_order<T> order;

inline __m256i load_32(const void * p) { return _mm256_loadu_si256((const __m256i *) p); }

// The activations of one column in that order.
struct act_chunk {
    __m256i q[4];
#if defined(__AVXVNNI__)
    __m256i corr; // for each group one of its two lanes: those of the first pair are 0, 2, ..., of the second 1, 3, ...
#endif
    __m256  d;

    void load(const act_view & act, int64_t i, int64_t k) {
        const bool two = k - i >= CHUNK;
        for (int h = 0; h < 2; ++h) {
            const __m256i x = load_32(act.q + i + 32*h);
            const __m256i y = load_32(act.q + i + 32*h + 64);
            q[2*h + 0] = _mm256_unpacklo_epi64(x, y);
            q[2*h + 1] = _mm256_unpackhi_epi64(x, y);
        }
        const __m128 scales = two ? _mm_loadu_ps(act.d + i/32)
                                  : _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *) (act.d + i/32)));
        d = _mm256_set_m128(_mm_permute_ps(scales, 0xD8), _mm_permute_ps(scales, 0xD8));
#if defined(__AVXVNNI__)
        const __m256i c = two ? load_32(act.corr + i/16)
                              : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *) (act.corr + i/16)));
        corr = _mm256_permutevar8x32_epi32(c, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
#endif
    }
};

// The weights of one row in that order.
template <class T>
struct weight_chunk {
    __m256i levels[4];
    __m256  scale; // SCALE_FACTOR*f(code). The caller multiplies its sum by the tensor's d

    weight_chunk(const levels_table & t, const uint8_t * chunk) {
        int32_t header[2];
        memcpy(&header[0], chunk + T::header(0), 4);
        memcpy(&header[1], chunk + T::header(1), 4);
        const __m256i headers = _mm256_blend_epi32(_mm256_set1_epi32(header[0]), _mm256_set1_epi32(header[1]), 0xAA);

        const __m256i x  = load_32(chunk + T::qs(0));
        const __m256i y  = load_32(chunk + T::qs(1));
        const __m256i q0 = _mm256_unpacklo_epi64(x, y);
        const __m256i q1 = _mm256_unpackhi_epi64(x, y);
        const __m256i top = _mm256_sllv_epi32(headers, _mm256_load_si256((const __m256i *) order<T>.selector));
        // the selector is now the top bit of the last byte of a lane: copy this byte to the 8 that it decides
        const __m256i lo  = _mm256_shuffle_epi8(top, repeat_bytes(0x0303030303030303, 0x0707070707070707));
        const __m256i hi  = _mm256_shuffle_epi8(top, repeat_bytes(0x0B0B0B0B0B0B0B0B, 0x0F0F0F0F0F0F0F0F));
        const __m256i nibble = _mm256_set1_epi8(0x0F);
        levels[0] = look_up(t, _mm256_and_si256(q0, nibble), lo);
        levels[1] = look_up(t, _mm256_and_si256(q1, nibble), lo);
        levels[2] = look_up(t, _mm256_and_si256(_mm256_srli_epi16(q0, 4), nibble), hi);
        levels[3] = look_up(t, _mm256_and_si256(_mm256_srli_epi16(q1, 4), nibble), hi);

        // see aaac_scale_factor
        const __m256i at    = _mm256_load_si256((const __m256i *) order<T>.code);
        const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(headers, at), _mm256_set1_epi32(T::n_codes - 1));
        const __m256i bits  = _mm256_add_epi32(_mm256_slli_epi32(codes, 23 - t.m), _mm256_set1_epi32(0x3F800000));
        scale = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(codes, _mm256_setzero_si256()), bits));
    }

    // Return the same two words of byte numbers for both 128-bit lanes.
    static __m256i repeat_bytes(long long first, long long last) {
        return _mm256_set_epi64x(last, first, last, first);
    }
};

// Multiply levels 2*pair and 2*pair + 1 by activations: 4 sums of 4 products in each 128-bit part.
template <class T, int pair>
__m256i dot_pair(const weight_chunk<T> & w, const act_chunk & a) {
    constexpr int i = 2*pair;
#if defined(__AVXVNNI__)
    const __m256i corr = _mm256_blend_epi32(_mm256_setzero_si256(), a.corr, pair == 0 ? 0x55 : 0xAA);
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(corr, w.levels[i], a.q[i]), w.levels[i + 1], a.q[i + 1]);
#else
    // |a|*sign(w, a): a pair of products is at most 2*127*127 < 2^15
    const __m256i one = _mm256_set1_epi16(1);
    const __m256i p0  = _mm256_maddubs_epi16(_mm256_abs_epi8(a.q[i]), _mm256_sign_epi8(w.levels[i], a.q[i]));
    const __m256i p1  = _mm256_maddubs_epi16(_mm256_abs_epi8(a.q[i + 1]),
                                             _mm256_sign_epi8(w.levels[i + 1], a.q[i + 1]));
    return _mm256_add_epi32(_mm256_madd_epi16(p0, one), _mm256_madd_epi16(p1, one));
#endif
}

// Add the products of one chunk, each group times its scales, to sum.
template <class T>
__m256 multiply(const weight_chunk<T> & w, const act_chunk & a, __m256 sum) {
    const __m256 p0   = _mm256_castsi256_ps(dot_pair<T, 0>(w, a));
    const __m256 p1   = _mm256_castsi256_ps(dot_pair<T, 1>(w, a));
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(p0, p1, 0x88));
    const __m256i odd  = _mm256_castps_si256(_mm256_shuffle_ps(p0, p1, 0xDD));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(even, odd)), _mm256_mul_ps(w.scale, a.d), sum);
}

inline float reduce_add(vec_f x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

inline vec_w w_load(const uint8_t * p)                   { return _mm256_loadu_si256((const __m256i *) p); }
inline vec_f f_load(const float * p)                     { return _mm256_loadu_ps(p); }
inline void  f_store(float * p, vec_f x)                 { _mm256_storeu_ps(p, x); }
inline vec_f f_set1(float a)                             { return _mm256_set1_ps(a); }
inline vec_f f_zero()                                    { return _mm256_setzero_ps(); }
inline vec_f f_mul(vec_f a, vec_f b)                     { return _mm256_mul_ps(a, b); }
inline vec_f f_fma(vec_f a, vec_f b, vec_f c)            { return _mm256_fmadd_ps(a, b, c); }
inline vec_i i_set1(int32_t a)                           { return _mm256_set1_epi32(a); }
inline vec_i i_add(vec_i a, vec_i b)                     { return _mm256_add_epi32(a, b); }
inline vec_f i_to_f(vec_i a)                             { return _mm256_cvtepi32_ps(a); }
inline vec_i dot4(vec_i acc, vec_w w, const int8_t * a) {
    int32_t four;
    memcpy(&four, a, 4);
    return dot4_vec(acc, w, _mm256_set1_epi32(four));
}

} // namespace aaac

#include "kernels-dot-x86.h"
