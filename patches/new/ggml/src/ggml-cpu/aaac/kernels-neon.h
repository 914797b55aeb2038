#pragma once

// NEON with the dot product extension. sdot multiplies signed by signed bytes, so the levels need no offset.

#include "kernels-common.h"

#include <arm_neon.h>

namespace aaac {

constexpr int TILE_ROWS    = 4;
constexpr int TILE_COLS    = 8;
constexpr int DOT_ROWS     = 1;
constexpr int DOT_COLS     = 4;
constexpr int MAX_DOT_COLS = 4;
constexpr int CHUNK        = ACT_BLOCK;
constexpr int LEVEL_OFFSET = 0;

using vec_i = int32x4_t;
using vec_f = float32x4_t;
using vec_w = int8x16_t;

using levels_16 = int8x16_t;   // see kernels-dot-plain.h
using row_sum   = float32x4_t;

struct levels_table {
    int8x16_t book[2];
    explicit levels_table(const aaac_params * p) {
        book[0] = vld1q_s8(p->codebooks[0]);
        book[1] = vld1q_s8(p->codebooks[1]);
    }
};

// Decode 64 weights. 16 of them share a selector, so a vector needs one look-up in one codebook.
inline void run_levels(const levels_table & t, const uint8_t * qs, uint32_t selectors, levels_16 * out) {
    const uint8x16_t q0 = vld1q_u8(qs);
    const uint8x16_t q1 = vld1q_u8(qs + 16);
    out[0] = vqtbl1q_s8(t.book[selectors >> 0 & 1], vandq_u8(q0, vdupq_n_u8(0x0F)));
    out[1] = vqtbl1q_s8(t.book[selectors >> 1 & 1], vandq_u8(q1, vdupq_n_u8(0x0F)));
    out[2] = vqtbl1q_s8(t.book[selectors >> 2 & 1], vshrq_n_u8(q0, 4));
    out[3] = vqtbl1q_s8(t.book[selectors >> 3 & 1], vshrq_n_u8(q1, 4));
}

inline void decode_run(const levels_table & t, const uint8_t * qs, uint32_t selectors, uint8_t * out) {
    levels_16 w[4];
    run_levels(t, qs, selectors, w);
    for (int i = 0; i < 4; ++i) {
        vst1q_s8((int8_t *) out + 16*i, w[i]);
    }
}

inline float quantize_block(const float * x, int8_t * q) {
    float32x4_t v[8];
    float32x4_t m = vdupq_n_f32(0.0f);
    for (int i = 0; i < 8; ++i) {
        v[i] = vld1q_f32(x + 4*i);
        m    = vmaxq_f32(m, vabsq_f32(v[i]));
    }
    const float d  = vmaxvq_f32(m)/127.0f;
    const float id = inverse_scale(d);
    for (int i = 0; i < 8; i += 4) {
        int16x4_t n[4];
        for (int j = 0; j < 4; ++j) {
            n[j] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(v[i + j], id)));
        }
        vst1q_s8(q + 4*i, vcombine_s8(vqmovn_s16(vcombine_s16(n[0], n[1])), vqmovn_s16(vcombine_s16(n[2], n[3]))));
    }
    return d;
}

inline row_sum add_products(row_sum sum, levels_16 w, const int8_t * a, float scale) {
    const int32x4_t p = vdotq_s32(vdupq_n_s32(0), w, vld1q_s8(a));
    return vfmaq_n_f32(sum, vcvtq_f32_s32(p), scale);
}

inline float reduce_add(vec_f x)                         { return vaddvq_f32(x); }
inline vec_w w_load(const uint8_t * p)                   { return vld1q_s8((const int8_t *) p); }
inline vec_f f_load(const float * p)                     { return vld1q_f32(p); }
inline void  f_store(float * p, vec_f x)                 { vst1q_f32(p, x); }
inline vec_f f_set1(float a)                             { return vdupq_n_f32(a); }
inline vec_f f_zero()                                    { return vdupq_n_f32(0.0f); }
inline vec_f f_mul(vec_f a, vec_f b)                     { return vmulq_f32(a, b); }
inline vec_f f_fma(vec_f a, vec_f b, vec_f c)            { return vfmaq_f32(c, a, b); }
inline vec_i i_set1(int32_t a)                           { return vdupq_n_s32(a); }
inline vec_i i_add(vec_i a, vec_i b)                     { return vaddq_s32(a, b); }
inline vec_f i_to_f(vec_i a)                             { return vcvtq_f32_s32(a); }
inline vec_i dot4(vec_i acc, vec_w w, const int8_t * a) {
    int32_t four;
    memcpy(&four, a, 4);
    return vdotq_s32(acc, w, vreinterpretq_s8_s32(vdupq_n_s32(four)));
}

} // namespace aaac

#include "kernels-dot-plain.h"
