#pragma once

// dot_rows for AVX2 and AVX-512. Their headers supply what happens in a chunk: act_chunk, weight_chunk and multiply.

#include "kernels-common.h"

#include <immintrin.h>

namespace aaac {

constexpr int PREFETCH_ROWS = 8; // how far ahead the prefetch is, measured with rows of 2048 and of 8192 weights

inline size_t act_chunks_size(int64_t k) {
    return (k + CHUNK - 1)/CHUNK*sizeof(act_chunk);
}

// Bring activations [from, to) of one column to the order of dot_rows: once per product, not once per group of rows.
inline void reorder_act(const act_view & act, int64_t k, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += CHUNK) {
        const_cast<act_chunk *>(act.chunks)[i/CHUNK].load(act, i, k);
    }
}

// Ask for the first rows, which the prefetch in dot_rows would ask for too late.
inline void prefetch_start(const char * rows, size_t row_stride, int n_rows) {
    const size_t n_bytes = (n_rows < PREFETCH_ROWS ? n_rows : PREFETCH_ROWS)*row_stride;
    for (size_t b = 0; b < n_bytes; b += 64) {
        _mm_prefetch(rows + b, _MM_HINT_T1);
    }
}

// Multiply R rows by C columns: out[c][r]. The scales are not looked up but computed from their codes.
template <class T, int R, int C>
void dot_rows(const levels_table & table, const float * /* scales */, const char * rows, size_t row_stride, int64_t k,
              const act_view * acts, float * const * out) {
    constexpr int n_bytes = (int) row_bytes<T>(CHUNK);
    // A copy stays in registers. The compiler believes that a prefetch may change the table itself.
    const levels_table t = table;
    vec_f sum[C][R];
    for (int c = 0; c < C; ++c) {
        for (int r = 0; r < R; ++r) {
            sum[c][r] = f_zero();
        }
    }
    // The processor does not see that R rows at once are a stream, so ask for later rows in the order of their
    // addresses. Keep them out of the first level of the cache, because the activations need its space.
    const char * ahead = rows + PREFETCH_ROWS*row_stride;
    char tail[R*n_bytes] = {};
    for (int64_t i = 0; i < k; i += CHUNK, rows += n_bytes) {
        if (k - i < CHUNK) {
            // fill up the end of each row with blocks whose scale code is zero
            for (int r = 0; r < R; ++r) {
                memcpy(tail + r*n_bytes, rows + r*row_stride, row_bytes<T>(k - i));
            }
            rows       = tail;
            row_stride = n_bytes;
        }
        for (int r = 0; r < R; ++r) {
            for (int b = 0; b < n_bytes; b += 64) {
                _mm_prefetch(ahead + b, _MM_HINT_T1);
            }
            ahead += n_bytes;
            const weight_chunk<T> w(t, (const uint8_t *) rows + r*row_stride);
            for (int c = 0; c < C; ++c) {
                sum[c][r] = multiply(w, acts[c].chunks[i/CHUNK], sum[c][r]);
            }
        }
    }
    for (int c = 0; c < C; ++c) {
        for (int r = 0; r < R; ++r) {
            out[c][r] = reduce_add(sum[c][r])*(t.d/SCALE_FACTOR);
        }
    }
}

} // namespace aaac
