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

// The aaac.* metadata of a model: what decodes each AAAC tensor beside its blocks. It lives in the first file of a split model.
class llama_aaac {
public:
    // throws std::runtime_error if the metadata is not what the format allows; does nothing for a model that has none
    void read(const gguf_context * metadata);

    // to be called on every weight as it is made: gives AAAC tensors their codebooks, throws if there are none for it
    void set_params(ggml_tensor * weight, const std::string & name) const;

private:
    std::unordered_map<std::string, llama_aaac_params> tensors;
};

// throws if llama-quantize is asked for what it cannot do with AAAC tensors: to read their values, to rename them or to make new ones
void llama_aaac_check_quantize(const llama_model_loader & ml, const llama_model_quantize_params * params);

// adds the codebooks of one tensor to the metadata of a file that is being written; does nothing for other types
void llama_aaac_save_params(gguf_context * ctx, const ggml_tensor * weight);
