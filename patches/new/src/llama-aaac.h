#pragma once

#include "llama.h"

#include "gguf.h"

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>

struct llama_model_loader;

struct llama_aaac_params {
    std::array<int8_t, 32> codebooks;
    float                  d;
    uint8_t                m;
};

// The aaac.* metadata of a model: the parameters of each AAAC tensor. The first file of a split model holds it.
class llama_aaac {
public:
    // Read and check the metadata. Does nothing for a model that has none.
    // Throw std::runtime_error if it is not what the format allows.
    void read(const gguf_context * metadata);

    // Give a weight its parameters, if it is an AAAC tensor. Throw std::runtime_error if the metadata does not list it.
    // To be called on every weight when it is made.
    void set_params(ggml_tensor * weight, const std::string & name) const;

private:
    std::unordered_map<std::string, llama_aaac_params> tensors;
};

// Throw std::runtime_error if llama-quantize is asked for what it cannot do with AAAC tensors: to read their values, to
// rename them or to make new ones.
void llama_aaac_check_quantize(const llama_model_loader & ml, const llama_model_quantize_params * params);

// Add the parameters of one tensor to the metadata of a file that is being written. Does nothing for other types.
void llama_aaac_save_params(gguf_context * ctx, const ggml_tensor * weight);
