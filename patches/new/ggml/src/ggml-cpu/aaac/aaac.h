#pragma once

#include "ggml.h"

#include <cstddef>

struct ggml_compute_params;

// The CPU backend's operations on AAAC weights: MUL_MAT, MUL_MAT_ID, GET_ROWS and CPY to F32, F16 and BF16.
// They do not go through ggml's vec_dot: it sees two rows and no tensor, so it has no codebook.

// the op reads or writes an AAAC tensor, views of one excepted
bool ggml_cpu_aaac_uses(const ggml_tensor * op);

bool ggml_cpu_aaac_supports_op(const ggml_tensor * op);

// both return false for an op that has nothing to do with AAAC
bool ggml_cpu_aaac_compute_forward(ggml_compute_params * params, ggml_tensor * op);
bool ggml_cpu_aaac_work_size(int n_threads, const ggml_tensor * op, size_t * size);
