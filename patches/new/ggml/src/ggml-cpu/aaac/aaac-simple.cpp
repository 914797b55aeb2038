#include "aaac-simple.h"

#include "aaac_decode.cuh"
#include "ggml-aaac.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

static constexpr int MAX_BLOCK = QK_AAAC4_G128; // weights in the largest block

void ggml_cpu_aaac_check_shapes(const ggml_tensor * dst) {
    GGML_ASSERT(ggml_aaac_supports_op(dst));
    GGML_ASSERT(dst->src[0]->ne[0] == dst->src[1]->ne[0]);
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && dst->nb[0] == sizeof(float)); // not transposed
}

void ggml_cpu_aaac_mul_mat_reference(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->op == GGML_OP_MUL_MAT_ID ? dst->src[2] : nullptr;
    const aaac_params * p    = ggml_aaac_get_params(src0);
    ggml_cpu_aaac_check_shapes(dst);

    const int64_t block = ggml_blck_size(src0->type);
    for (int64_t j = params->ith; j < ggml_nrows(dst); j += params->nth) {
        const int64_t i1 = j % dst->ne[1];
        const int64_t i2 = j/dst->ne[1] % dst->ne[2];
        const int64_t i3 = j/dst->ne[1] / dst->ne[2];
        const int64_t i02 = ids ? *(const int32_t *) ((const char *) ids->data + i1*ids->nb[0] + i2*ids->nb[1])
                                : i2/(src1->ne[2]/src0->ne[2]);
        const int64_t i03 = ids ? 0 : i3/(src1->ne[3]/src0->ne[3]);
        const int64_t i11 = ids ? i1 % src1->ne[1] : i1;
        const char * column = (const char *) src1->data + i11*src1->nb[1] + i2*src1->nb[2] + i3*src1->nb[3];
        const float * x = (const float *) column;
        float       * y = (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]);
        for (int64_t row = 0; row < src0->ne[1]; ++row) {
            const char * data = (const char *) src0->data + row*src0->nb[1] + i02*src0->nb[2] + i03*src0->nb[3];
            double sum = 0.0;
            for (int64_t i = 0; i < src0->ne[0]; i += block) {
                float values[MAX_BLOCK];
                ggml_aaac_dequantize_row(src0->type, p, data + i/block*src0->nb[0], values, block);
                for (int64_t l = 0; l < block; ++l) {
                    sum += (double) values[l]*x[i + l];
                }
            }
            y[row] = (float) sum;
        }
    }
}

void ggml_cpu_aaac_get_rows(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const aaac_params * p    = ggml_aaac_get_params(src0);
    GGML_ASSERT(ggml_aaac_supports_op(dst) && dst->nb[0] == sizeof(float));

    for (int64_t j = params->ith; j < ggml_nelements(src1); j += params->nth) {
        const int64_t i10 = j % src1->ne[0];
        const int64_t i11 = j/src1->ne[0] % src1->ne[1];
        const int64_t i12 = j/src1->ne[0] / src1->ne[1];
        const char * id = (const char *) src1->data + i10*src1->nb[0] + i11*src1->nb[1] + i12*src1->nb[2];
        const int64_t i01 = *(const int32_t *) id;
        GGML_ASSERT(i01 >= 0 && i01 < src0->ne[1]);
        const char * row = (const char *) src0->data + i01*src0->nb[1] + i11*src0->nb[2] + i12*src0->nb[3];
        float      * y   = (float *) ((char *) dst->data + i10*dst->nb[1] + i11*dst->nb[2] + i12*dst->nb[3]);
        ggml_aaac_dequantize_row(src0->type, p, row, y, src0->ne[0]);
    }
}

// Return the address of element i of a tensor. Elements are numbered in logical order, whatever the strides.
static char * element(const ggml_tensor * t, int64_t i) {
    const int64_t i0 = i % t->ne[0];
    i /= t->ne[0];
    const int64_t i1 = i % t->ne[1];
    i /= t->ne[1];
    return (char *) t->data + i0/ggml_blck_size(t->type)*t->nb[0] + i1*t->nb[1] + i % t->ne[2]*t->nb[2]
        + i/t->ne[2]*t->nb[3];
}

// Copy the elements in logical order: source and result may have different shapes and strides.
void ggml_cpu_aaac_cpy(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const aaac_params * p    = ggml_aaac_get_params(src0);
    GGML_ASSERT(ggml_aaac_supports_op(dst) && ggml_nelements(dst) == ggml_nelements(src0));

    const int64_t block = ggml_blck_size(src0->type);
    for (int64_t i = params->ith*block; i < ggml_nelements(src0); i += params->nth*block) {
        float values[MAX_BLOCK];
        ggml_aaac_dequantize_row(src0->type, p, element(src0, i), values, block);
        for (int64_t l = 0; l < block; ++l) {
            char * y = element(dst, i + l);
            switch (dst->type) {
                case GGML_TYPE_F32:  *(float       *) y = values[l]; break;
                case GGML_TYPE_F16:  *(ggml_fp16_t *) y = ggml_fp32_to_fp16(values[l]); break;
                case GGML_TYPE_BF16: *(ggml_bf16_t *) y = ggml_fp32_to_bf16(values[l]); break;
                default: GGML_ABORT("%s: type %s", __func__, ggml_type_name(dst->type));
            }
        }
    }
}
