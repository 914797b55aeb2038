#pragma once

#include "ggml.h"

struct ggml_compute_params;

// The operations that decode weights one by one, and the product that the fast one is checked against.

// Abort if the operands of MUL_MAT or MUL_MAT_ID do not fit each other.
void ggml_cpu_aaac_check_shapes(const ggml_tensor * dst);

// Compute MUL_MAT or MUL_MAT_ID with float activations, scalar decode and sums in double, with nothing of aaac.cpp.
// ggml_backend_cpu_set_use_ref asks for it.
void ggml_cpu_aaac_mul_mat_reference(const ggml_compute_params * params, ggml_tensor * dst);

void ggml_cpu_aaac_get_rows(const ggml_compute_params * params, ggml_tensor * dst);
void ggml_cpu_aaac_cpy(const ggml_compute_params * params, ggml_tensor * dst);
