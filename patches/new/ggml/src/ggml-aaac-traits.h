#pragma once

#include "aaac_decode.cuh"
#include "ggml-aaac.h"

// The rows of ggml.c's table of types. They have no to_float and no from_float, because a block cannot be decoded
// without the codebooks of its tensor. Generic code that finds a null pointer there says that it cannot convert the
// type.
#define GGML_AAAC_TYPE_TRAITS                                  \
    [GGML_TYPE_AAAC4_G16] = {                                  \
        .type_name                = "aaac4_g16",               \
        .blck_size                = QK_AAAC4_G16,              \
        .type_size                = sizeof(block_aaac4_g16),   \
        .is_quantized             = true,                      \
    },                                                         \
    [GGML_TYPE_AAAC4_G32] = {                                  \
        .type_name                = "aaac4_g32",               \
        .blck_size                = QK_AAAC4_G32,              \
        .type_size                = sizeof(block_aaac4_g32),   \
        .is_quantized             = true,                      \
    },                                                         \
    [GGML_TYPE_AAAC4_G128] = {                                 \
        .type_name                = "aaac4_g128",              \
        .blck_size                = QK_AAAC4_G128,             \
        .type_size                = sizeof(block_aaac4_g128),  \
        .is_quantized             = true,                      \
    },
