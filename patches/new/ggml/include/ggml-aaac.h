#pragma once

// AAAC4_G16, AAAC4_G32, AAAC4_G128: 4-bit weights with two learned int8 codebooks per tensor.
//
// The data of a tensor does not hold its codebooks, its scale base d and its mantissa bits m. They are in the op_params
// of the weight, which is a leaf and has no other use for them. Views find them through view_src.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct aaac_params; // ggml/src/aaac_decode.cuh

GGML_API bool ggml_is_aaac(enum ggml_type type);

// Return NULL if the parameters may be used, else a text that says what is wrong with them.
GGML_API const char * ggml_aaac_params_error(const int8_t * codebooks, float d, uint8_t m);

// Give a weight its parameters. codebooks: 32 values, first codebook first.
GGML_API void ggml_aaac_set_params(struct ggml_tensor * weight, const int8_t * codebooks, float d, uint8_t m);

// Return the parameters of a weight or of a view of one. Abort with the tensor's name if nobody has set them.
GGML_API const struct aaac_params * ggml_aaac_get_params(const struct ggml_tensor * weight);

// Copy the parameters of a weight to plain values, for code that does not know struct aaac_params. codebooks gets 32.
GGML_API void ggml_aaac_read_params(const struct ggml_tensor * weight, int8_t * codebooks, float * d, uint8_t * m);

// Copy the parameters of src to its duplicate dst, because ggml_dup_tensor keeps no op_params.
// Does nothing for other types.
GGML_API void ggml_aaac_copy_params(struct ggml_tensor * dst, const struct ggml_tensor * src);

// Decode n weights, a multiple of the block, from data to y.
GGML_API void ggml_aaac_dequantize_row(
        enum ggml_type type, const struct aaac_params * params, const void * data, float * y, int64_t n);

// Return whether the blocks hold no bits that the layout does not define. Print the first block that does.
GGML_API bool ggml_aaac_validate_blocks(enum ggml_type type, const void * data, size_t n_blocks);

// Return whether op reads or writes an AAAC tensor, so that a backend must run our code for it.
// False for the operations that only make a view, because ggml's own code is right for them.
GGML_API bool ggml_aaac_uses(const struct ggml_tensor * op);

// Return whether op is one that a backend can offer for an AAAC weight: MUL_MAT and MUL_MAT_ID with F32 activations,
// GET_ROWS to F32, CPY to F32, F16 and BF16. A backend may have further conditions.
GGML_API bool ggml_aaac_supports_op(const struct ggml_tensor * op);

// Return whether op or a source of it is an AAAC tensor and the backend of this name (ggml_backend_reg_name) does not
// know the types. Such a backend must not be asked: some say yes to every type.
GGML_API bool ggml_aaac_refuses(const char * reg_name, const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
