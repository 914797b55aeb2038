#pragma once

// R rows times C columns for AVX2 and AVX-512, whose headers supply what goes on in a chunk: act_chunk, weight_chunk, multiply.

namespace aaac {

constexpr int PREFETCH_ROWS = 8; // how far the prefetch runs ahead, measured with rows of 2048 and of 8192 weights

inline size_t act_chunks_size(int64_t k) {
    return (k + CHUNK - 1)/CHUNK*sizeof(act_chunk);
}

// once per product, and not once per group of rows
inline void reorder_act(const act_view & act, int64_t k, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += CHUNK) {
        const_cast<act_chunk *>(act.chunks)[i/CHUNK].load(act, i, k);
    }
}

// the rows that no prefetch of dot_rows is in time for
inline void prefetch_start(const char * rows, size_t row_stride, int n_rows) {
    const size_t n_bytes = (n_rows < PREFETCH_ROWS ? n_rows : PREFETCH_ROWS)*row_stride;
    for (size_t b = 0; b < n_bytes; b += 64) {
        _mm_prefetch(rows + b, _MM_HINT_T1);
    }
}

// out[c][r]
template <class T, int R, int C>
void dot_rows(const levels_table & table, const float * /* the scales are computed from their codes */, const char * rows, size_t row_stride, int64_t k,
              const act_view * acts, float * const * out) {
    constexpr int n_bytes = (int) row_bytes<T>(CHUNK);
    const levels_table t = table; // a copy for its registers: the compiler takes a prefetch for something that may change the table
    vec_f sum[C][R];
    for (int c = 0; c < C; ++c) {
        for (int r = 0; r < R; ++r) {
            sum[c][r] = f_zero();
        }
    }
    // R rows at once look like no stream to the processor: ask for later rows, in the order of their addresses.
    // Not into the first level of the cache, whose place the activations need.
    const char * ahead = rows + PREFETCH_ROWS*row_stride;
    char tail[R*n_bytes] = {};
    for (int64_t i = 0; i < k; i += CHUNK, rows += n_bytes) {
        if (k - i < CHUNK) {
            // the end of each row, filled up with blocks whose scale code is zero
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
