// The search with error feedback on a GPU: `aaac_feed_back`, `aaac_sweep` and `aaac_round_to_steps`, which take the
// arguments of the functions in quantizer/search.c. Not part of the patch. quantizer/search.py says what is computed
// (`TorchSearch`), and this file follows its method of the same name.
//
// The groups of a row are decided one after another, so rows run at the same time and, inside a row, candidates.
// 16 threads share a row. Two of them round the group at one scale, one thread for each codebook. Where there are no
// candidates, the 16 threads share the columns.
//
// The columns of a candidate wait for each other, and most of the time is spent there. So the table of nearest levels
// is in shared memory, and U comes through the first-level cache.

#include "aaac_device.cuh"

constexpr int AAAC_PER_UNIT = 8, AAAC_CELLS = 256*AAAC_PER_UNIT; // quantizer/grid.py
constexpr int AAAC_BLOCK = 128;                                  // quantizer/columns.py: columns of a block at most
constexpr int AAAC_RUN   = AAAC_SELECTOR_SIZE;
constexpr int AAAC_STEPS = 32;                                   // quantizer/kquants.py: columns of a run at most

constexpr int AAAC_ROW_THREADS    = 16;
constexpr int AAAC_ROWS           = 4;
constexpr int AAAC_SEARCH_THREADS = AAAC_ROWS*AAAC_ROW_THREADS;

// The levels and errors of candidates are kept in slots: those of the best one so far, and of those that are tried
// next.
constexpr int AAAC_STARTS = 6, AAAC_NEARBY = 5;
constexpr int AAAC_SLOTS  = 6; // one more slot is for the group with all weights zero

// The tables of quantizer/grid.py.
struct aaac_grid {
    const float * level;   // [2][AAAC_CELLS], the nearest level in each codebook
    const float * scales;  // [n_scales]
    const float * borders; // those between neighbouring nonzero scales, padded with infinity to 2^depth - 1 entries
    int32_t n_scales, depth;
};

struct alignas(16) aaac_vector { float x[4]; };

// A slot has 4 floats more than it needs, so that threads that store different slots use different banks.
template <int G> struct aaac_row {
    float x[AAAC_BLOCK]; // weights after the moves by earlier errors, or gradients
    float level[AAAC_SLOTS + 1][G + 4];
    float error[AAAC_SLOTS + 1][G + 4]; // U^-T (target - q), in units of the candidate's scale
};

template <int G> struct alignas(16) aaac_shared {
    float       level[2*AAAC_CELLS + 4]; // one more cell has level zero
    float       inverse[AAAC_BLOCK];     // 1 / U_jj
    aaac_row<G> rows[AAAC_ROWS];
};

// A way to encode one group.
struct aaac_candidate {
    float    loss;      // squared error
    int      code;      // of the scale
    int      slot;      // where its levels and errors are
    uint32_t selectors; // one bit per run
};

AAAC_DEV void aaac_load_vectors(const float * from, float * to) {
#pragma unroll
    for (int i = 0; i < AAAC_RUN/4; ++i) {
        ((aaac_vector *) to)[i] = ((const aaac_vector *) from)[i];
    }
}

AAAC_DEV int aaac_row_thread() { return threadIdx.x % AAAC_ROW_THREADS; }

