#pragma once

// The initialiser of test-backend-ops for AAAC tensors. ggml cannot quantize to these types, so their tests start from
// random blocks and codebooks.

#include "ggml.h"
#include "ggml-aaac.h"
#include "ggml-backend.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

// Fill a tensor: two asymmetric codebooks, any m, every index and both selectors. The scales are within 4 octaves, so
// that no group is so large that the others do not count.
static void init_tensor_aaac(ggml_tensor * tensor) {
    if (tensor->view_src) {
        return; // the tensor that it views is in the same context, and is filled itself
    }
    static std::mt19937 rng(std::random_device{}());
    const auto random = [](int below) { return (int) (rng() % below); };

    int8_t codebooks[32];
    for (int book = 0; book < 2; ++book) {
        // 16 of the 255 levels in ascending order
        for (int level = -127, chosen = 0; chosen < 16; ++level) {
            if (random(128 - level) < 16 - chosen) {
                codebooks[16*book + chosen++] = (int8_t) level;
            }
        }
    }
    const int m         = 2 + random(4);
    const int max_code  = tensor->type == GGML_TYPE_AAAC4_G32 ? 63 : 127;
    const int max_used  = std::min(max_code, 4 << m);
    const float d       = 1.0f/(127.0f*exp2f((float) max_used/(1 << m))); // weights up to about 1
    const auto code     = [&]() { return (uint8_t) (random(50) == 0 ? 0 : 1 + random(max_used)); };
    const auto selector = [&](int bit) { return (uint8_t) (random(2) << bit); };

    std::vector<uint8_t> data(ggml_nbytes(tensor));
    for (auto & byte : data) {
        byte = (uint8_t) rng();
    }
    const size_t block_size = ggml_type_size(tensor->type);
    for (size_t i = 0; i < data.size(); i += block_size) {
        switch (tensor->type) {
            case GGML_TYPE_AAAC4_G16:
                for (int j = 0; j < 4; ++j) { data[i + j] = selector(7) | code(); }
                break;
            case GGML_TYPE_AAAC4_G32:
                for (int j = 0; j < 2; ++j) { data[i + j] = selector(7) | selector(6) | code(); }
                break;
            default:
                data[i] = code();
                break;
        }
    }
    ggml_aaac_set_params(tensor, codebooks, d, (uint8_t) m);
    ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
}
