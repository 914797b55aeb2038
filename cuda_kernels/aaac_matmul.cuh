// Products with many columns on the tensor cores: y[c][n] = sum over k of w[n][k] * x[c][k].
//
// Each block decodes a tile of weights to shared memory, rounded once to the 16-bit type of the product, and uses it
// for 128 columns. Decoded weights never go through global memory. They include the scale, so that the tensor core
// instructions need no others between them.
//
// For mixtures of experts the columns may be sorted by expert (blockIdx.z).

#ifndef AAAC_MATMUL_CUH
#define AAAC_MATMUL_CUH

#include "aaac_dequant.cuh"

#if defined(__CUDACC__) || defined(AAAC_EMULATE)

constexpr int AAAC_MATMUL_ROWS    = 128; // rows of w of a block: two threads decode a run of a row
constexpr int AAAC_MATMUL_COLS    = 128;
constexpr int AAAC_MATMUL_THREADS = 256; // 2 x 4 warps of 64 rows x 32 columns
constexpr int AAAC_MATMUL_STRIDE  = 72;  // of 64 values in shared memory: 144 bytes put 8 rows in different banks

// 16-bit type of the product for each type of the activations
template <class A> struct aaac_product            { using type = aaac_f16; };
template <>        struct aaac_product<aaac_bf16> { using type = aaac_bf16; };

#if defined(__CUDACC__)
// Load four 8x8 matrices of 16-bit values. Lane i gives the address of row i % 8 of matrix i / 8.
AAAC_DEV void aaac_ldmatrix(const uint16_t * row, uint32_t * out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(address) : "memory");
#endif
}

// d[16][8] += a[16][16] * b[16][8]
AAAC_DEV void aaac_mma(aaac_f16, float * d, const uint32_t * a, const uint32_t * b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    for (int i = 0; i < 2; ++i) { // Turing's instruction is half as deep
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2*i]), "r"(a[2*i + 1]), "r"(b[i]));
    }
#endif
}

AAAC_DEV void aaac_mma(aaac_bf16, float * d, const uint32_t * a, const uint32_t * b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
    __trap(); // the callers refuse bfloat16 before Ampere
#endif
}
#endif // __CUDACC__, the emulator brings its own

// The columns of each expert, for a in 0 .. experts - 1: sources[bounds[a] .. bounds[a + 1]) are rows of x, and targets
// at the same places are rows of y. If all are null, the columns are 0 .. n_cols - 1 as they are.
struct aaac_experts {
    const int32_t * bounds; // [experts + 1]
    const int32_t * sources;
    const int32_t * targets;
    int64_t         bytes;  // of an expert's matrix in w
};

