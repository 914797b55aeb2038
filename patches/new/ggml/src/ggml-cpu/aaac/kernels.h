#pragma once

// Products of AAAC weights with activations that are quantized to 8 bits once per operation.
//
// Two ways through the weights:
//   few columns   rows are decoded in registers and multiplied at once, DOT_ROWS rows by DOT_COLS columns (dot_rows, mul_rows)
//   many columns  a tile of rows is decoded once into int8, interleaved so that a vector holds 4 weights of each row, and then multiplied by all
//                 columns (decode_tile, mul_tile): the group scales are applied to one float per row and group, not to one per 4 weights
//
// This header needs neither ggml.h nor the backend, so that a test can compile it for any instruction set: the flags of the compiler choose
// which of kernels-*.h supplies the few functions that differ.

#include "aaac_decode.cuh"

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__) && !defined(AAAC_GENERIC)
#define AAAC_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && !defined(AAAC_GENERIC)
#define AAAC_AVX2
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD) && !defined(AAAC_GENERIC)
#define AAAC_NEON
#else
#undef  AAAC_GENERIC
#define AAAC_GENERIC
#endif

namespace aaac {

constexpr int ACT_BLOCK = 32; // activations per scale, as in Q8_0

// The three types behind one interface. A run is 64 weights: 32 index bytes and 4 selectors.
//   header(r), qs(r)       byte offset of the header and of the index bytes of a pair's run r (0, 1), from the start of the first run's block
//   code_bit(j)            first bit in the header of the scale code of the run's weights 16j .. 16j+15
//   selector_bit(r, j)     bit in the header of their selector
struct g16 {
    using block = block_aaac4_g16;
    static constexpr int group = 16;
    static constexpr int size  = QK_AAAC4_G16;
    static constexpr int n_codes = 128;
    static constexpr int header(int r) { return 36*r; }
    static constexpr int qs(int r) { return 36*r + 4; }
    static constexpr int code_bit(int j) { return 8*j; }
    static constexpr int selector_bit(int, int j) { return 8*j + 7; }
    static int code(const block & b, int i) { return aaac4_g16_code(&b, i); }
    static uint32_t selectors(const block & b, int) {
        uint32_t s;
        memcpy(&s, b.s, 4);
        // gathers the top bits of the 4 bytes: the products of bit 7+8j land in bit 28+j and nowhere else in the top nibble
        return ((s & 0x80808080u) >> 7) * 0x10204080u >> 28;
    }
};

struct g32 {
    using block = block_aaac4_g32;
    static constexpr int group = 32;
    static constexpr int size  = QK_AAAC4_G32;
    static constexpr int n_codes = 64;
    static constexpr int header(int r) { return 34*r; }
    static constexpr int qs(int r) { return 34*r + 2; }
    static constexpr int code_bit(int j) { return j/2*8; }
    static constexpr int selector_bit(int, int j) { return j/2*8 + 6 + j % 2; }
    static int code(const block & b, int i) { return aaac4_g32_code(&b, i); }
    static uint32_t selectors(const block & b, int) { return (b.s[0] >> 6) | (b.s[1] >> 6) << 2; }
};

struct g128 {
    using block = block_aaac4_g128;
    static constexpr int group = 128;
    static constexpr int size  = QK_AAAC4_G128;
    static constexpr int n_codes = 128;
    static constexpr int header(int) { return 0; }
    static constexpr int qs(int r) { return 32*r + 2; }
    static constexpr int code_bit(int) { return 0; }
    static constexpr int selector_bit(int r, int j) { return 8 + 4*r + j; }
    static int code(const block & b, int i) { return aaac4_g128_code(&b, i); }
    static uint32_t selectors(const block & b, int run) { return b.sel >> 4*run & 15; }
};

// bytes of n weights
template <class T>
constexpr size_t row_bytes(int64_t n) {
    return n/T::size*sizeof(typename T::block);
}

struct act_chunk; // CHUNK activations in the order of dot_rows, where it wants one of its own

// One column of k quantized activations in memory.
//   q       int8  [k]                rounded to nearest, in [-127, 127]
//   d       float [k/32]             scales
//   corr    int32 [k/16]             see LEVEL_OFFSET
//   chunks  [k/CHUNK, rounded up]    the same once more for dot_rows; at a multiple of 64 bytes
struct act_view {
    const int8_t    * q;
    const float     * d;
    const int32_t   * corr;
    const act_chunk * chunks;

    act_view() = default;
    act_view(const void * data, int64_t k) {
        q      = (const int8_t    *) data;
        d      = (const float     *) (q + k);
        corr   = (const int32_t   *) (d + k/ACT_BLOCK);
        chunks = (const act_chunk *) (q + natural_size(k));
    }

    // bytes of q, d and corr
    static size_t natural_size(int64_t k) {
        return (k + k/ACT_BLOCK*sizeof(float) + k/16*sizeof(int32_t) + 63)/64*64;
    }
};

} // namespace aaac

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

// Everything about one weight tensor that the kernels look up.
struct weights {
    const aaac_params * params;
    float               scales[128]; // S(code)
    levels_table        levels;      // both codebooks, in the registers' layout

    explicit weights(const aaac_params * p) : params(p), levels(p) {
        for (int i = 0; i < 128; ++i) {
            scales[i] = aaac_scale(p, i);
        }
    }
};

// bytes of one column of activations
inline size_t act_size(int64_t k) {
    return (act_view::natural_size(k) + act_chunks_size(k) + 63)/64*64;
}

// elements [from, to) of x[k] to one column of activations; from and to are multiples of CHUNK, or k
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

// n_rows rows times C columns: out[c][0 .. n_rows)
template <class T, int C>
void mul_rows_cols(const weights & w, const char * rows, size_t row_stride, int n_rows, int64_t k, const act_view * acts, float * const * out) {
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

// few columns
template <class T>
void mul_rows(const weights & w, const char * rows, size_t row_stride, int n_rows, int64_t k, const act_view * acts, int n_cols, float * const * out) {
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

// A tile: TILE_ROWS rows of k weights, decoded.
//   levels  [k/4][TILE_ROWS][4]      int8 + LEVEL_OFFSET
//   scales  [k/group][TILE_ROWS]     float
inline size_t tile_size(int64_t k) {
    return TILE_ROWS*(k + k/16*sizeof(float));
}

template <class T>
void decode_tile(const weights & w, const char * rows, size_t row_stride, int n_rows, int64_t k, void * tile) {
    uint8_t * levels = (uint8_t *) tile;
    float   * scales = (float *) (levels + TILE_ROWS*k);
    for (int r = 0; r < TILE_ROWS; ++r) {
        // rows past the end repeat the last one: their results are not stored
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

// n_cols (at most N) columns times one tile: out[c][0 .. TILE_ROWS)
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
