#pragma once

#include "common.cuh"
#include "ggml-aaac.h"

// The CUDA backend's operations on AAAC weights: those that ggml_aaac_supports_op names.
// The codebooks come from the weight tensor and reach the kernels by value, so ggml's own kernels cannot be used.

// Return whether a device of compute capability cc can compute op.
bool ggml_cuda_aaac_supports_op(int cc, const ggml_tensor * op);

// Compute op. Return false, and do nothing, if op has nothing to do with AAAC.
bool ggml_cuda_aaac_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op);

// Compute MUL_MAT of few columns, or MUL_MAT_ID (ids not null) of few tokens.
// fusion: the bias, gate and GLU that ggml fuses into a product with one column, or null.
void ggml_cuda_aaac_mul_mat_vec(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
        ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion);
