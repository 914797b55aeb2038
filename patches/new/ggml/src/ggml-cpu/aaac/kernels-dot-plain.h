#pragma once

// dot_rows for one row, for plain C++ and NEON.
// Their headers supply what happens to 16 weights: levels_16, row_sum, run_levels, add_products and reduce_add.

#include "kernels-common.h"

namespace aaac {

// dot_rows reads the activations in natural order, so there is nothing to prepare
inline size_t act_chunks_size(int64_t /* k */) { return 0; }
inline void reorder_act(const act_view &, int64_t /* k */, int64_t /* from */, int64_t /* to */) {}
inline void prefetch_start(const char * /* rows */, size_t /* row_stride */, int /* n_rows */) {}

// Multiply one row by C columns: out[c][0].
template <class T, int R, int C>
void dot_rows(const levels_table & t, const float * scales, const char * rows, size_t /* row_stride */, int64_t k,
              const act_view * acts, float * const * out) {
    static_assert(R == 1, "one row at a time");
    const auto * row = (const typename T::block *) rows;
    row_sum sum[C] = {};
    for (int64_t ib = 0; ib < k/T::size; ++ib) {
        for (int run = 0; run < T::size/AAAC_RUN_SIZE; ++run) {
            levels_16 w[AAAC_RUN_SIZE/16];
            run_levels(t, row[ib].qs + 32*run, T::selectors(row[ib], run), w);
            for (int j = 0; j < AAAC_RUN_SIZE/16; ++j) {
                const int     at = run*AAAC_RUN_SIZE + 16*j;
                const int64_t i  = ib*T::size + at;
                const float   s  = scales[T::code(row[ib], at)];
                for (int c = 0; c < C; ++c) {
                    sum[c] = add_products(sum[c], w[j], acts[c].q + i, acts[c].d[i/32]*s);
                }
            }
        }
    }
    for (int c = 0; c < C; ++c) {
        out[c][0] = reduce_add(sum[c]);
    }
}

} // namespace aaac