template <class V> AAAC_DEV V aaac_exchange(V value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

// Return the sum over the threads of a row.
AAAC_DEV float aaac_row_sum(float value) {
#pragma unroll
    for (int mask = 1; mask < AAAC_ROW_THREADS; mask *= 2) {
        value += aaac_exchange(value, mask);
    }
    return value;
}

// Return the best candidate of the first `n` pairs of threads, and the first one of equals.
AAAC_DEV aaac_candidate aaac_least(aaac_candidate c, int n) {
    const float none = aaac_as_float(0x7F800000); // infinity
    int order = aaac_row_thread()/2;
    c.loss = order < n ? fminf(c.loss, none) : none; // the loss is NaN if a candidate overflows
#pragma unroll
    for (int mask = 2; mask < AAAC_ROW_THREADS; mask *= 2) {
        const aaac_candidate other = { aaac_exchange(c.loss, mask), aaac_exchange(c.code, mask),
                                       aaac_exchange(c.slot, mask), aaac_exchange(c.selectors, mask) };
        const int at = aaac_exchange(order, mask);
        if (other.loss < c.loss || (other.loss == c.loss && at < order)) {
            c     = other;
            order = at;
        }
    }
    return c;
}

// Return the code of the nearest nonzero scale.
AAAC_DEV int aaac_scale_code(const aaac_grid & grid, float value) {
    int code = 0;
    for (int step = 1 << (grid.depth - 1); step > 0; step >>= 1) {
        code += grid.borders[code + step - 1] < value ? step : 0;
    }
    return code + 1;
}

// Round `target` [G] at the scale of this pair's code, with feedback inside the group by the upper triangle `u` (row
// stride ld). Code 0 stands for zero weights. `inverse` is 1 / U_jj of the group. If `stored`, the levels and errors
// are stored in the pair's slot.
template <int G>
AAAC_DEV aaac_candidate aaac_try(const aaac_grid & grid, const aaac_shared<G> & s, aaac_row<G> & row,
                                 const float * target, const float * __restrict__ u, int ld, const float * inverse,
                                 int code, int slot, bool stored) {
    const int     book  = threadIdx.x % 2;
    const float * level = s.level + (code ? book*AAAC_CELLS : 2*AAAC_CELLS);
    const float   top   = code ? AAAC_CELLS - 1 : 0;
    const float   scale = code ? grid.scales[code] : 1.0f;
    const float   factor = 1.0f/scale;
    aaac_candidate c = { 0.0f, code, slot, 0 };
    for (int start = 0; start < G; start += AAAC_RUN) {
        alignas(16) float x[AAAC_RUN], value[AAAC_RUN], error[AAAC_RUN], step[AAAC_RUN];
        aaac_load_vectors(target + start, x);
#pragma unroll
        for (int j = 0; j < AAAC_RUN; ++j) {
            x[j] *= factor;
        }
#pragma unroll 4
        for (int i = 0; i < start; ++i) {
            aaac_load_vectors(u + i*ld + start, step);
#pragma unroll
            for (int j = 0; j < AAAC_RUN; ++j) {
                x[j] -= step[j]*row.error[slot][i];
            }
        }
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < AAAC_RUN; ++j) {
            const float cell = fmaxf(x[j]*AAAC_PER_UNIT + AAAC_CELLS/2, 0.0f);
            value[j] = level[(int) fminf(cell, top)];
            error[j] = (x[j] - value[j])*inverse[start + j];
            sum += error[j]*error[j];
            aaac_load_vectors(u + (start + j)*ld + start, step);
#pragma unroll
            for (int k = j + 1; k < AAAC_RUN; ++k) {
                x[k] -= step[k]*error[j];
            }
        }
        const float other  = aaac_exchange(sum, 1);
        const float sums[] = { book ? other : sum, book ? sum : other };
        const bool  selector = sums[1] < sums[0];
        c.loss      += selector ? sums[1] : sums[0];
        c.selectors |= (uint32_t) selector << start/AAAC_RUN;
        if (stored && book == selector) {
            aaac_load_vectors(value, row.level[slot] + start);
            aaac_load_vectors(error, row.error[slot] + start);
        }
        __syncwarp();
    }
    c.loss *= scale*scale;
    return c;
}

// Move x[from .. n - 1] of a row by what `change` [G] of the group before `from` does to it: `rows` are those of U or H
// (row stride ld).
template <int G>
AAAC_DEV void aaac_move(aaac_row<G> & row, const float * __restrict__ rows, int ld, const float * change, int from,
                        int n) {
    for (int j = from + aaac_row_thread(); j < n; j += AAAC_ROW_THREADS) {
        float at = row.x[j];
#pragma unroll 16
        for (int i = 0; i < G; ++i) {
            at -= rows[i*ld + j]*change[i];
        }
        row.x[j] = at;
    }
}

