// The CUDA kernels and their device functions behind C functions, for test_cuda_host.py to call through ctypes.

#include "cuda_emulator.h"

#include <algorithm>
#include <utility>

#include "aaac_matmul.cuh"
#include "aaac_matvec.cuh"

template <class F> static void with_type(int type, F f) {
    switch (type) {
        case 80: f(aaac_g16{});  break;
        case 81: f(aaac_g32{});  break;
        case 82: f(aaac_g128{}); break;
        default: abort();
    }
}

// 0: float32, 1: float16, 2: bfloat16
template <class F> static void with_float(int format, F f) {
    switch (format) {
        case 0: f(float{});     break;
        case 1: f(aaac_f16{});  break;
        case 2: f(aaac_bf16{}); break;
        default: abort();
    }
}

template <class... P, size_t... I> static void apply(void (*kernel)(P...), void ** args, std::index_sequence<I...>) { kernel(*(P *) args[I]...); }

// as cudaLaunchKernel, with the sizes of the arguments; false if they are not those of the kernel
template <class... P> static bool launch_as(void (*kernel)(P...), dim3 grid, int threads, void ** args, const int * sizes, int n_args) {
    const int expected[] = { (int) sizeof(P)... };
    if (!std::equal(expected, expected + sizeof...(P), sizes, sizes + n_args)) {
        return false;
    }
    launch(grid, threads, [&] { apply(kernel, args, std::index_sequence_for<P...>{}); });
    return true;
}

static int ceil_div(int64_t a, int64_t b) { return (int) ((a + b - 1)/b); }

template <class T, int N>
static void run_matvec(int format, const aaac_params * p, const uint8_t * w, int64_t row_bytes, int n_rows, int k, const void * x, int n_cols, float * y) {
    if (format < 0) {
        launch({ceil_div(n_rows, aaac_matvec_rows(N))}, AAAC_MATVEC_THREADS,
               [&] { aaac_matvec_q8<T, N>(*p, w, row_bytes, n_rows, k, (const uint8_t *) x, n_cols, y, n_rows); });
    } else {
        with_float(format, [&](auto a) {
            using A = decltype(a);
            launch({ceil_div(n_rows, 2)}, AAAC_MATVEC_THREADS,
                   [&] { aaac_matvec<T, A, N>(*p, w, row_bytes, n_rows, k, (const A *) x, k, n_cols, y, n_rows); });
        });
    }
}