// Multiply: y[c*ld_y + n] from x[c*ld_x + i]. n_cols: of one expert at most.
// Grid: (ceil(n_rows / 128), ceil(n_cols / 128), experts or 1)
template <class T, class A>
__global__ void __launch_bounds__(AAAC_MATMUL_THREADS)
aaac_matmul(const AAAC_GRID_CONSTANT aaac_params p, const uint8_t * w, int64_t row_bytes, int n_rows, int k,
            const A * x, int64_t ld_x, int n_cols, float * y, int64_t ld_y, aaac_experts experts) {
    using M = typename aaac_product<A>::type;
    using pack_m = aaac_pack<M>;
    using pack_a = aaac_pack<A>;
    __shared__ aaac_tables tables;
    __shared__ pack_m w_tile[AAAC_MATMUL_ROWS*AAAC_MATMUL_STRIDE/8];
    __shared__ pack_m x_tile[AAAC_MATMUL_COLS*AAAC_MATMUL_STRIDE/8];

    const int first = experts.bounds ? experts.bounds[blockIdx.z]             : 0;
    const int count = experts.bounds ? experts.bounds[blockIdx.z + 1] - first : n_cols;
    const int row0  = blockIdx.x*AAAC_MATMUL_ROWS;
    const int col0  = blockIdx.y*AAAC_MATMUL_COLS;
    if (col0 >= count) {
        return; // the whole block
    }

    // This thread fills half a run of one row and half a run of one column of the tiles. Past the last row or column it
    // takes the last one again, whose results are not stored.
    const int part = threadIdx.x % 2;
    const int line = threadIdx.x/2;
    const int row  = row0 + line < n_rows ? row0 + line : n_rows - 1;
    const int col  = first + (col0 + line < count ? col0 + line : count - 1);
    const uint8_t * w_row = w + blockIdx.z*experts.bytes + (int64_t) row*row_bytes;
    const A       * x_col = x + (int64_t) (experts.sources ? experts.sources[col] : col)*ld_x + part*32;
    M * w_to = w_tile->x + line*AAAC_MATMUL_STRIDE + part*16;
    M * x_to = x_tile->x + line*AAAC_MATMUL_STRIDE + part*32;

    constexpr int per_pack = 16/sizeof(A);
    aaac_raw raw;
    pack_a   acts[32/per_pack];
    const auto load = [&](int run) {
        aaac_load<T>(w_row, 2*run + part, raw);
#pragma unroll
        for (int i = 0; i < 32/per_pack; ++i) {
            acts[i] = *(const pack_a *) (x_col + (int64_t) run*AAAC_RUN_SIZE + i*per_pack);
        }
    };
    load(0);
    aaac_make_tables(p, threadIdx.x, &tables);

    const int lane    = threadIdx.x % 32;
    const int warp    = threadIdx.x/32;
    const int warp_m  = warp/4*64;
    const int warp_n  = warp % 4*32;
    // what this lane addresses for ldmatrix: of w 16 rows x 16 values, of x 16 columns x 16 values
    const int w_line = warp_m + lane % 16;
    const int x_line = warp_n + lane/16*8 + lane % 8;
    const uint16_t * w_from = (const uint16_t *) w_tile + w_line*AAAC_MATMUL_STRIDE + lane/16*8;
    const uint16_t * x_from = (const uint16_t *) x_tile + x_line*AAAC_MATMUL_STRIDE + lane/8 % 2*8;

    float acc[4][4][4] = {};
    for (int run = 0; run < k/AAAC_RUN_SIZE; ++run) {
        __syncthreads(); // the tables are complete, and no thread reads the previous tiles any more
        float weights[32];
        aaac_decode_unit<T>(p, tables, raw, (2*run + part) % T::units, weights);
#pragma unroll
        for (int i = 0; i < 32; i += 8) {
            pack_m out;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                out.x[j] = aaac_from_float<M>(weights[i + j]);
            }
            *(pack_m *) (w_to + i/16*32 + i % 16) = out;
        }
#pragma unroll
        for (int i = 0; i < 32; i += 8) {
            pack_m out;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                out.x[j] = aaac_from_float<M>(aaac_to_float(acts[(i + j)/per_pack].x[(i + j) % per_pack]));
            }
            *(pack_m *) (x_to + i) = out;
        }
        __syncthreads();
        if (run + 1 < k/AAAC_RUN_SIZE) {
            load(run + 1); // arrives while the tensor cores work
        }
#pragma unroll
        for (int kk = 0; kk < AAAC_RUN_SIZE; kk += 16) {
            uint32_t b[4][2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                aaac_ldmatrix(x_from + 16*j*AAAC_MATMUL_STRIDE + kk, b[2*j]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t a[4];
                aaac_ldmatrix(w_from + 16*i*AAAC_MATMUL_STRIDE + kk, a);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    aaac_mma(M{}, acc[i][j], a, b[j]);
                }
            }
        }
    }

#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const int c = col0 + warp_n + 8*j + lane % 4*2 + v % 2;
            if (c < count) {
                float * to = y + (int64_t) (experts.targets ? experts.targets[first + c] : c)*ld_y;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = row0 + warp_m + 16*i + lane/4 + v/2*8;
                    if (n < n_rows) {
                        to[n] = acc[i][j][v];
                    }
                }
            }
        }
    }
}

#endif // device or emulated

#endif // AAAC_MATMUL_CUH
