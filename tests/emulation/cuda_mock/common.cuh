// Stands in for ggml-cuda's common.cuh if cuda_backend_host.cpp runs the patch's CUDA files on the host: what they use of it, no more.

#pragma once

#include "ggml-impl.h"
#include "ggml.h"

using cudaStream_t   = void *;
using cublasHandle_t = void *;

#define CUDA_CHECK(call)   GGML_ASSERT((call) == 0)
#define CUBLAS_CHECK(call) GGML_ASSERT((call) == 0)
#define GGML_CUDA_CC_TURING 750

inline int cudaGetLastError() { return 0; }
inline int ggml_cuda_highest_compiled_arch(int cc) { return cc; }

inline void ggml_cuda_pdl_sync() {}
inline void ggml_cuda_pdl_lc() {}

struct ggml_cuda_kernel_launch_params {
    dim3         grid, block;
    size_t       shared;
    cudaStream_t stream;
    ggml_cuda_kernel_launch_params(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) : grid(grid), block(block), shared(shared), stream(stream) {}
};

template <class... P, class... A> void ggml_cuda_kernel_launch(void (*kernel)(P...), const ggml_cuda_kernel_launch_params & p, const A &... args) {
    emulator::call({ p.grid, p.block.x, p.shared, p.stream }, kernel, args...);
}

struct ggml_cuda_pool {};

struct ggml_backend_cuda_context {
    cudaStream_t     stream() { return nullptr; }
    cublasHandle_t   cublas_handle() { return nullptr; }
    ggml_cuda_pool & pool() { static ggml_cuda_pool p; return p; }
};

// aligned as the pool's memory is, and full of NaNs: what is not written shows
template <class T> struct ggml_cuda_pool_alloc {
    T * p;
    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) : p((T *) aligned_alloc(256, (n*sizeof(T) + 255)/256*256)) { memset(p, 0xFF, n*sizeof(T)); }
    ~ggml_cuda_pool_alloc() { free(p); }
    T * get() { return p; }
};

struct ggml_cuda_mm_fusion_args_host {
    const ggml_tensor * x_bias     = nullptr;
    const ggml_tensor * gate       = nullptr;
    const ggml_tensor * gate_bias  = nullptr;
    const ggml_tensor * x_scale    = nullptr;
    const ggml_tensor * gate_scale = nullptr;
    ggml_glu_op         glu_op;
    float               glu_limit = 0.0f;
};

enum { CUBLAS_OP_N, CUBLAS_OP_T, CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP };

// column-major c[m][n] = transpose of a[k][m], times b[k][n]: the one case that is used
inline int cublasGemmEx(cublasHandle_t, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const float * alpha, const void * a, int type_a, int64_t lda,
                        const void * b, int type_b, int64_t ldb, const float * beta, void * c, int type_c, int64_t ldc, int compute, int) {
    GGML_ASSERT(op_a == CUBLAS_OP_T && op_b == CUBLAS_OP_N && type_a == CUDA_R_16F && type_b == CUDA_R_16F && type_c == CUDA_R_32F);
    GGML_ASSERT(compute == CUBLAS_COMPUTE_32F && *alpha == 1.0f && *beta == 0.0f);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) {
            double sum = 0.0;
            for (int64_t l = 0; l < k; ++l) {
                sum += (double) ggml_fp16_to_fp32(((const ggml_fp16_t *) a)[i*lda + l])*ggml_fp16_to_fp32(((const ggml_fp16_t *) b)[j*ldb + l]);
            }
            ((float *) c)[j*ldc + i] = (float) sum;
        }
    }
    return 0;
}