extern "C" {

// every index through every look-up: out[16] levels of book 0, then of book 1, by each of natural order, table order and the split tables
void lookups(const aaac_params * p, int8_t out[3][2][16]) {
    alignas(16) aaac_tables tables;
    for (int i = 0; i < 32; ++i) {
        aaac_make_tables(*p, i, &tables);
    }
    for (int book = 0; book < 2; ++book) {
        // index bytes: 0..15 in the low nibbles, 15..0 in the high ones
        uint8_t bytes[16];
        for (int i = 0; i < 16; ++i) {
            bytes[i] = (uint8_t) (i | (15 - i) << 4);
        }
        uint32_t q[4], low[4], high[4];
        memcpy(q, bytes, 16);
        aaac_levels_natural(tables.level[book], q, 0, low);
        memcpy(out[0][book], low, 16);
        aaac_levels(tables.level[book], q, 1, high);
        for (int i = 0; i < 16; ++i) {
            out[1][book][15 - i] = ((const int8_t *) high)[aaac_place(i)];
            uint32_t one[4] = {};
            ((uint8_t *) one)[aaac_place(i)] = 1;
            out[2][book][i] = (int8_t) aaac_dot_half_split(tables.split[book], q, 0, one);
        }
    }
}

// low - high of the split tables for one pair of levels at index i and i + 8; returns what the two look-ups make of them
int split_level(int first, int second) {
    int low, high;
    aaac_split_level(first, second, &low, &high);
    const bool fits = low >= -128 && low <= 127 && high >= -128 && high <= 127;
    const bool ok   = low - (high < 0 ? -1 : 0) == first && (low < 0 ? -1 : 0) - high == second;
    return fits && ok;
}

void dequant(int type, int format, const aaac_params * p, const uint8_t * w, int64_t row_bytes, int n_rows, int k, void * y) {
    with_type(type, [&](auto t) {
        with_float(format, [&](auto o) {
            using O = decltype(o);
            const int64_t n_units = (int64_t) n_rows*k/AAAC_UNIT;
            launch({ceil_div(n_units, AAAC_DEQUANT_THREADS)}, AAAC_DEQUANT_THREADS,
                   [&] { aaac_dequant<decltype(t), O>(*p, w, row_bytes, k, (uint32_t) n_units, (O *) y, k); });
        });
    });
}

int64_t q8_stride(int64_t k) { return aaac_q8_stride(k); }
int64_t q8_place(int64_t i)  { return aaac_q8_place(i); }

void quantize_q8(int format, const void * x, int k, int n_cols, uint8_t * q8) {
    with_float(format, [&](auto a) {
        using A = decltype(a);
        launch({ceil_div(k, AAAC_MATVEC_THREADS), n_cols}, AAAC_MATVEC_THREADS, [&] { aaac_quantize_q8<A>((const A *) x, k, k, q8); });
    });
}

// format -1: x is what quantize_q8 wrote
void matvec(int type, int format, const aaac_params * p, const uint8_t * w, int64_t row_bytes, int n_rows, int k, const void * x, int n_cols, float * y) {
    with_type(type, [&](auto t) {
        using T = decltype(t);
        const auto run = n_cols == 1 ? run_matvec<T, 1> : n_cols == 2 ? run_matvec<T, 2> : n_cols <= 4 ? run_matvec<T, 4> : run_matvec<T, 8>;
        run(format, p, w, row_bytes, n_rows, k, x, n_cols, y);
    });
}

// bounds null: dense
void matmul(int type, int format, const aaac_params * p, const uint8_t * w, int64_t row_bytes, int n_rows, int k, const void * x, int n_cols, float * y,
            int n_experts, const int32_t * bounds, const int32_t * sources, const int32_t * targets) {
    with_type(type, [&](auto t) {
        with_float(format, [&](auto a) {
            using A = decltype(a);
            const aaac_experts experts = { bounds, sources, targets, n_rows*row_bytes };
            launch({ceil_div(n_rows, AAAC_MATMUL_ROWS), ceil_div(n_cols, AAAC_MATMUL_COLS), n_experts}, AAAC_MATMUL_THREADS,
                   [&] { aaac_matmul<decltype(t), A>(*p, w, row_bytes, n_rows, k, (const A *) x, k, n_cols, y, n_rows, experts); });
        });
    });
}

// a launch as CuPy makes it, of the kernel that a C++ expression names; false if there is none or its arguments have other sizes
bool launch_expression(const char * expression, int grid_x, int grid_y, int threads, void ** args, const int * sizes, int n_args) {
#define KERNEL(...)      if (strcmp(expression, #__VA_ARGS__) == 0) { return launch_as(__VA_ARGS__, {grid_x, grid_y}, threads, args, sizes, n_args); }
#define COLUMNS(T, A)    KERNEL(aaac_matvec<T, A, 1>) KERNEL(aaac_matvec<T, A, 2>) KERNEL(aaac_matvec<T, A, 4>) KERNEL(aaac_matvec<T, A, 8>)
#define FLOATS(T, A)     KERNEL(aaac_dequant<T, A>) KERNEL(aaac_matmul<T, A>) COLUMNS(T, A)
#define QUANTIZED(T)     KERNEL(aaac_matvec_q8<T, 1>) KERNEL(aaac_matvec_q8<T, 2>) KERNEL(aaac_matvec_q8<T, 4>) KERNEL(aaac_matvec_q8<T, 8>)
#define WEIGHTS(T)       FLOATS(T, float) FLOATS(T, aaac_f16) FLOATS(T, aaac_bf16) QUANTIZED(T)
    WEIGHTS(aaac_g16) WEIGHTS(aaac_g32) WEIGHTS(aaac_g128)
    KERNEL(aaac_quantize_q8<float>) KERNEL(aaac_quantize_q8<aaac_f16>) KERNEL(aaac_quantize_q8<aaac_bf16>)
    return false;
}

} // extern "C"
