#pragma once

#include "common.cuh"

// The CUDA backend's operations on AAAC weights: MUL_MAT, MUL_MAT_ID, GET_ROWS and CPY to F32, F16 and BF16.
// The codebooks come from the weight tensor and travel to the kernels by value, so none of ggml's own kernels can be used.

// the op reads or writes an AAAC tensor, views of one excepted
bool ggml_cuda_aaac_uses(const ggml_tensor * op);

bool ggml_cuda_aaac_supports_op(int cc, const ggml_tensor * op);

// false for an op that has nothing to do with AAAC
bool ggml_cuda_aaac_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op);

// MUL_MAT of few columns, or MUL_MAT_ID (ids not null) of few tokens. fusion: what ggml fuses into one column, bias, gate and GLU, or null
void ggml_cuda_aaac_mul_mat_vec(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids, ggml_tensor * dst,
        const ggml_cuda_mm_fusion_args_host * fusion);
