#pragma once

// The helpers that aaac.cu and aaac-decode.cu share.

#include "aaac.cuh"
#include "aaac_device.cuh"

// Call f with the struct of a type, which says how to read its blocks.
template <class F>
static void with_type(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_AAAC4_G16:  f(aaac_g16{});  break;
        case GGML_TYPE_AAAC4_G32:  f(aaac_g32{});  break;
        case GGML_TYPE_AAAC4_G128: f(aaac_g128{}); break;
        default: GGML_ABORT("%s: type %s", __func__, ggml_type_name(type));
    }
}

static unsigned ceil_div(int64_t a, int64_t b) {
    return (unsigned) ((a + b - 1)/b);
}

// Abort if p is not aligned as the loads of 16 bytes need it.
static void check_aligned(const void * p) {
    GGML_ASSERT((uintptr_t) p % 16 == 0);
}

void ggml_cuda_aaac_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void ggml_cuda_aaac_cpy(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