// Fill shared memory: the table, 1 / U_jj from `diagonal(j)`, and x from `columns` [n][n_rows]. Rows after the last one
// are zero.
template <int G, class D>
AAAC_DEV void aaac_prepare(const aaac_grid & grid, aaac_shared<G> & s, int n, int n_rows, const float * columns,
                           D diagonal) {
    for (int i = threadIdx.x; i < 2*AAAC_CELLS/4; i += AAAC_SEARCH_THREADS) {
        ((aaac_vector *) s.level)[i] = ((const aaac_vector *) grid.level)[i];
    }
    if (threadIdx.x == 0) {
        s.level[2*AAAC_CELLS] = 0.0f;
    }
    for (int j = threadIdx.x; j < n; j += AAAC_SEARCH_THREADS) {
        s.inverse[j] = 1.0f/diagonal(j);
    }
    for (int i = threadIdx.x; i < n*AAAC_ROWS; i += AAAC_SEARCH_THREADS) {
        const int row = blockIdx.x*AAAC_ROWS + i % AAAC_ROWS, j = i/AAAC_ROWS;
        s.rows[i % AAAC_ROWS].x[j] = row < n_rows ? columns[j*n_rows + row] : 0.0f;
    }
    __syncthreads();
}

// Write q, levels, selectors and code of the group at column k of a row.
template <int G>
AAAC_DEV void aaac_write(const aaac_grid & grid, const aaac_row<G> & r, const aaac_candidate & c, int k, int row,
                         int n_rows, float * q, float * level, uint8_t * selector, int64_t * code) {
    const int t = aaac_row_thread();
    for (int j = t; j < G; j += AAAC_ROW_THREADS) {
        level[(k + j)*n_rows + row] = r.level[c.slot][j];
        q[(k + j)*n_rows + row]     = aaac_mul(grid.scales[c.code], r.level[c.slot][j]);
    }
    if (t < G/AAAC_RUN) {
        selector[(k/AAAC_RUN + t)*n_rows + row] = c.selectors >> t & 1;
    }
    if (t == 0) {
        code[k/G*n_rows + row] = c.code;
    }
}

