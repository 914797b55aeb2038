#pragma once

// Plain C++: the reference for the other instruction sets, and what runs on a processor that has none of them.

#include "kernels-common.h"

namespace aaac {

constexpr int TILE_ROWS    = 4;
constexpr int TILE_COLS    = 4;
constexpr int DOT_ROWS     = 1;
constexpr int DOT_COLS     = 4;
constexpr int MAX_DOT_COLS = 4;
constexpr int CHUNK        = ACT_BLOCK;
constexpr int LEVEL_OFFSET = 0; // added to the int8 levels of a tile if the dot product wants unsigned weights

struct vec_i { int32_t v[TILE_ROWS]; };
struct vec_f { float   v[TILE_ROWS]; };
struct vec_w { int8_t  v[TILE_ROWS][4]; };

struct levels_table {
    uint8_t v[32];
    explicit levels_table(const aaac_params * p) { memcpy(v, p->codebooks, 32); }
};

inline void decode_run(const levels_table & t, const uint8_t * qs, uint32_t selectors, uint8_t * out) {
    for (int i = 0; i < AAAC_RUN_SIZE; ++i) {
        out[i] = t.v[(selectors >> i/16 & 1) << 4 | aaac_index(qs, i)];
    }
}

inline float quantize_block(const float * x, int8_t * q) {
    float amax = 0.0f;
    for (int i = 0; i < ACT_BLOCK; ++i) {
        amax = fmaxf(amax, fabsf(x[i]));
    }
    const float d  = amax/127.0f;
    const float id = inverse_scale(d);
    for (int i = 0; i < ACT_BLOCK; ++i) {
        q[i] = (int8_t) roundf(x[i]*id);
    }
    return d;
}

// What dot_rows does with 16 weights, see kernels-dot-plain.h.
struct levels_16 { int8_t v[16]; };
using row_sum = float;

inline void run_levels(const levels_table & t, const uint8_t * qs, uint32_t selectors, levels_16 * out) {
    decode_run(t, qs, selectors, (uint8_t *) out->v);
}

inline row_sum add_products(row_sum sum, const levels_16 & w, const int8_t * a, float scale) {
    int32_t p = 0;
    for (int i = 0; i < 16; ++i) {
        p += w.v[i]*a[i];
    }
    return sum + scale*p;
}

inline float reduce_add(row_sum sum) { return sum; }

#define AAAC_LANES for (int r = 0; r < TILE_ROWS; ++r)
inline vec_w w_load(const uint8_t * p)                 { vec_w w; memcpy(&w, p, sizeof(w)); return w; }
inline vec_f f_load(const float * p)                   { vec_f x; memcpy(&x, p, sizeof(x)); return x; }
inline void  f_store(float * p, vec_f x)               { memcpy(p, &x, sizeof(x)); }
inline vec_f f_set1(float a)                           { vec_f x; AAAC_LANES x.v[r] = a; return x; }
inline vec_f f_zero()                                  { return f_set1(0.0f); }
inline vec_f f_mul(vec_f a, vec_f b)                   { AAAC_LANES a.v[r] *= b.v[r]; return a; }
inline vec_f f_fma(vec_f a, vec_f b, vec_f c)          { AAAC_LANES c.v[r] += a.v[r]*b.v[r]; return c; }
inline vec_i i_set1(int32_t a)                         { vec_i x; AAAC_LANES x.v[r] = a; return x; }
inline vec_i i_add(vec_i a, vec_i b)                   { AAAC_LANES a.v[r] += b.v[r]; return a; }
inline vec_f i_to_f(vec_i a)                           { vec_f x; AAAC_LANES x.v[r] = (float) a.v[r]; return x; }
inline vec_i dot4(vec_i acc, vec_w w, const int8_t * a) {
    AAAC_LANES for (int i = 0; i < 4; ++i) {
        acc.v[r] += w.v[r][i]*a[i];
    }
    return acc;
}
#undef AAAC_LANES

} // namespace aaac

#include "kernels-dot-plain.h"
