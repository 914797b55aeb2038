#pragma once

// AVX2. With AVX-VNNI vpdpbusd wants unsigned weights: levels carry an offset of 128, see kernels-avx512.h.
// Without it vpmaddubsw would saturate on those, so the weights stay signed and their sign moves to the activations: |w|*sign(a, w).

#include <immintrin.h>

namespace aaac {

constexpr int TILE_ROWS    = 8;
constexpr int TILE_COLS    = 4;
#if defined(__AVXVNNI__)
constexpr int LEVEL_OFFSET = 128;
#else
constexpr int LEVEL_OFFSET = 0;
#endif

using vec_i = __m256i;
using vec_f = __m256;
using vec_w = __m256i;

struct levels_table {
    __m256i book[2]; // one codebook in each 128-bit lane, for vpshufb
    explicit levels_table(const aaac_params * p) {
        for (int i = 0; i < 2; ++i) {
            const __m128i levels = _mm_loadu_si128((const __m128i *) p->codebooks[i]);
            book[i] = _mm256_broadcastsi128_si256(_mm_add_epi8(levels, _mm_set1_epi8((char) LEVEL_OFFSET)));
        }
    }
};

// 32 weights: each of the 2 selectors fills one 128-bit half with ones
inline __m256i half_levels(const levels_table & t, __m256i idx, uint32_t selectors) {
    const __m256i second = _mm256_set_m128i(_mm_set1_epi8((char) -(int) (selectors >> 1 & 1)), _mm_set1_epi8((char) -(int) (selectors & 1)));
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(t.book[0], idx), _mm256_shuffle_epi8(t.book[1], idx), second);
}

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
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)); // at most 2*127*127 < 2^15
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
    const __m256 id = _mm256_set1_ps(d >= FLT_MIN ? 1.0f/d : 0.0f); // a subnormal scale has no finite inverse
    __m256i n[4];
    for (int i = 0; i < 4; ++i) {
        n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], id));
    }
    // the packs work in 128-bit lanes; the permutation brings the groups of 4 back in order
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    _mm256_storeu_si256((__m256i *) q, _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    return d;
}

inline float reduce_add(__m256 x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

// one row times one column
template <class T>
float dot_row(const levels_table & t, const float * scales, const typename T::block * row, int64_t k, const act_view & act) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t ib = 0; ib < k/T::size; ++ib) {
        for (int run = 0; run < T::size/AAAC_RUN_SIZE; ++run) {
            __m256i w[2];
            run_levels(t, row[ib].qs + 32*run, T::selectors(row[ib], run), &w[0], &w[1]);
            for (int h = 0; h < 2; ++h) {
                const int     at = run*AAAC_RUN_SIZE + 32*h;
                const int64_t i  = ib*T::size + at;
                const float   d  = act.d[i/32];
                const float   s0 = d*scales[T::code(row[ib], at)];
                const float   s1 = d*scales[T::code(row[ib], at + 16)];
                // the correction is for 16 weights and would come 4 times
                const __m256i c  = LEVEL_OFFSET ? _mm256_set_m128i(_mm_set1_epi32(act.corr[i/16 + 1]/4), _mm_set1_epi32(act.corr[i/16]/4)) : _mm256_setzero_si256();
                const __m256i p  = dot4_vec(c, w[h], _mm256_loadu_si256((const __m256i *) (act.q + i)));
                sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(p), _mm256_set_m128(_mm_set1_ps(s1), _mm_set1_ps(s0)), sum);
            }
        }
    }
    return reduce_add(sum);
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