// Decide the groups of a block of columns, as TorchSearch.feed_back does.
//   w, q, level  [n][n_rows]
//   selector     [n / 16][n_rows]
//   code         [n / G][n_rows]
//   u            the upper triangle of the block, row stride ld
//   starts       [AAAC_STARTS]
// At most 2^31 / 128 rows. Grid: ceil(n_rows / AAAC_ROWS)
template <int G>
__global__ void __launch_bounds__(AAAC_SEARCH_THREADS)
aaac_feed_back(const AAAC_GRID_CONSTANT aaac_grid grid, int n, int n_rows, const float * __restrict__ u, int ld,
               const float * starts, int, const float * w, float * q, float * level, uint8_t * selector,
               int64_t * code) {
    __shared__ aaac_shared<G> s;
    aaac_prepare(grid, s, n, n_rows, w, [=](int j) { return u[j*ld + j]; });
    const int row  = blockIdx.x*AAAC_ROWS + threadIdx.x/AAAC_ROW_THREADS;
    const int t    = aaac_row_thread();
    const int pair = t/2;
    aaac_row<G> & r = s.rows[threadIdx.x/AAAC_ROW_THREADS];
    for (int k = 0; k < n; k += G) {
        const float * target = r.x + k;
        const float * inner  = u + k*ld + k;
        float largest = 0.0f;
        for (int j = 0; j < G; ++j) {
            largest = fmaxf(largest, fabsf(target[j]));
        }
        // the pair after those of the starts takes zero weights, whose error U^-T target is needed anyway
        const int slot  = pair < AAAC_STARTS ? pair : AAAC_SLOTS;
        const int start = pair < AAAC_STARTS ? aaac_scale_code(grid, largest*starts[pair]) : 0;
        const aaac_candidate first =
            aaac_try(grid, s, r, target, inner, ld, s.inverse + k, start, slot, pair <= AAAC_STARTS);
        const float nothing = __shfl_sync(0xFFFFFFFFu, first.loss, 2*AAAC_STARTS, AAAC_ROW_THREADS);
        aaac_candidate best = aaac_least(first, AAAC_STARTS);

        // The least-squares scale for the levels of the best start. U^-T target minus its error, over the scale, is
        // U^-T level.
        const float scale = grid.scales[best.code], factor = 1.0f/scale;
        float product = 0.0f, square = 0.0f;
        for (int j = t; j < G; j += AAAC_ROW_THREADS) {
            const float white = r.error[AAAC_SLOTS][j];
            const float fixed = (white - scale*r.error[best.slot][j])*factor;
            product += white*fixed;
            square  += fixed*fixed;
        }
        product = aaac_row_sum(product);
        square  = aaac_row_sum(square);
        const int refined = aaac_scale_code(grid, product/fmaxf(square, 1.17549435e-38f));
        const int after   = best.code + 1 < grid.n_scales ? best.code + 1 : best.code;
        const int before  = best.code > 1 ? best.code - 1 : 1;
        const int nearby  = pair == 0 ? refined : pair == 1 ? after : before;
        const int free    = (best.slot + 1 + (pair < 2 ? pair : 2)) % AAAC_SLOTS;
        const aaac_candidate other =
            aaac_least(aaac_try(grid, s, r, target, inner, ld, s.inverse + k, nearby, free, pair < 3), 3);
        if (other.loss < best.loss) {
            best = other;
        }
        const bool zero = nothing <= best.loss;
        const float * left = r.error[zero ? AAAC_SLOTS : best.slot];
        const float   unit = zero ? 1.0f : grid.scales[best.code];
        float * change = r.error[(best.slot + 1) % AAAC_SLOTS];
        best.code = zero ? 0 : best.code;
        for (int j = t; j < G; j += AAAC_ROW_THREADS) {
            change[j] = unit*left[j];
        }
        if (row < n_rows) {
            aaac_write(grid, r, best, k, row, n_rows, q, level, selector, code);
        }
        __syncwarp();
        aaac_move(r, u + k*ld, ld, change, k + G, n);
        __syncwarp();
    }
}

// Decide the groups of a block of columns again, as TorchSearch.sweep does.
//   h         the part of H at the block, row stride ld
//   roots     [n / G][G][G], the U of each group, with (H_GG)^-1 = U^T U
//   gradient  [n][n_rows], H (w - q) at the columns of the block
// q, level, selector and code are as in aaac_feed_back. q and code are read. A group is written if something better is
// found.
template <int G>
__global__ void __launch_bounds__(AAAC_SEARCH_THREADS)
aaac_sweep(const AAAC_GRID_CONSTANT aaac_grid grid, int n, int n_rows, const float * __restrict__ h, int ld,
           const float * __restrict__ roots, const float * gradient, float * q, float * level, uint8_t * selector,
           int64_t * code) {
    __shared__ aaac_shared<G> s;
    aaac_prepare(grid, s, n, n_rows, gradient, [=](int j) { return roots[j/G*G*G + j % G*(G + 1)]; });
    const int row  = blockIdx.x*AAAC_ROWS + threadIdx.x/AAAC_ROW_THREADS;
    const int t    = aaac_row_thread();
    aaac_row<G> & r = s.rows[threadIdx.x/AAAC_ROW_THREADS];
    float * target = r.error[AAAC_SLOTS];
    float * change = r.error[AAAC_NEARBY];
    for (int k = 0; k < n; k += G) {
        const float * root = roots + k*G;
        // The present error of the group is U gradient. It is least if q moves by H_GG^-1 gradient = U^T U gradient.
        float now = 0.0f;
        for (int i = t; i < G; i += AAAC_ROW_THREADS) {
            float at = 0.0f;
            for (int j = i/AAAC_RUN*AAAC_RUN; j < G; j += 4) {
                const aaac_vector v = *(const aaac_vector *) (root + i*G + j);
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                    at += v.x[l]*r.x[k + j + l];
                }
            }
            change[i] = at;
            now += at*at;
        }
        now = aaac_row_sum(now);
        __syncwarp();
        for (int j = t; j < G; j += AAAC_ROW_THREADS) {
            float at = row < n_rows ? q[(k + j)*n_rows + row] : 0.0f;
            for (int i = 0; i <= j; ++i) {
                at += root[i*G + j]*change[i];
            }
            target[j] = at;
        }
        __syncwarp();
        const int pair  = t/2 < AAAC_NEARBY ? t/2 : AAAC_NEARBY - 1;
        const int wish  = (row < n_rows ? (int) code[k/G*n_rows + row] : 1) + pair - AAAC_NEARBY/2;
        const int tried = wish < 1 ? 1 : wish >= grid.n_scales ? grid.n_scales - 1 : wish;
        const aaac_candidate best =
            aaac_least(aaac_try(grid, s, r, target, root, G, s.inverse + k, tried, pair, t/2 == pair), AAAC_NEARBY);
        // Rounding in float32 must not let a group go back and forth.
        if (row < n_rows && best.loss < now*(1 - 1e-5f)) {
            for (int j = t; j < G; j += AAAC_ROW_THREADS) {
                change[j] = aaac_mul(grid.scales[best.code], r.level[best.slot][j]) - q[(k + j)*n_rows + row];
            }
            aaac_write(grid, r, best, k, row, n_rows, q, level, selector, code);
        } else {
            for (int j = t; j < G; j += AAAC_ROW_THREADS) {
                change[j] = 0.0f;
            }
        }
        __syncwarp();
        aaac_move(r, h + k*ld, ld, change, k + G, n);
        __syncwarp();
    }
}

