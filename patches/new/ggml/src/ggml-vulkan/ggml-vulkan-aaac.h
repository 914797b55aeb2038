#pragma once

// The Vulkan backend's operations on AAAC weights: those that ggml_aaac_supports_op names.
// The codebooks come from the weight tensor and reach our shaders as push constants. ggml's own shaders multiply only weights
// that ours have decoded.

#include "ggml-aaac.h"
#include "ggml-vulkan-types.h"

// The lambda in ggml_vk_load_shaders that registers a pipeline, which is compiled when an operation first asks for it.
using ggml_vk_aaac_create_pipeline = std::function<void(
    vk_device & device, vk_pipeline & pipeline, const char * name, size_t spv_size, const void * spv_data,
    const char * entrypoint, uint32_t parameter_count, uint32_t push_constant_size, std::array<uint32_t, 3> wg_denoms,
    const std::vector<uint32_t> & specialization_constants, uint32_t align, bool disable_robustness,
    bool require_full_subgroups, uint32_t required_subgroup_size)>;

// Register the pipelines of our shaders.
void ggml_vk_aaac_load_shaders(vk_device & device, const ggml_vk_aaac_create_pipeline & create_pipeline);

// Return whether device can compute op, whose tensors fit its buffers.
bool ggml_vk_aaac_supports_op(const vk_device & device, const ggml_tensor * op);

// Return whether op, one that ggml_vk_aaac_supports_op accepts, is recorded by ggml_vk_aaac_compute. The products with many
// columns are ggml's own instead, of weights that ggml_vk_aaac_to_fp16 decodes first.
bool ggml_vk_aaac_computes(const vk_device & device, const ggml_tensor * op);

// Record op in subctx.
void ggml_vk_aaac_compute(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * op);

// Return the pipeline that decodes a type to halves.
vk_pipeline & ggml_vk_aaac_to_fp16_pipeline(vk_device & device, ggml_type type);

// Record in subctx that all of weight is decoded to halves, contiguous in d, before what follows.
void ggml_vk_aaac_to_fp16(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * weight, const vk_subbuffer & d);
