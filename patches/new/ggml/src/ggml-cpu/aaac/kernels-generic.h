#pragma once

// Plain C++: the reference for the other instruction sets, and what runs where there is none of them.

namespace aaac {

constexpr int TILE_ROWS    = 4;
constexpr int TILE_COLS    = 4;
constexpr int DOT_ROWS     = 1;
constexpr int DOT_COLS     = 4;
constexpr int MAX_DOT_COLS = 4;
constexpr int CHUNK        = ACT_BLOCK;
constexpr int LEVEL_OFFSET = 0; // added to the int8 levels of a tile where the dot product wants unsigned weights

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
    const float id = d >= FLT_MIN ? 1.0f/d : 0.0f; // a subnormal scale has no finite inverse
    for (int i = 0; i < ACT_BLOCK; ++i) {
        q[i] = (int8_t) roundf(x[i]*id);
    }
    return d;
}

// dot_rows takes the activations as they are
inline size_t act_chunks_size(int64_t /* k */) { return 0; }
inline void reorder_act(const act_view &, int64_t /* k */, int64_t /* from */, int64_t /* to */) {}
inline void prefetch_start(const char * /* rows */, size_t /* row_stride */, int /* n_rows */) {}

// one row times C columns: out[c][0]
template <class T, int R, int C>
void dot_rows(const levels_table & t, const float * scales, const char * rows, size_t /* row_stride */, int64_t k, const act_view * acts, float * const * out) {
    static_assert(R == 1, "one row at a time");
    const auto * row = (const typename T::block *) rows;
    float sum[C] = {};
    for (int64_t ib = 0; ib < k/T::size; ++ib) {
        for (int run = 0; run < T::size/AAAC_RUN_SIZE; ++run) {
            uint8_t w[AAAC_RUN_SIZE];
            decode_run(t, row[ib].qs + 32*run, T::selectors(row[ib], run), w);
            for (int j = 0; j < AAAC_RUN_SIZE; j += 16) {
                const int     at = run*AAAC_RUN_SIZE + j;
                const int64_t i  = ib*T::size + at;
                for (int c = 0; c < C; ++c) {
                    int32_t p = 0;
                    for (int l = 0; l < 16; ++l) {
                        p += (int8_t) w[j + l]*acts[c].q[i + l];
                    }
                    sum[c] += acts[c].d[i/32]*scales[T::code(row[ib], at)]*p;
                }
            }
        }
    }
    for (int c = 0; c < C; ++c) {
        out[c][0] = sum[c];
    }
}

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