// Round a run of columns at steps that are given, as TorchSearch.round_to_steps does. Each thread has a row.
//   w, levels, error       [n][n_rows], n at most AAAC_STEPS
//   u                      the upper triangle of the run, row stride ld
//   table                  [AAAC_CELLS], the nearest level for each cell
//   step, offset, inverse  [n_rows]
// Grid: ceil(n_rows / AAAC_SEARCH_THREADS)
__global__ void __launch_bounds__(AAAC_SEARCH_THREADS)
aaac_round_to_steps(int n, int n_rows, const float * __restrict__ u, int ld, const float * __restrict__ table,
                    const float * step, const float * offset, const float * inverse, const float * w, int8_t * levels,
                    float * error) {
    const int row = blockIdx.x*AAAC_SEARCH_THREADS + threadIdx.x;
    if (row >= n_rows) {
        return;
    }
    const float one = step[row], shift = offset[row], factor = inverse[row];
    float x[AAAC_STEPS];
#pragma unroll
    for (int j = 0; j < AAAC_STEPS; ++j) {
        x[j] = j < n ? w[j*n_rows + row] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < AAAC_STEPS; ++j) {
        if (j < n) {
            const float cell  = aaac_mul(x[j] + shift, factor)*AAAC_PER_UNIT + AAAC_CELLS/2;
            const float level = table[(int) fminf(fmaxf(cell, 0.0f), AAAC_CELLS - 1)];
            const float left  = (x[j] - (aaac_mul(level, one) - shift))/u[j*ld + j];
            levels[j*n_rows + row] = (int8_t) level;
            error[j*n_rows + row]  = left;
#pragma unroll
            for (int k = j + 1; k < AAAC_STEPS; ++k) {
                x[k] -= (k < n ? u[j*ld + k] : 0.0f)*left;
            }
        }
    }
}

#if !defined(__CUDACC_RTC__)
#define INSTANTIATE(G)                                                                                               \
    template __global__ void aaac_feed_back<G>(const AAAC_GRID_CONSTANT aaac_grid, int, int,                         \
                                               const float * __restrict__, int, const float *, int, const float *,   \
                                               float *, float *, uint8_t *, int64_t *);                              \
    template __global__ void aaac_sweep<G>(const AAAC_GRID_CONSTANT aaac_grid, int, int, const float * __restrict__, \
                                           int, const float * __restrict__, const float *, float *, float *,         \
                                           uint8_t *, int64_t *);
INSTANTIATE(16)
INSTANTIATE(32)
INSTANTIATE(128)
#endif
