// Products with few columns: y[c][n] = sum over k of w[n][k] * x[c][k], 1 to 8 columns c.
//
// A weight is read once, so the time to read the bytes of w is the limit. These get near it:
//   * A block is 4 warps that share K, and computes R rows. Each thread loads the next unit of every row before it
//     computes the present one. So about 32 KB per multiprocessor are on their way at any time, which is what device
//     memory needs (bandwidth times latency).
//   * The 4 byte loads of a warp are in one stretch of memory, so one load brings a cache line and the others find it.
//   * The R rows share the activations that a thread has loaded.
//   * The next limit is instructions per weight: see aaac_lookup_split, and the table order of the activations.

#ifndef AAAC_MATVEC_CUH
#define AAAC_MATVEC_CUH

#include "aaac_device.cuh"

constexpr int AAAC_MATVEC_WARPS   = 4;
constexpr int AAAC_MATVEC_THREADS = 32*AAAC_MATVEC_WARPS;

// Return the rows of a block. Few columns leave registers for more rows.
constexpr AAAC_FN int aaac_matvec_rows(int n_cols) { return n_cols <= 2 ? 4 : 2; }

// Return how many blocks must fit a multiprocessor. The compiler then knows how many registers it may use: 96 for one
// column, else 128. Left to itself it uses fewer on some architectures, and spills.
constexpr AAAC_FN int aaac_matvec_blocks(int n_cols) { return n_cols == 1 ? 5 : 4; }

//
// activations as 8-bit integers
//
// One column of K in memory is int8 q[K], then float d[K/32], rounded up to 16 bytes in all. A scale is that of 32
// activations in natural order, as in Q8_0 and on the CPU. The integers are in the order of the units: 16 for the low
// nibbles, then 16 for the high ones, each in table order. So a thread loads its 32 bytes with two loads.

AAAC_FN int64_t aaac_q8_stride(int64_t k) { return (k + k/8 + 15)/16*16; }

// Return the place of activation i in its column.
AAAC_FN int64_t aaac_q8_place(int64_t i) {
    const int in_run = (int) (i % AAAC_RUN_SIZE);
    return i - in_run + in_run/16 % 2*AAAC_UNIT + in_run/32*16 + aaac_place(in_run % 16);
}

#if defined(__CUDACC__) || defined(AAAC_EMULATE)

// Quantize activation i of a column x[k], one thread each. The 32 threads of a warp share a scale.
// k is a multiple of 64.
template <class A>
AAAC_DEV void aaac_quantize_32(const A * x, int64_t i, int64_t k, uint8_t * column) {
    const float value = aaac_to_float(x[i]);
    float largest = value < 0.0f ? -value : value;
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, largest, o);
        largest = other > largest ? other : largest;
    }
    const float d       = largest/127.0f;
    const float inverse = d >= 1.17549435e-38f ? 1.0f/d : 0.0f; // a subnormal scale has no finite inverse
    column[aaac_q8_place(i)] = (uint8_t) (int8_t) rintf(value*inverse);
    if (i % 32 == 0) {
        ((float *) (column + k))[i/32] = d;
    }
}

// Quantize columns x[c*ld_x + i]. Grid: (ceil(k / 128), columns)
template <class A>
__global__ void __launch_bounds__(AAAC_MATVEC_THREADS)
aaac_quantize_q8(const A * x, int64_t ld_x, int k, uint8_t * q8) {
    const int64_t i = (int64_t) blockIdx.x*AAAC_MATVEC_THREADS + threadIdx.x;
    if (i < k) { // holds for whole warps, because k is a multiple of 32
        aaac_quantize_32(x + blockIdx.y*ld_x, i, k, q8 + blockIdx.y*aaac_q8_stride(k));
    }
}

//
// sums over threads
//

// Sum each of V values over the warp. Lane i returns the sum of value i*V/32. V is a power of two, at most 32.
// Every step halves the number of values that a lane works on, so it takes V - 1 + log2(32/V) exchanges, not 5*V.
template <int V>
AAAC_DEV float aaac_warp_sums(float * v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 5; ++step) {
        const int  o     = 16 >> step;
        const int  w     = V >> (step + 1);
        const bool upper = lane & o;
#pragma unroll
        for (int i = 0; i < V/2; ++i) { // constant bounds keep v in registers
            if (i < w) {
                const float give = upper ? v[i] : v[i + w];
                const float keep = upper ? v[i + w] : v[i];
                v[i] = keep + __shfl_xor_sync(0xFFFFFFFFu, give, o);
            }
        }
        if (w == 0) {
            v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], o);
        }
    }
    return v[0];
}

