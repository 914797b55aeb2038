#pragma once

#include "ggml.h"

#include <cstddef>

struct ggml_compute_params;

// The CPU backend's operations on AAAC weights: those that ggml_aaac_supports_op names.
// They do not go through ggml's vec_dot, which sees two rows and no tensor, so it cannot find the codebooks.

// Compute op. Return false, and do nothing, if op has nothing to do with AAAC.
bool ggml_cpu_aaac_compute_forward(ggml_compute_params * params, ggml_tensor * op);

// Set size to the bytes of the work buffer that op needs. Return false, and do nothing, if op has nothing to do with
// AAAC.
bool ggml_cpu_aaac_work_size(int n_threads, const ggml_tensor * op, size_t * size);
