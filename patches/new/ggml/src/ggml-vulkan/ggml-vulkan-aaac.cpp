#include "ggml-vulkan-aaac.h"

#include "ggml-vulkan-common.h"

// Threads of a workgroup, and rows that one takes in a product. Not tuned: no GPU has run this yet.
static constexpr uint32_t AAAC_THREADS = 64;
static constexpr uint32_t AAAC_ROWS    = 2;

// What decodes a tensor besides its blocks. All push constants begin with it.
struct vk_aaac_params {
    int8_t   codebooks[32];
    float    d;
    uint32_t m;
};

struct vk_aaac_decode_push_constants {
    vk_aaac_params params;
    uint32_t row_words, n_words;
    uint32_t ne1, ne2;
    uint32_t a_offset, a_stride1, a_stride2, a_stride3;
    uint32_t d_offset;
    uint32_t ids_offset, ids_stride0, ids_stride1, ids_stride2;
};

struct vk_aaac_mul_mat_vec_push_constants {
    vk_aaac_params params;
    uint32_t k, n_rows, n_cols;
    uint32_t a_offset, a_stride1, a_stride2, a_stride3;
    uint32_t b_offset, b_stride1, b_stride2, b_stride3;
    uint32_t d_offset, d_stride1, d_stride2, d_stride3;
    uint32_t last[3]; // MUL_MAT: ne12, r2, r3. MUL_MAT_ID: offset and strides of ids
};

static_assert(sizeof(vk_aaac_decode_push_constants) <= 128, "more push constants than every device has");
static_assert(sizeof(vk_aaac_mul_mat_vec_push_constants) <= 128, "more push constants than every device has");

static uint32_t type_index(ggml_type type) {
    return type - GGML_TYPE_AAAC4_G16;
}

static uint32_t dst_index(ggml_type type) {
    return type == GGML_TYPE_F32 ? 0 : type == GGML_TYPE_F16 ? 1 : 2;
}