// Sum each of V values over the block. Thread i < V returns the sum of value i.
// partial: V*AAAC_MATVEC_WARPS floats in shared memory
template <int V>
AAAC_DEV float aaac_block_sums(float * v, float * partial) {
    const int   lane = threadIdx.x % 32;
    const float sum  = aaac_warp_sums<V>(v);
    if (lane % (32/V) == 0) {
        partial[threadIdx.x/32*V + lane/(32/V)] = sum;
    }
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < V) {
#pragma unroll
        for (int w = 0; w < AAAC_MATVEC_WARPS; ++w) {
            total += partial[w*V + threadIdx.x];
        }
    }
    return total;
}

//
// products with 8-bit activations
//

// Load unit u of R rows.
template <class T, int R>
AAAC_DEV void aaac_load_rows(const uint8_t * const * rows, int u, aaac_raw * raw) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
        aaac_load<T>(rows[r], u, raw[r]);
    }
}

// Compute this thread's part of row row0 + r times column c: sum[r*N + c]. The caller multiplies by d, the common
// factor of all scales. Rows and columns past the last one repeat it, and the caller does not store them.
// wait() returns when q8 is written. The first weights are loaded before it is called.
template <class T, int N, class W>
AAAC_DEV void aaac_dot_rows(const aaac_params & p, aaac_tables * tables, const uint8_t * w, int64_t row_bytes,
                            int row0, int n_rows, int k, const uint8_t * q8, int n_cols, float * sum, const W & wait) {
    constexpr int R = aaac_matvec_rows(N);
    const uint32_t multiplier = 1u << (23 - p.m);
    const int      n_units    = k/AAAC_UNIT;
    const int64_t  col_bytes  = aaac_q8_stride(k);

    const uint8_t * rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        rows[r] = w + (int64_t) (row0 + r < n_rows ? row0 + r : n_rows - 1)*row_bytes;
    }
#pragma unroll
    for (int i = 0; i < R*N; ++i) {
        sum[i] = 0.0f;
    }

    aaac_raw next[R];
    if ((int) threadIdx.x < n_units) {
        aaac_load_rows<T, R>(rows, threadIdx.x, next);
    }
    aaac_make_tables(p, threadIdx.x, tables);
    wait();
    __syncthreads();

    for (int u = threadIdx.x; u < n_units; u += AAAC_MATVEC_THREADS) {
        aaac_raw raw[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            raw[r] = next[r];
        }
        if (u + AAAC_MATVEC_THREADS < n_units) {
            aaac_load_rows<T, R>(rows, u + AAAC_MATVEC_THREADS, next);
        }

        const int v = u % T::units;
        uint32_t levels[N > 2 ? R : 1][2][4];
        float    factor[N > 2 ? R : 1][2];
        if (N > 2) { // look up once for all columns
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t table[4];
                    aaac_load16(tables->level[T::selector(raw[r].head, v, half)], table);
                    aaac_levels(table, raw[r].q, half, levels[N > 2 ? r : 0][half]);
                    factor[N > 2 ? r : 0][half] = aaac_factor(T::code(raw[r].head, v, half), multiplier);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const uint8_t * column = q8 + (c < n_cols ? c : n_cols - 1)*col_bytes;
            const float   * scales = (const float *) (column + k) + u/2*2;
            uint32_t a[2][4];
            aaac_load16(column + (int64_t) u*AAAC_UNIT,      a[0]);
            aaac_load16(column + (int64_t) u*AAAC_UNIT + 16, a[1]);
            const float scale[2] = { scales[0], scales[1] };
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int   dot;
                    float f;
                    if (N > 2) {
                        dot = aaac_dot_half(levels[N > 2 ? r : 0][half], a[half]);
                        f   = factor[N > 2 ? r : 0][half];
                    } else {
                        uint32_t table[4];
                        aaac_load16(tables->split[T::selector(raw[r].head, v, half)], table);
                        dot = aaac_dot_half_split(table, raw[r].q, half, a[half]);
                        f   = aaac_factor(T::code(raw[r].head, v, half), multiplier);
                    }
                    sum[r*N + c] += f*scale[half]*(float) dot;
                }
            }
        }
    }
}

