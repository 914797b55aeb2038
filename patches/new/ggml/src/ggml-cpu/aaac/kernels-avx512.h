#pragma once

// AVX-512 with VNNI. vpdpbusd multiplies unsigned by signed bytes and takes its signed operand from memory with a broadcast, so the weights
// are the unsigned side: levels are stored with 128 added, and sums of the activations take that out again (act_view::corr).

#include <immintrin.h>

namespace aaac {

constexpr int TILE_ROWS    = 16;
constexpr int TILE_COLS    = 16;
constexpr int LEVEL_OFFSET = 128;

using vec_i = __m512i;
using vec_f = __m512;
using vec_w = __m512i;

struct levels_table {
    __m512i book[2]; // one codebook in each 128-bit lane, for vpshufb
    explicit levels_table(const aaac_params * p) {
        for (int i = 0; i < 2; ++i) {
            const __m128i levels = _mm_loadu_si128((const __m128i *) p->codebooks[i]);
            book[i] = _mm512_broadcast_i32x4(_mm_xor_si128(levels, _mm_set1_epi8((char) 0x80))); // + 128
        }
    }
};

// each of the 4 selector bits as 16 bits: which bytes of a run take the second codebook
inline __mmask64 selector_mask(uint32_t selectors) {
    alignas(64) static const uint64_t mask[16] = {
        0x0000000000000000, 0x000000000000ffff, 0x00000000ffff0000, 0x00000000ffffffff,
        0x0000ffff00000000, 0x0000ffff0000ffff, 0x0000ffffffff0000, 0x0000ffffffffffff,
        0xffff000000000000, 0xffff00000000ffff, 0xffff0000ffff0000, 0xffff0000ffffffff,
        0xffffffff00000000, 0xffffffff0000ffff, 0xffffffffffff0000, 0xffffffffffffffff,
    };
    return _cvtu64_mask64(mask[selectors]);
}

inline __m512i run_levels(const levels_table & t, const uint8_t * qs, uint32_t selectors) {
    const __m256i q   = _mm256_loadu_si256((const __m256i *) qs);
    const __m512i idx = _mm512_and_si512(_mm512_inserti64x4(_mm512_castsi256_si512(q), _mm256_srli_epi16(q, 4), 1), _mm512_set1_epi8(0x0F));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(t.book[0], idx), selector_mask(selectors), t.book[1], idx);
}

inline void decode_run(const levels_table & t, const uint8_t * qs, uint32_t selectors, uint8_t * out) {
    _mm512_store_si512(out, run_levels(t, qs, selectors));
}

inline float quantize_block(const float * x, int8_t * q) {
    const __m512 x0 = _mm512_loadu_ps(x);
    const __m512 x1 = _mm512_loadu_ps(x + 16);
    const float amax = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
    const float d    = amax/127.0f;
    const __m512 id  = _mm512_set1_ps(d >= FLT_MIN ? 1.0f/d : 0.0f); // a subnormal scale has no finite inverse
    _mm_storeu_si128((__m128i *) (q +  0), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x0, id))));
    _mm_storeu_si128((__m128i *) (q + 16), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x1, id))));
    return d;
}

// Sums of 16 of the 4 runs p[0..3], each given as 16 sums of 4: lane 4*g + r holds group g of run r.
// One conversion to float and one multiply-add then serve 256 weights, and the integer sums stay exact.
inline __m512i group_sums(const __m512i * p) {
    const __m512i p01 = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
    const __m512i p23 = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(p01, p23), _mm512_unpackhi_epi64(p01, p23));
}

// one row times one column
template <class T>
float dot_row(const levels_table & t, const float * scales, const typename T::block * row, int64_t k, const act_view & act) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 4*AAAC_RUN_SIZE) {
        const int n_runs = (int) ((k - i)/AAAC_RUN_SIZE < 4 ? (k - i)/AAAC_RUN_SIZE : 4);
        alignas(64) float   scale[16] = {};
        alignas(64) int32_t corr [16] = {};
        __m512i p[4];
        for (int r = 0; r < 4; ++r) {
            if (r >= n_runs) {
                p[r] = _mm512_setzero_si512();
                continue;
            }
            const int64_t ir = i + r*AAAC_RUN_SIZE;
            const auto & b   = row[ir/T::size];
            const int    at  = (int) (ir % T::size);
            p[r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), run_levels(t, b.qs + at/2, T::selectors(b, at/AAAC_RUN_SIZE)), _mm512_loadu_si512(act.q + ir));
            for (int g = 0; g < 4; ++g) {
                scale[4*g + r] = scales[T::code(b, at + 16*g)]*act.d[ir/ACT_BLOCK + g/2];
                corr [4*g + r] = act.corr[ir/16 + g];
            }
        }
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(group_sums(p), _mm512_load_si512(corr))), _mm512_load_ps(scale), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

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
