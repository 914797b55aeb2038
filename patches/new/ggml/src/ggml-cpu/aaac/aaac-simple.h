#pragma once

#include "ggml.h"

struct ggml_compute_params;

// The operations that decode weights one by one, and the product that the fast one is checked against.

void ggml_cpu_aaac_check_shapes(const ggml_tensor * dst); // of MUL_MAT and MUL_MAT_ID

void ggml_cpu_aaac_mul_mat_reference(const ggml_compute_params * params, ggml_tensor * dst); // MUL_MAT and MUL_MAT_ID
void ggml_cpu_aaac_get_rows(const ggml_compute_params * params, ggml_tensor * dst);
void ggml_cpu_aaac_cpy(const ggml_compute_params * params, ggml_tensor * dst);
