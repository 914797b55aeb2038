// The kernels of search.cu behind C functions, for tests/quantizer/test_cuda.py to launch as CuPy would.

#include "cuda_emulator.h"

#include "search.cu"

#include <type_traits>

template <class F> static void with_group_size(int size, F f) {
    switch (size) {
        case 16:  f(std::integral_constant<int, 16>{});  break;
        case 32:  f(std::integral_constant<int, 32>{});  break;
        case 128: f(std::integral_constant<int, 128>{}); break;
        default: abort();
    }
}

extern "C" {

// what gpu_search.py must agree with
void constants(int out[5]) {
    const int values[] = { AAAC_ROWS, AAAC_SEARCH_THREADS, AAAC_STARTS, AAAC_BLOCK, (int) sizeof(aaac_grid) };
    memcpy(out, values, sizeof(values));
}

void aaac_feed_back(int size, int blocks, int threads, const aaac_grid * grid, int n, int n_rows, const float * u, int ld, const float * starts,
                    int n_starts, const float * w, float * q, float * level, uint8_t * second, int64_t * code) {
    with_group_size(size, [&](auto g) {
        launch({blocks}, threads, [&] { ::aaac_feed_back<g>(*grid, n, n_rows, u, ld, starts, n_starts, w, q, level, second, code); });
    });
}

void aaac_sweep(int size, int blocks, int threads, const aaac_grid * grid, int n, int n_rows, const float * h, int ld, const float * roots,
                const float * gradient, float * q, float * level, uint8_t * second, int64_t * code) {
    with_group_size(size, [&](auto g) {
        launch({blocks}, threads, [&] { ::aaac_sweep<g>(*grid, n, n_rows, h, ld, roots, gradient, q, level, second, code); });
    });
}

void aaac_round_to_steps(int, int blocks, int threads, int n, int n_rows, const float * u, int ld, const float * table, const float * step,
                         const float * offset, const float * inverse, const float * w, int8_t * levels, float * error) {
    launch({blocks}, threads,
           [&] { ::aaac_round_to_steps(n, n_rows, u, ld, table, step, offset, inverse, w, levels, error); });
}

} // extern "C"
