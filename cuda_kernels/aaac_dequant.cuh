// Decode of blocks to floats, with the same bits as aaac_decode.cuh and the numpy oracle: S in float32, one product,
// and one rounding to the output type.

#ifndef AAAC_DEQUANT_CUH
#define AAAC_DEQUANT_CUH

#include "aaac_device.cuh"

// Decode one unit. out[0..15] are 16 weights of the row, from the low nibbles. out[16..31] are from the high nibbles,
// and are the 16 weights that start 32 after them.
template <class T>
AAAC_DEV void aaac_decode_unit(const aaac_params & p, const aaac_tables & tables, const aaac_raw & raw, int v,
                               float * out) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t table[4], levels[4];
        aaac_load16(tables.level[T::selector(raw.head, v, half)], table);
        aaac_levels_natural(table, raw.q, half, levels);
        const float scale = aaac_mul(p.d, aaac_factor(T::code(raw.head, v, half), 1u << (23 - p.m)));
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            out[16*half + i] = aaac_mul(scale, aaac_level_to_float(levels[i/4], i % 4));
        }
    }
}

#if defined(__CUDACC__) || defined(AAAC_EMULATE)

constexpr int AAAC_DEQUANT_THREADS = 128;

// Decode unit u of a row to its place in y, which is the same row of the result and must be 16 byte aligned.
template <class T, class O>
AAAC_DEV void aaac_dequant_unit(const aaac_params & p, const aaac_tables & tables, const uint8_t * row, int u, O * y) {
    aaac_raw raw;
    float    weights[32];
    aaac_load<T>(row, u, raw);
    aaac_decode_unit<T>(p, tables, raw, u % T::units, weights);
    O * to = y + u/2*AAAC_RUN_SIZE + u % 2*16;
    constexpr int n = 16/sizeof(O);
#pragma unroll
    for (int i = 0; i < 32; i += n) {
        aaac_pack<O> out;
#pragma unroll
        for (int j = 0; j < n; ++j) {
            out.x[j] = aaac_from_float<O>(weights[i + j]);
        }
        *(aaac_pack<O> *) (to + i/16*32 + i % 16) = out;
    }
}

// Decode a matrix to y[row*ld_y + i]. n_units: units of all rows, below 2^32 - 128. Grid: ceil(n_units / 128)
template <class T, class O>
__global__ void __launch_bounds__(AAAC_DEQUANT_THREADS)
aaac_dequant(const AAAC_GRID_CONSTANT aaac_params p, const uint8_t * w, int64_t row_bytes, int k, uint32_t n_units,
             O * y, int64_t ld_y) {
    __shared__ aaac_tables tables;
    aaac_make_tables(p, threadIdx.x, &tables);
    __syncthreads();
    const uint32_t i = blockIdx.x*AAAC_DEQUANT_THREADS + threadIdx.x;
    if (i < n_units) {
        const uint32_t per_row = (uint32_t) k/AAAC_UNIT;
        const int64_t  row     = i/per_row; // a division of 64 bits would cost more than the decode
        aaac_dequant_unit<T, O>(p, tables, w + row*row_bytes, (int) (i % per_row), y + row*ld_y);
    }
}

#endif // device or emulated

#endif // AAAC_DEQUANT_CUH