void ggml_vk_aaac_load_shaders(vk_device & device, const ggml_vk_aaac_create_pipeline & create_pipeline) {
    const auto create = [&](vk_pipeline & pipeline, const char * name, uint64_t size, const void * data,
                            uint32_t n_buffers, size_t constants_size, const std::vector<uint32_t> & specialization) {
        create_pipeline(device, pipeline, name, size, data, "main", n_buffers, (uint32_t) constants_size, {1, 1, 1},
                        specialization, 1, true, false, 0);
    };
#define CREATE(PIPELINE, NAME, N_BUFFERS, CONSTANTS, ...) \
    create(device->PIPELINE, #NAME, NAME##_len, NAME##_data, N_BUFFERS, sizeof(CONSTANTS), __VA_ARGS__)
#define CREATE_TYPE(NAME, TYPE)                                                                                       \
    CREATE(pipeline_aaac_decode[TYPE][0], NAME##_decode_f32,  2, vk_aaac_decode_push_constants, {});                  \
    CREATE(pipeline_aaac_decode[TYPE][1], NAME##_decode_f16,  2, vk_aaac_decode_push_constants, {});                  \
    CREATE(pipeline_aaac_decode[TYPE][2], NAME##_decode_bf16, 2, vk_aaac_decode_push_constants, {});                  \
    CREATE(pipeline_aaac_get_rows[TYPE],  NAME##_get_rows,    3, vk_aaac_decode_push_constants, {});                  \
    for (uint32_t n = 1; n <= mul_mat_vec_max_cols; ++n) {                                                            \
        CREATE(pipeline_aaac_mul_mat_vec[TYPE][n - 1], NAME##_mul_mat_vec, 3, vk_aaac_mul_mat_vec_push_constants,     \
               {AAAC_THREADS, n, AAAC_ROWS});                                                                         \
        CREATE(pipeline_aaac_mul_mat_vec_q8_1[TYPE][n - 1], NAME##_mul_mat_vec_q8_1, 3,                               \
               vk_aaac_mul_mat_vec_push_constants, {AAAC_THREADS, n, AAAC_ROWS});                                     \
    }                                                                                                                 \
    CREATE(pipeline_aaac_mul_mat_vec_id[TYPE], NAME##_mul_mat_vec_id, 4, vk_aaac_mul_mat_vec_push_constants,          \
           {AAAC_THREADS, 1, AAAC_ROWS})
    CREATE_TYPE(aaac4_g16, 0);
    CREATE_TYPE(aaac4_g32, 1);
    CREATE_TYPE(aaac4_g128, 2);
#undef CREATE_TYPE
#undef CREATE
}

// Return whether rows of floats may be read in vectors of 4.
static bool is_float4(const ggml_tensor * t) {
    return t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0 && t->nb[3] % 16 == 0 && t->view_offs % 16 == 0;
}

bool ggml_vk_aaac_supports_op(const vk_device & device, const ggml_tensor * op) {
    if (!ggml_aaac_supports_op(op) || !ggml_is_contiguous(op)) {
        return false;
    }
    const ggml_tensor * src0 = op->src[0];
    const ggml_tensor * src1 = op->src[1];
    const auto & max_groups = device->properties.limits.maxComputeWorkGroupCount;
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            return is_float4(src1) && op->ne[2]*op->ne[3] <= max_groups[2]
                && CEIL_DIV(op->ne[1], mul_mat_vec_max_cols) <= max_groups[1];
        case GGML_OP_MUL_MAT_ID:
            return is_float4(src1) && src0->ne[3] == 1 && CEIL_DIV(op->ne[0], AAAC_ROWS) <= max_groups[0]
                && op->ne[1] <= max_groups[1] && op->ne[2] <= max_groups[2];
        case GGML_OP_GET_ROWS:
            return is_float4(op) && src1->type == GGML_TYPE_I32;
        default:
            return op->view_offs % (4*ggml_type_size(op->type)) == 0;
    }
}

// Return whether a product has so many columns that decoding the weights first costs less: it writes and reads 4 bytes a
// weight, where a pass of ours over 8 columns, or over one column of an expert, reads 0.6. ggml's own limit is 8, too.
static bool is_wide(const ggml_tensor * product) {
    if (product->op == GGML_OP_MUL_MAT) {
        return product->ne[1] > mul_mat_vec_max_cols;
    }
    return product->ne[2] > mul_mat_vec_max_cols && product->ne[1]*product->ne[2] > 2*product->src[0]->ne[2];
}

bool ggml_vk_aaac_computes(const vk_device & device, const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return true;
    }
    const ggml_tensor * weight = op->src[0];
    const size_t fp16_size = ggml_nelements(weight)*sizeof(ggml_fp16_t);
    return !is_wide(op) || !ggml_vk_dim01_contiguous(weight) || fp16_size > device->properties.limits.maxStorageBufferRange;
}

static vk_aaac_params params_of(const ggml_tensor * weight) {
    vk_aaac_params params;
    uint8_t m;
    ggml_aaac_read_params(weight, params.codebooks, &params.d, &m);
    params.m = m;
    return params;
}

// The bytes that our shaders read at a time of a block: those of AAAC4_G16 are multiples of 4, the others of 2.
static uint32_t element_size(ggml_type type) {
    return type == GGML_TYPE_AAAC4_G16 ? 4 : 2;
}

// Return the offset of a tensor in what ggml_vk_tensor_subbuffer binds, in elements of so many bytes.
static uint32_t offset_of(const ggml_backend_vk_context * ctx, const ggml_tensor * t, uint32_t size) {
    const uint32_t bytes = get_misalign_bytes(ctx, t);
    GGML_ASSERT(bytes % size == 0);
    return bytes/size;
}

static vk_subbuffer buffer_of(const ggml_backend_vk_context * ctx, const ggml_tensor * t) {
    return ggml_vk_tensor_subbuffer(ctx, t, true);
}

static uint32_t stride(const ggml_tensor * t, int dim, uint32_t size) {
    return (uint32_t) (t->nb[dim]/size);
}

// Decode src0 to values of a type, contiguous in d, or the rows of it that ids name.
static void decode(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * src0, const ggml_tensor * ids,
                   ggml_type type, const vk_subbuffer & d, uint32_t d_offset) {
    const uint32_t size      = element_size(src0->type);
    const uint32_t row_words = (uint32_t) (src0->ne[0]/8);
    const uint32_t n_rows    = (uint32_t) (ids ? ggml_nelements(ids) : ggml_nrows(src0));
    vk_aaac_decode_push_constants pc = {
        params_of(src0), row_words, row_words*n_rows, (uint32_t) src0->ne[1], (uint32_t) src0->ne[2],
        offset_of(ctx, src0, size), stride(src0, 1, size), stride(src0, 2, size), stride(src0, 3, size), d_offset,
        0, 0, 0, 0,
    };
    const uint32_t n_groups = CEIL_DIV(pc.n_words, AAAC_THREADS);
    const uint32_t groups_x = std::min(n_groups, 32768u);
    const std::array<uint32_t, 3> groups = { groups_x, CEIL_DIV(n_groups, groups_x), 1 };
    if (ids) {
        pc.ne1 = (uint32_t) ids->ne[0];
        pc.ne2 = (uint32_t) ids->ne[1];
        pc.ids_offset  = offset_of(ctx, ids, sizeof(int32_t));
        pc.ids_stride0 = stride(ids, 0, sizeof(int32_t));
        pc.ids_stride1 = stride(ids, 1, sizeof(int32_t));
        pc.ids_stride2 = stride(ids, 2, sizeof(int32_t));
        vk_pipeline & pipeline = ctx->device->pipeline_aaac_get_rows[type_index(src0->type)];
        ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
        ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, { buffer_of(ctx, src0), buffer_of(ctx, ids), d }, pc, groups);
    } else {
        vk_pipeline & pipeline = ctx->device->pipeline_aaac_decode[type_index(src0->type)][dst_index(type)];
        ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
        ggml_vk_dispatch_pipeline(ctx, subctx, pipeline, { buffer_of(ctx, src0), d }, pc, groups);
    }
}

vk_pipeline & ggml_vk_aaac_to_fp16_pipeline(vk_device & device, ggml_type type) {
    return device->pipeline_aaac_decode[type_index(type)][dst_index(GGML_TYPE_F16)];
}

void ggml_vk_aaac_to_fp16(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * weight, const vk_subbuffer & d) {
    decode(ctx, subctx, weight, nullptr, GGML_TYPE_F16, d, 0);
    ggml_vk_sync_buffers(ctx, subctx);
}

// Return whether a product is of integers: of activations in blocks of 8 bits, as ggml's own products of few columns have
// them. For one column, which memory limits, the activations stay floats.
static bool is_integer_product(const ggml_backend_vk_context * ctx, const ggml_tensor * product) {
    const ggml_tensor * src1 = product->src[1];
    const vk_device & device = ctx->device;
    if (product->op != GGML_OP_MUL_MAT || !ggml_is_contiguous(src1) || get_misalign_bytes(ctx, src1) != 0) {
        return false;
    }
    return device->mmvq_mode == 1 || (device->mmvq_mode == 0 && device->integer_dot_product && src1->ne[1] > 1);
}

// Quantize activations to blocks of 8 bits, unless the product before this one has done it. Returns where they are.
static vk_subbuffer quantize(ggml_backend_vk_context * ctx, vk_context & subctx, const ggml_tensor * activations) {
    const uint32_t n    = (uint32_t) ggml_nelements(activations);
    const size_t   size = CEIL_DIV(n, 128)*4*ggml_type_size(GGML_TYPE_Q8_1);
    vk_pipeline pipeline = ggml_vk_get_quantize_pipeline(ctx, GGML_TYPE_Q8_1);
    if (ctx->prealloc_size_y < size) {
        ctx->prealloc_size_y = size;
        ggml_vk_preallocate_buffers(ctx, subctx);
    }
    const vk_subbuffer blocks = { ctx->prealloc_y, 0, size };
    if (ctx->prealloc_y_last_pipeline_used != pipeline.get() || ctx->prealloc_y_last_tensor_used != activations
            || ctx->prealloc_y_last_k_padded) {
        if (ctx->prealloc_y_need_sync) {
            ggml_vk_sync_buffers(ctx, subctx);
        }
        ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
        ggml_vk_quantize_q8_1(ctx, subctx, buffer_of(ctx, activations), blocks, n);
        ctx->prealloc_y_last_pipeline_used = pipeline.get();
        ctx->prealloc_y_last_tensor_used   = activations;
        ctx->prealloc_y_last_k_padded      = false;
    }
    ctx->prealloc_y_need_sync = true;
    return blocks;
}

// Multiply with the blocks as they are, in a pass over them for every 8 columns.
static void mul_mat_vec(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];
    const uint32_t size   = element_size(src0->type);
    const uint32_t n_rows = (uint32_t) src0->ne[1];
    const uint32_t n_cols = (uint32_t) src1->ne[1];
    vk_aaac_mul_mat_vec_push_constants pc = {
        params_of(src0), (uint32_t) src0->ne[0], n_rows, n_cols,
        offset_of(ctx, src0, size), stride(src0, 1, size), stride(src0, 2, size), stride(src0, 3, size),
        offset_of(ctx, src1, 16), stride(src1, 1, 16), stride(src1, 2, 16), stride(src1, 3, 16),
        offset_of(ctx, dst, 4), stride(dst, 1, 4), stride(dst, 2, 4), stride(dst, 3, 4), {},
    };
    if (ids) {
        pc.last[0] = offset_of(ctx, ids, sizeof(int32_t));
        pc.last[1] = stride(ids, 0, sizeof(int32_t));
        pc.last[2] = stride(ids, 1, sizeof(int32_t));
        vk_pipeline & pipeline = ctx->device->pipeline_aaac_mul_mat_vec_id[type_index(src0->type)];
        ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
        ggml_vk_dispatch_pipeline(
            ctx, subctx, pipeline,
            { buffer_of(ctx, src0), buffer_of(ctx, src1), buffer_of(ctx, dst), buffer_of(ctx, ids) }, pc,
            { CEIL_DIV(n_rows, AAAC_ROWS), (uint32_t) dst->ne[1], (uint32_t) dst->ne[2] });
        return;
    }
    pc.last[0] = (uint32_t) src1->ne[2];
    pc.last[1] = (uint32_t) (src1->ne[2]/src0->ne[2]);
    pc.last[2] = (uint32_t) (src1->ne[3]/src0->ne[3]);
    const bool     integers = is_integer_product(ctx, dst);
    const uint32_t width    = std::min(n_cols, mul_mat_vec_max_cols);
    vk_pipeline & pipeline = integers ? ctx->device->pipeline_aaac_mul_mat_vec_q8_1[type_index(src0->type)][width - 1]
                                      : ctx->device->pipeline_aaac_mul_mat_vec[type_index(src0->type)][width - 1];
    const vk_subbuffer b = integers ? quantize(ctx, subctx, src1) : buffer_of(ctx, src1);
    const uint32_t max_rows = ctx->device->properties.limits.maxComputeWorkGroupCount[0]*AAAC_ROWS;
    for (uint32_t row = 0; row < n_rows; row += max_rows) {
        pc.n_rows = std::min(max_rows, n_rows - row);
        ggml_pipeline_request_descriptor_sets(ctx, pipeline, 1);
        ggml_vk_dispatch_pipeline(
            ctx, subctx, pipeline, { buffer_of(ctx, src0), b, buffer_of(ctx, dst) }, pc,
            { CEIL_DIV(pc.n_rows, AAAC_ROWS), CEIL_DIV(n_cols, width), (uint32_t) (dst->ne[2]*dst->ne[3]) });
        pc.a_offset += max_rows*pc.a_stride1;
        pc.d_offset += max_rows;
    }
}

void ggml_vk_aaac_compute(ggml_backend_vk_context * ctx, vk_context & subctx, ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            mul_mat_vec(ctx, subctx, op);
            break;
        case GGML_OP_GET_ROWS:
        case GGML_OP_CPY:
            decode(ctx, subctx, op->src[0], op->op == GGML_OP_GET_ROWS ? op->src[1] : nullptr, op->type,
                   buffer_of(ctx, op), offset_of(ctx, op, 4*ggml_type_size(op->type)));
            break;
        default:
            GGML_ABORT("%s: operation %s", __func__, ggml_op_name(op->op));
    }
}
