#pragma once

// AAAC4_G16, AAAC4_G32, AAAC4_G128: 4-bit weights with two learned int8 codebooks per tensor.
//
// The codebooks, the scale base d and the mantissa bits m of a tensor are not in its data: they lie in the op_params of the weight, which is
// a leaf and has no use for them. Views find them through view_src. A backend reads them with ggml_aaac_get_params(src0).

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct aaac_params; // ggml/src/aaac_decode.cuh

GGML_API bool ggml_is_aaac(enum ggml_type type);

// NULL if the parameters may be used, else what is wrong with them
GGML_API const char * ggml_aaac_params_error(const int8_t * codebooks, float d, uint8_t m);

// codebooks: 32 values, first codebook first
GGML_API void ggml_aaac_set_params(struct ggml_tensor * weight, const int8_t * codebooks, float d, uint8_t m);

// aborts with a message that names the tensor if nobody has set them
GGML_API const struct aaac_params * ggml_aaac_get_params(const struct ggml_tensor * weight);

// the same, as plain values: codebooks gets 32
GGML_API void ggml_aaac_read_params(const struct ggml_tensor * weight, int8_t * codebooks, float * d, uint8_t * m);

// for code that duplicates a weight: ggml_dup_tensor keeps no op_params. Does nothing for other types
GGML_API void ggml_aaac_copy_params(struct ggml_tensor * dst, const struct ggml_tensor * src);

// n weights (whole blocks) at data to float
GGML_API void ggml_aaac_dequantize_row(enum ggml_type type, const struct aaac_params * params, const void * data, float * y, int64_t n);

// blocks hold no bits that the layout does not define
GGML_API bool ggml_aaac_validate_blocks(enum ggml_type type, const void * data, size_t n_blocks);

// op touches an AAAC tensor and the backend of that name (ggml_backend_reg_name) has never heard of them. Some say yes to every type
GGML_API bool ggml_aaac_refuses(const char * reg_name, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
