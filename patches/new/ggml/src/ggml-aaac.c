#include "ggml-aaac.h"

#include "aaac_decode.cuh"
#include "ggml-impl.h"

#include <float.h>

static_assert(sizeof(block_aaac4_g16)  == 36, "wrong AAAC4_G16 block size/padding");
static_assert(sizeof(block_aaac4_g32)  == 34, "wrong AAAC4_G32 block size/padding");
static_assert(sizeof(block_aaac4_g128) == 66, "wrong AAAC4_G128 block size/padding");
static_assert(sizeof(aaac_params) <= GGML_MAX_OP_PARAMS, "the parameters must fit the op_params of a weight");

bool ggml_is_aaac(enum ggml_type type) {
    return type == GGML_TYPE_AAAC4_G16 || type == GGML_TYPE_AAAC4_G32 || type == GGML_TYPE_AAAC4_G128;
}

const char * ggml_aaac_params_error(const int8_t * codebooks, float d, uint8_t m) {
    for (int i = 0; i < AAAC_N_CODEBOOKS*AAAC_N_LEVELS; ++i) {
        if (codebooks[i] < -127) {
            return "a codebook level is below -127";
        }
        if (i % AAAC_N_LEVELS > 0 && codebooks[i] <= codebooks[i - 1]) {
            return "a codebook is not strictly ascending";
        }
    }
    if (m < 2 || m > 5) {
        return "scale mantissa bits are not 2, 3, 4 or 5";
    }
    // The largest weight must be finite for every scale code. The comparison is false for a NaN too.
    if (!(d > 0.0f && (double) d * (double) aaac_scale_factor(127, m) * 127.0 <= (double) FLT_MAX)) {
        return "the scale base is not positive, or not finite, or overflows";
    }
    return NULL;
}

void ggml_aaac_set_params(struct ggml_tensor * weight, const int8_t * codebooks, float d, uint8_t m) {
    GGML_ASSERT(ggml_is_aaac(weight->type) && weight->op == GGML_OP_NONE && weight->view_src == NULL);
    aaac_params params;
    memset(&params, 0, sizeof(params)); // the padding too, because op_params are compared and hashed as bytes (RPC)
    memcpy(params.codebooks, codebooks, sizeof(params.codebooks));
    params.d = d;
    params.m = m;
    memcpy(weight->op_params, &params, sizeof(params));
}

const struct aaac_params * ggml_aaac_get_params(const struct ggml_tensor * weight) {
    const struct ggml_tensor * leaf = weight->view_src ? weight->view_src : weight;
    const aaac_params * params = (const aaac_params *) leaf->op_params;
    if (params->m < 2 || params->m > 5) {
        // A copy of a weight that was made without ggml_aaac_copy_params would give wrong results in silence.
        GGML_ABORT("tensor %s: type %s without codebooks", weight->name, ggml_type_name(weight->type));
    }
    return params;
}

void ggml_aaac_read_params(const struct ggml_tensor * weight, int8_t * codebooks, float * d, uint8_t * m) {
    const aaac_params * params = ggml_aaac_get_params(weight);
    memcpy(codebooks, params->codebooks, sizeof(params->codebooks));
    *d = params->d;
    *m = params->m;
}

void ggml_aaac_copy_params(struct ggml_tensor * dst, const struct ggml_tensor * src) {
    if (ggml_is_aaac(src->type)) {
        const struct ggml_tensor * leaf = src->view_src ? src->view_src : src;
        memcpy(dst->op_params, leaf->op_params, sizeof(dst->op_params));
    }
}

// Decode blocks of one type. The types differ only in the accessors of their blocks.
#define AAAC_DEQUANTIZE(NAME, QK)                                        \
    do {                                                                 \
        const block_##NAME * x = (const block_##NAME *) data;            \
        for (int64_t ib = 0; ib < n / (QK); ++ib) {                      \
            for (int i = 0; i < (QK); ++i) {                             \
                y[ib*(QK) + i] = NAME##_weight(params, &x[ib], i);       \
            }                                                            \
        }                                                                \
    } while (0)

void ggml_aaac_dequantize_row(
        enum ggml_type type, const struct aaac_params * params, const void * data, float * y, int64_t n) {
    GGML_ASSERT(n % ggml_blck_size(type) == 0);
    switch (type) {
        case GGML_TYPE_AAAC4_G16:  AAAC_DEQUANTIZE(aaac4_g16,  QK_AAAC4_G16);  break;
        case GGML_TYPE_AAAC4_G32:  AAAC_DEQUANTIZE(aaac4_g32,  QK_AAAC4_G32);  break;
        case GGML_TYPE_AAAC4_G128: AAAC_DEQUANTIZE(aaac4_g128, QK_AAAC4_G128); break;
        default: GGML_ABORT("%s: type %s", __func__, ggml_type_name(type));
    }
}

bool ggml_aaac_validate_blocks(enum ggml_type type, const void * data, size_t n_blocks) {
    if (type != GGML_TYPE_AAAC4_G128) {
        return true; // every bit of the other two layouts has a meaning
    }
    const block_aaac4_g128 * x = (const block_aaac4_g128 *) data;
    for (size_t ib = 0; ib < n_blocks; ++ib) {
        if (x[ib].s > 0x7F) {
            fprintf(stderr, "ggml_validate_row_data: scale code above 127 at block %zu of type %s\n",
                    ib, ggml_type_name(type));
            return false;
        }
    }
    return true;
}

// Return whether op or one of its sources is an AAAC tensor.
static bool touches_aaac(const struct ggml_tensor * op) {
    if (ggml_is_aaac(op->type)) {
        return true;
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) { // a source may be missing before one that is there
        if (op->src[i] && ggml_is_aaac(op->src[i]->type)) {
            return true;
        }
    }
    return false;
}

bool ggml_aaac_uses(const struct ggml_tensor * op) {
    return !ggml_op_is_empty(op->op) && touches_aaac(op);
}

bool ggml_aaac_supports_op(const struct ggml_tensor * op) {
    const struct ggml_tensor * src0 = op->src[0];
    const struct ggml_tensor * src1 = op->src[1];
    if (!src0 || !ggml_is_aaac(src0->type) || src0->nb[0] != ggml_type_size(src0->type)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float);
        case GGML_OP_GET_ROWS:
            return op->type == GGML_TYPE_F32;
        case GGML_OP_CPY:
            return op->type == GGML_TYPE_F32 || op->type == GGML_TYPE_F16 || op->type == GGML_TYPE_BF16;
        default:
            return false;
    }
}

bool ggml_aaac_refuses(const char * reg_name, const struct ggml_tensor * op) {
    // a view counts here: its data is in the memory of a backend, which must know the type
    if (!touches_aaac(op)) {
        return false;
    }
    // These decide for themselves, operation by operation. RPC passes op_params on to a backend that does.
    static const char * const aware[] = { "CPU", "CUDA", "ROCm", "MUSA", "Vulkan", "RPC" };
    for (size_t i = 0; i < sizeof(aware)/sizeof(aware[0]); ++i) {
        if (strncmp(reg_name, aware[i], strlen(aware[i])) == 0) { // an RPC server adds its address
            return false;
        }
    }
    return true;
}