// Multiply by columns q8 that aaac_quantize_q8 wrote: y[c*ld_y + n]. Grid: ceil(n_rows / aaac_matvec_rows(N))
template <class T, int N>
__global__ void __launch_bounds__(AAAC_MATVEC_THREADS, aaac_matvec_blocks(N))
aaac_matvec_q8(const AAAC_GRID_CONSTANT aaac_params p, const uint8_t * w, int64_t row_bytes, int n_rows, int k,
               const uint8_t * q8, int n_cols, float * y, int64_t ld_y) {
    constexpr int R = aaac_matvec_rows(N);
    __shared__ aaac_tables tables;
    __shared__ float partial[R*N*AAAC_MATVEC_WARPS];

    const int row0 = blockIdx.x*R;
    float sum[R*N];
    aaac_dot_rows<T, N>(p, &tables, w, row_bytes, row0, n_rows, k, q8, n_cols, sum, [] {});
    const float total = aaac_block_sums<R*N>(sum, partial);
    const int row = row0 + threadIdx.x/N;
    const int c   = threadIdx.x % N;
    if (threadIdx.x < R*N && row < n_rows && c < n_cols) {
        y[c*ld_y + row] = p.d*total;
    }
}

//
// products with 16 or 32-bit float activations: x is not rounded, and there is more arithmetic
//

// Multiply by columns x[c*ld_x + i]: y[c*ld_y + n]. Grid: ceil(n_rows / 2)
// 4 elements of x are read at a time, so x and its columns must start at multiples of 4 elements.
template <class T, class A, int N>
__global__ void __launch_bounds__(AAAC_MATVEC_THREADS, 4)
aaac_matvec(const AAAC_GRID_CONSTANT aaac_params p, const uint8_t * w, int64_t row_bytes, int n_rows, int k,
            const A * x, int64_t ld_x, int n_cols, float * y, int64_t ld_y) {
    constexpr int R = 2;
    struct alignas(4*sizeof(A)) four { A x[4]; };
    __shared__ aaac_tables tables;
    __shared__ float partial[R*N*AAAC_MATVEC_WARPS];

    const uint32_t multiplier = 1u << (23 - p.m);
    const int      row0       = blockIdx.x*R;
    float sum[R*N];
#pragma unroll
    for (int i = 0; i < R*N; ++i) {
        sum[i] = 0.0f;
    }
    aaac_make_tables(p, threadIdx.x, &tables);
    __syncthreads();

    for (int u = threadIdx.x; u < k/AAAC_UNIT; u += AAAC_MATVEC_THREADS) {
        const int v = u % T::units;
        uint32_t levels[R][2][4];
        float    factor[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            aaac_raw raw;
            aaac_load<T>(w + (int64_t) (row0 + r < n_rows ? row0 + r : n_rows - 1)*row_bytes, u, raw);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t table[4];
                aaac_load16(tables.level[T::selector(raw.head, v, half)], table);
                aaac_levels_natural(table, raw.q, half, levels[r][half]);
                factor[r][half] = aaac_factor(T::code(raw.head, v, half), multiplier);
            }
        }
#pragma unroll
        for (int c = 0; c < N; ++c) {
            const A * column = x + (c < n_cols ? c : n_cols - 1)*ld_x + u/2*AAAC_RUN_SIZE + u % 2*16;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float dot[R] = {};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const four a = *(const four *) (column + 32*half + 4*j);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float value = aaac_to_float(a.x[i]);
#pragma unroll
                        for (int r = 0; r < R; ++r) {
                            dot[r] += aaac_level_to_float(levels[r][half][j], i)*value;
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    sum[r*N + c] += factor[r][half]*dot[r];
                }
            }
        }
    }

    const float total = aaac_block_sums<R*N>(sum, partial);
    const int row = row0 + threadIdx.x/N;
    const int c   = threadIdx.x % N;
    if (threadIdx.x < R*N && row < n_rows && c < n_cols) {
        y[c*ld_y + row] = p.d*total;
    }
}

#endif // device or emulated

#endif // AAAC_MATVEC_CUH
