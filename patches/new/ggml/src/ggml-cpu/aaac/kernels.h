#pragma once

// Products of AAAC weights with activations that are quantized to 8 bits once per operation.
//
// There are two ways through the weights:
//   few columns   (mul_rows, dot_rows) Rows are decoded in registers and multiplied at once, DOT_ROWS rows by DOT_COLS
//                 columns.
//   many columns  (decode_tile, mul_tile) A tile of rows is decoded to int8 once, and then multiplied by all columns.
//                 It is interleaved, so that a vector holds 4 weights of each row. A group scale is then applied to
//                 one float per row and group, not to one per 4 weights.
//
// This header needs neither ggml.h nor the backend, so a test can compile it for any instruction set. The flags of the
// compiler choose which of kernels-*.h supplies the few functions that differ.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) \
    && defined(__AVX512VNNI__) && !defined(AAAC_GENERIC)
#define AAAC_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && !defined(AAAC_GENERIC)
#define AAAC_AVX2
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD) && !defined(AAAC_GENERIC)
#define AAAC_NEON
#else
#undef  AAAC_GENERIC
#define AAAC_GENERIC
#endif

// Each of these supplies: TILE_ROWS, TILE_COLS, DOT_ROWS, DOT_COLS, MAX_DOT_COLS, CHUNK, LEVEL_OFFSET; levels_table,
// decode_run, quantize_block, dot_rows and what comes before it; the vectors vec_i, vec_f, vec_w and their arithmetic.
#if defined(AAAC_AVX512)
#include "kernels-avx512.h"
#elif defined(AAAC_AVX2)
#include "kernels-avx2.h"
#elif defined(AAAC_NEON)
#include "kernels-neon.h"
#else
#include "kernels-generic.h"
#endif

namespace aaac {

// What the kernels look up about one weight tensor.
struct weights {
    const aaac_params * params;
    float               scales[128]; // S(code)
    levels_table        levels;      // both codebooks, in the layout of the registers

