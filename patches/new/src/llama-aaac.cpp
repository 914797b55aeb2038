#include "llama-aaac.h"

#include "llama-impl.h"
#include "llama-model-loader.h"

#include "ggml-aaac.h"

#include <stdexcept>
#include <vector>

static constexpr uint32_t AAAC_FORMAT_VERSION = 1;
static constexpr size_t   AAAC_N_VALUES       = 32; // codebook levels per tensor

static const char * const KEY_VERSION       = "aaac.format_version";
static const char * const KEY_TENSOR_NAMES  = "aaac.tensor_names";
static const char * const KEY_CODEBOOKS     = "aaac.codebooks";
static const char * const KEY_SCALE_BASE    = "aaac.scale_base";
static const char * const KEY_MANTISSA_BITS = "aaac.scale_mantissa_bits";

// Return the index of an array key. Throw if it does not have this element type and length.
static int64_t find_array(const gguf_context * ctx, const char * key, gguf_type type, size_t n) {
    const int64_t id = gguf_find_key(ctx, key);
    if (id < 0) {
        throw std::runtime_error(format("%s is missing", key));
    }
    if (gguf_get_kv_type(ctx, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(ctx, id) != type) {
        throw std::runtime_error(format("%s is not an array of %s", key, gguf_type_name(type)));
    }
    if (gguf_get_arr_n(ctx, id) != n) {
        throw std::runtime_error(format("%s has %zu values, expected %zu for the tensors that %s lists",
            key, gguf_get_arr_n(ctx, id), n, KEY_TENSOR_NAMES));
    }
    return id;
}

void llama_aaac::read(const gguf_context * metadata) {
    const int64_t id_version = gguf_find_key(metadata, KEY_VERSION);
    if (id_version < 0) {
        return; // a model without AAAC tensors. If it has some, set_params throws
    }
    if (gguf_get_kv_type(metadata, id_version) != GGUF_TYPE_UINT32
            || gguf_get_val_u32(metadata, id_version) != AAAC_FORMAT_VERSION) {
        throw std::runtime_error(format("%s is %s, this build reads %u",
            KEY_VERSION, gguf_kv_to_str(metadata, id_version).c_str(), AAAC_FORMAT_VERSION));
    }

    const int64_t id_names = gguf_find_key(metadata, KEY_TENSOR_NAMES);
    if (id_names < 0 || gguf_get_kv_type(metadata, id_names) != GGUF_TYPE_ARRAY
            || gguf_get_arr_type(metadata, id_names) != GGUF_TYPE_STRING) {
        throw std::runtime_error(format("%s is missing or not an array of strings", KEY_TENSOR_NAMES));
    }
    const size_t n = gguf_get_arr_n(metadata, id_names);

    const auto array = [&](const char * key, gguf_type type, size_t n_values) {
        return gguf_get_arr_data(metadata, find_array(metadata, key, type, n_values));
    };
    const auto * codebooks = (const int8_t  *) array(KEY_CODEBOOKS,     GGUF_TYPE_INT8,    n*AAAC_N_VALUES);
    const auto * d         = (const float   *) array(KEY_SCALE_BASE,    GGUF_TYPE_FLOAT32, n);
    const auto * m         = (const uint8_t *) array(KEY_MANTISSA_BITS, GGUF_TYPE_UINT8,   n);

    for (size_t i = 0; i < n; ++i) {
        const std::string name = gguf_get_arr_str(metadata, id_names, i);
        llama_aaac_params p;
        memcpy(p.codebooks.data(), codebooks + i*AAAC_N_VALUES, AAAC_N_VALUES);
        p.d = d[i];
        p.m = m[i];
        if (const char * error = ggml_aaac_params_error(p.codebooks.data(), p.d, p.m)) {
            throw std::runtime_error(format("AAAC parameters of tensor '%s': %s", name.c_str(), error));
        }
        if (!tensors.emplace(name, p).second) {
            throw std::runtime_error(format("%s lists tensor '%s' twice", KEY_TENSOR_NAMES, name.c_str()));
        }
    }
}

void llama_aaac::set_params(ggml_tensor * weight, const std::string & name) const {
    if (!ggml_is_aaac(weight->type)) {
        return;
    }
    const auto it = tensors.find(name);
    if (it == tensors.end()) {
        throw std::runtime_error(format("tensor '%s' is %s, but %s does not list it",
            name.c_str(), ggml_type_name(weight->type), KEY_TENSOR_NAMES));
    }
    ggml_aaac_set_params(weight, it->second.codebooks.data(), it->second.d, it->second.m);
}

void llama_aaac_check_quantize(const llama_model_loader & ml, const llama_model_quantize_params * params) {
    bool makes_aaac = ggml_is_aaac(params->output_tensor_type) || ggml_is_aaac(params->token_embedding_type);
    for (const auto * o = params->tt_overrides; o && o->pattern; ++o) {
        makes_aaac = makes_aaac || ggml_is_aaac(o->type);
    }
    if (makes_aaac) {
        throw std::runtime_error(
            "AAAC types cannot be made here, their codebooks are fitted to each tensor: use aaac-gguf convert");
    }
    if (params->only_copy && !params->prune_layers) {
        return; // data and metadata are copied as they are
    }
    for (const auto & it : ml.weights_map) {
        if (ggml_is_aaac(it.second.tensor->type)) {
            throw std::runtime_error(format("tensor '%s' is %s, which can only be copied here: quantize from the "
                "full-precision model, or from the output of aaac-gguf dequantize",
                it.first.c_str(), ggml_type_name(it.second.tensor->type)));
        }
    }
}

// Append values to an array key, which need not exist yet.
template <typename T>
static void append_array(gguf_context * ctx, const char * key, gguf_type type, const T * values, size_t n) {
    std::vector<T> all;
    const int64_t id = gguf_find_key(ctx, key);
    if (id >= 0) {
        const T * old = (const T *) gguf_get_arr_data(ctx, id);
        all.assign(old, old + gguf_get_arr_n(ctx, id));
    }
    all.insert(all.end(), values, values + n);
    gguf_set_arr_data(ctx, key, type, all.data(), all.size());
}

void llama_aaac_save_params(gguf_context * ctx, const ggml_tensor * weight) {
    if (!ggml_is_aaac(weight->type)) {
        return;
    }
    llama_aaac_params p;
    ggml_aaac_read_params(weight, p.codebooks.data(), &p.d, &p.m);

    std::vector<std::string> names;
    const int64_t id = gguf_find_key(ctx, KEY_TENSOR_NAMES);
    for (size_t i = 0; id >= 0 && i < gguf_get_arr_n(ctx, id); ++i) {
        names.push_back(gguf_get_arr_str(ctx, id, i));
    }
    names.push_back(weight->name);
    std::vector<const char *> pointers;
    for (const auto & name : names) {
        pointers.push_back(name.c_str());
    }

    gguf_set_val_u32(ctx, KEY_VERSION, AAAC_FORMAT_VERSION);
    gguf_set_arr_str(ctx, KEY_TENSOR_NAMES, pointers.data(), pointers.size());
    append_array(ctx, KEY_CODEBOOKS,     GGUF_TYPE_INT8,    p.codebooks.data(), AAAC_N_VALUES);
    append_array(ctx, KEY_SCALE_BASE,    GGUF_TYPE_FLOAT32, &p.d, 1);
    append_array(ctx, KEY_MANTISSA_BITS, GGUF_TYPE_UINT8,   &p.m, 1);
}