    explicit weights(const aaac_params * p) : params(p), levels(p) {
        for (int i = 0; i < 128; ++i) {
            scales[i] = aaac_scale(p, i);
        }
    }
};

// Return the bytes of one column of activations.
inline size_t act_size(int64_t k) {
    return (act_view::natural_size(k) + act_chunks_size(k) + 63)/64*64;
}

// Quantize elements [from, to) of x[k] into one column of activations. from and to are multiples of CHUNK, or k.
inline void quantize_act(const float * x, void * data, int64_t k, int64_t from, int64_t to) {
    const act_view view(data, k);
    int8_t  * q    = const_cast<int8_t  *>(view.q);
    float   * d    = const_cast<float   *>(view.d);
    int32_t * corr = const_cast<int32_t *>(view.corr);
    for (int64_t i = from; i < to; i += ACT_BLOCK) {
        d[i/ACT_BLOCK] = quantize_block(x + i, q + i);
        for (int j = 0; j < ACT_BLOCK; j += 16) {
            int sum = 0;
            for (int l = 0; l < 16; ++l) {
                sum += q[i + j + l];
            }
            corr[(i + j)/16] = -LEVEL_OFFSET*sum;
        }
    }
    reorder_act(view, k, from, to);
}

// Multiply n_rows rows by C columns: out[c][0 .. n_rows).
template <class T, int C>
void mul_rows_cols(const weights & w, const char * rows, size_t row_stride, int n_rows, int64_t k,
                   const act_view * acts, float * const * out) {
    float * at[C];
    prefetch_start(rows, row_stride, n_rows);
    for (int r = 0; r < n_rows;) {
        for (int c = 0; c < C; ++c) {
            at[c] = out[c] + r;
        }
        if (r + DOT_ROWS <= n_rows) {
            dot_rows<T, DOT_ROWS, C>(w.levels, w.scales, rows + r*row_stride, row_stride, k, acts, at);
            r += DOT_ROWS;
        } else {
            dot_rows<T, 1, C>(w.levels, w.scales, rows + r*row_stride, row_stride, k, acts, at);
            r += 1;
        }
    }
}

// Multiply n_rows rows by a few columns, at most MAX_DOT_COLS: out[c][0 .. n_rows).
template <class T>
void mul_rows(const weights & w, const char * rows, size_t row_stride, int n_rows, int64_t k,
              const act_view * acts, int n_cols, float * const * out) {
    static_assert(DOT_COLS == 4, "one case for each rest");
    int c = 0;
    for (; c + DOT_COLS <= n_cols; c += DOT_COLS) {
        mul_rows_cols<T, DOT_COLS>(w, rows, row_stride, n_rows, k, acts + c, out + c);
    }
    switch (n_cols - c) {
        case 3: mul_rows_cols<T, 3>(w, rows, row_stride, n_rows, k, acts + c, out + c); break;
        case 2: mul_rows_cols<T, 2>(w, rows, row_stride, n_rows, k, acts + c, out + c); break;
        case 1: mul_rows_cols<T, 1>(w, rows, row_stride, n_rows, k, acts + c, out + c); break;
    }
}

// Return the bytes of a tile, which is TILE_ROWS rows of k decoded weights.
//   levels  [k/4][TILE_ROWS][4]      int8 + LEVEL_OFFSET
//   scales  [k/group][TILE_ROWS]     float
inline size_t tile_size(int64_t k) {
    return TILE_ROWS*(k + k/16*sizeof(float));
}

// Decode n_rows rows, at most TILE_ROWS, to a tile.
template <class T>
void decode_tile(const weights & w, const char * rows, size_t row_stride, int n_rows, int64_t k, void * tile) {
    uint8_t * levels = (uint8_t *) tile;
    float   * scales = (float *) (levels + TILE_ROWS*k);
    for (int r = 0; r < TILE_ROWS; ++r) {
        // rows past the end repeat the last one, because their results are not stored
        const auto * blocks = (const typename T::block *) (rows + (r < n_rows ? r : n_rows - 1)*row_stride);
        for (int64_t ib = 0; ib < k/T::size; ++ib) {
            const auto & b = blocks[ib];
            for (int run = 0; run < T::size/AAAC_RUN_SIZE; ++run) {
                alignas(64) uint8_t natural[AAAC_RUN_SIZE];
                decode_run(w.levels, b.qs + 32*run, T::selectors(b, run), natural);
                uint8_t * dst = levels + (ib*T::size + run*AAAC_RUN_SIZE)*TILE_ROWS + 4*r;
                for (int i = 0; i < AAAC_RUN_SIZE; i += 4) {
                    memcpy(dst + i*TILE_ROWS, natural + i, 4);
                }
            }
            for (int i = 0; i < T::size; i += T::group) {
                scales[(ib*T::size + i)/T::group*TILE_ROWS + r] = w.scales[T::code(b, i)];
            }
        }
    }
}

// Multiply one tile by N columns: out[c][0 .. TILE_ROWS).
template <class T, int N>
void mul_tile_cols(const void * tile, int64_t k, const act_view * acts, float * const * out) {
    const uint8_t * levels = (const uint8_t *) tile;
    const float   * scales = (const float *) (levels + TILE_ROWS*k);

    vec_f sum[N];
    for (int c = 0; c < N; ++c) {
        sum[c] = f_zero();
    }
    for (int64_t ib = 0; ib < k/ACT_BLOCK; ++ib) {
        vec_w w[8];
        for (int j = 0; j < 8; ++j) {
            w[j] = w_load(levels + (8*ib + j)*TILE_ROWS*4);
        }
        const vec_f s0 = f_load(scales + (T::group == 16 ? 2*ib : ib*ACT_BLOCK/T::group)*TILE_ROWS);
        const vec_f s1 = T::group == 16 ? f_load(scales + (2*ib + 1)*TILE_ROWS) : s0;
        for (int c = 0; c < N; ++c) {
            const int8_t * a = acts[c].q + ib*ACT_BLOCK;
            vec_i i0 = i_set1(acts[c].corr[2*ib + 0]);
            vec_i i1 = i_set1(acts[c].corr[2*ib + 1]);
            for (int j = 0; j < 4; ++j) {
                i0 = dot4(i0, w[j],     a + 4*j);
                i1 = dot4(i1, w[j + 4], a + 4*j + 16);
            }
            vec_f t;
            if (T::group == 16) {
                t = f_fma(i_to_f(i1), s1, f_mul(i_to_f(i0), s0));
            } else {
                t = f_mul(i_to_f(i_add(i0, i1)), s0);
            }
            sum[c] = f_fma(t, f_set1(acts[c].d[ib]), sum[c]);
        }
    }
    for (int c = 0; c < N; ++c) {
        f_store(out[c], sum[c]);
    }
}

// Multiply one tile by n_cols columns: out[c][0 .. TILE_ROWS).
template <class T>
void mul_tile(const void * tile, int64_t k, const act_view * acts, int n_cols, float * const * out) {
    int c = 0;
    for (; c + TILE_COLS <= n_cols; c += TILE_COLS) {
        mul_tile_cols<T, TILE_COLS>(tile, k, acts + c, out + c);
    }
    for (; c + 4 <= n_cols; c += 4) {
        mul_tile_cols<T, 4>(tile, k, acts + c, out + c);
    }
    for (; c < n_cols; ++c) {
        mul_tile_cols<T, 1>(tile, k, acts + c, out + c);
    }
}

} // namespace aaac
