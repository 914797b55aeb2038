#include "aaac.h"
#include "aaac-simple.h"

#include "ggml-aaac.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "kernels.h"

#include <algorithm>
#include <utility>

static constexpr int64_t MIN_CHUNK_ROWS = 32;
static_assert(MIN_CHUNK_ROWS % aaac::TILE_ROWS == 0, "chunks are whole tiles");

// Return how many rows a thread takes at a time: few enough to balance the threads, and many enough that each thread
// reads long stretches of memory.
static int64_t rows_per_chunk(int64_t n_rows, int n_threads) {
    return std::max(MIN_CHUNK_ROWS, n_rows/(8*n_threads)/MIN_CHUNK_ROWS*MIN_CHUNK_ROWS);
}

static size_t pad64(size_t n) {
    return (n + 63)/64*64;
}

//
// matrix products
//

// One column of the product.
struct column {
    const char * act; // its quantized activations
    float      * dst; // its results
};

// The columns that MUL_MAT multiplies by one matrix of src0, numbered from 0.
struct mul_mat_columns {
    const ggml_tensor * dst;
    const char        * acts;
    size_t              act_size;
    int64_t             i02, i03, r2, r3; // r2, r3: how many src1 matrices share this one

    int64_t count() const { return dst->src[1]->ne[1]*r2*r3; }

    column operator()(int64_t j) const {
        const ggml_tensor * src1 = dst->src[1];
        const int64_t i11 = j % src1->ne[1];
        const int64_t i12 = i02*r2 + j/src1->ne[1] % r2;
        const int64_t i13 = i03*r3 + j/src1->ne[1] / r2;
        return {
            acts + (i11 + src1->ne[1]*(i12 + src1->ne[2]*i13))*act_size,
            (float *) ((char *) dst->data + i11*dst->nb[1] + i12*dst->nb[2] + i13*dst->nb[3]),
        };
    }
};

// A place in ids that picked an expert.
struct expert_use {
    int32_t slot;  // below ids->ne[0]
    int32_t token; // below ids->ne[1]
};

// The columns that MUL_MAT_ID multiplies by the matrix of one expert.
struct mul_mat_id_columns {
    const ggml_tensor * dst;
    const char        * acts;
    size_t              act_size;
    const expert_use  * uses;
    int64_t             n_uses;

    int64_t count() const { return n_uses; }

    column operator()(int64_t j) const {
        const int64_t ne11 = dst->src[1]->ne[1];
        return {
            acts + (uses[j].slot % ne11 + uses[j].token*ne11)*act_size,
            (float *) ((char *) dst->data + uses[j].slot*dst->nb[1] + uses[j].token*dst->nb[2]),
        };
    }
};

// Multiply rows [row0, row1) of one src0 matrix by all its columns.
template <class T, class C>
static void mul_rows(const aaac::weights & w, const char * matrix, size_t row_stride, int64_t k,
                     int64_t row0, int64_t row1, const C & columns, void * tile) {
    const int64_t n_cols = columns.count();
    if (n_cols <= aaac::MAX_DOT_COLS) {
        aaac::act_view acts[aaac::MAX_DOT_COLS];
        float * out[aaac::MAX_DOT_COLS];
        for (int64_t j = 0; j < n_cols; ++j) {
            const column c = columns(j);
            acts[j] = aaac::act_view(c.act, k);
            out[j]  = c.dst + row0;
        }
        const int n_rows = (int) (row1 - row0);
        aaac::mul_rows<T>(w, matrix + row0*row_stride, row_stride, n_rows, k, acts, (int) n_cols, out);
        return;
    }

    constexpr int R = aaac::TILE_ROWS;
    constexpr int N = aaac::TILE_COLS;
    for (int64_t row = row0; row < row1; row += R) {
        const int n_rows = (int) std::min<int64_t>(R, row1 - row);
        aaac::decode_tile<T>(w, matrix + row*row_stride, row_stride, n_rows, k, tile);
        for (int64_t j0 = 0; j0 < n_cols; j0 += N) {
            const int n = (int) std::min<int64_t>(N, n_cols - j0);
            aaac::act_view acts[N];
            float * out[N];
            float   partial[N][R]; // results of a tile that ends past the last row
            for (int j = 0; j < n; ++j) {
                const column c = columns(j0 + j);
                acts[j] = aaac::act_view(c.act, k);
                out[j]  = n_rows == R ? c.dst + row : partial[j];
            }
            aaac::mul_tile<T>(tile, k, acts, n, out);
            for (int j = 0; j < n && n_rows < R; ++j) {
                std::copy_n(partial[j], n_rows, columns(j0 + j).dst + row);
            }
        }
    }
}

// Multiply the first n_matrices of a product, a chunk of rows at a time. Each thread takes the next free chunk.
// operands(i) returns the data of matrix i and its columns.
template <class F>
static void mul_matrices(const ggml_compute_params * params, const ggml_tensor * src0, const aaac::weights & w,
                         int64_t n_matrices, const F & operands, void * tile) {
    const int64_t n_rows     = src0->ne[1];
    const int64_t chunk_rows = rows_per_chunk(n_rows, params->nth);
    const int64_t n_chunks   = (n_rows + chunk_rows - 1)/chunk_rows;
    const int64_t end        = n_chunks*n_matrices;
    for (int64_t chunk = params->ith; chunk < end; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const auto    operand = operands(chunk/n_chunks);
        const int64_t row0    = chunk % n_chunks * chunk_rows;
        const int64_t row1    = std::min(row0 + chunk_rows, n_rows);
        const auto run = [&](auto t) {
            mul_rows<decltype(t)>(w, operand.first, src0->nb[1], src0->ne[0], row0, row1, operand.second, tile);
        };
        switch (src0->type) {
            case GGML_TYPE_AAAC4_G16:  run(aaac::g16{});  break;
            case GGML_TYPE_AAAC4_G32:  run(aaac::g32{});  break;
            case GGML_TYPE_AAAC4_G128: run(aaac::g128{}); break;
            default: GGML_ABORT("%s: type %s", __func__, ggml_type_name(src0->type));
        }
    }
}

// The layout of a product's work buffer, which all threads share.
struct work {
    size_t act_size;  // bytes of one quantized column of src1
    size_t tile_size; // bytes of one decoded tile. Each thread has its own
    size_t acts;      // offsets of the parts
    size_t tiles;
    size_t experts;   // MUL_MAT_ID: int32 n_used, starts[n_experts + 1], used[n_experts], then the expert_uses
    size_t total;

    work(const ggml_tensor * op, int n_threads) {
        const ggml_tensor * src0 = op->src[0];
        act_size  = aaac::act_size(src0->ne[0]);
        tile_size = pad64(aaac::tile_size(src0->ne[0]));
        acts      = 0;
        tiles     = acts  + act_size*ggml_nrows(op->src[1]);
        experts   = tiles + tile_size*n_threads;
        total     = experts;
        if (op->op == GGML_OP_MUL_MAT_ID) {
            total += sizeof(int32_t)*(2*src0->ne[2] + 2) + sizeof(expert_use)*ggml_nelements(op->src[2]);
        }
        total += 64; // because wdata need not be aligned
    }
};

static char * align64(void * p) {
    return (char *) (((uintptr_t) p + 63)/64*64);
}

// Quantize src1 to 8 bits. Each thread takes whole columns, or a part of every column if there are few columns.
static void quantize_src1(const ggml_compute_params * params, const ggml_tensor * src1, char * acts, size_t act_size) {
    const int64_t k      = src1->ne[0];
    const int64_t n_cols = ggml_nrows(src1);
    const bool    split  = n_cols < params->nth;
    const int64_t chunks = (k + aaac::CHUNK - 1)/aaac::CHUNK;
    const int64_t from   = split ? chunks*params->ith/params->nth*aaac::CHUNK : 0;
    const int64_t to     = split ? std::min(k, chunks*(params->ith + 1)/params->nth*aaac::CHUNK) : k;
    for (int64_t j = split ? 0 : params->ith; j < n_cols; j += split ? 1 : params->nth) {
        const int64_t i11 = j % src1->ne[1];
        const int64_t i12 = j/src1->ne[1] % src1->ne[2];
        const int64_t i13 = j/src1->ne[1] / src1->ne[2];
        const char * x = (const char *) src1->data + i11*src1->nb[1] + i12*src1->nb[2] + i13*src1->nb[3];
        aaac::quantize_act((const float *) x, acts + j*act_size, k, from, to);
    }
}

// Begin a product: quantize src1, and give every thread the chunk of its own number to start with.
// Return the aligned work buffer. A barrier must follow.
static char * begin_product(const ggml_compute_params * params, const ggml_tensor * dst, const work & wk) {
    ggml_cpu_aaac_check_shapes(dst);
    GGML_ASSERT(params->wsize >= wk.total);
    char * wdata = align64(params->wdata);
    quantize_src1(params, dst->src[1], wdata + wk.acts, wk.act_size);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    return wdata;
}

static void compute_mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    GGML_ASSERT(src1->ne[2] % src0->ne[2] == 0 && src1->ne[3] % src0->ne[3] == 0);

    const work wk(dst, params->nth);
    char * wdata = begin_product(params, dst, wk);
    const aaac::weights w(ggml_aaac_get_params(src0));
    ggml_barrier(params->threadpool);

    const int64_t r2 = src1->ne[2]/src0->ne[2];
    const int64_t r3 = src1->ne[3]/src0->ne[3];
    const auto operands = [&](int64_t i) {
        const int64_t i02 = i % src0->ne[2];
        const int64_t i03 = i / src0->ne[2];
        return std::make_pair((const char *) src0->data + i02*src0->nb[2] + i03*src0->nb[3],
                              mul_mat_columns{ dst, wdata + wk.acts, wk.act_size, i02, i03, r2, r3 });
    };
    mul_matrices(params, src0, w, src0->ne[2]*src0->ne[3], operands, wdata + wk.tiles + params->ith*wk.tile_size);
}

// Sort the places in ids by the expert that they picked. Return the number of experts in use.
//   starts  uses[starts[a]] .. uses[starts[a + 1] - 1] picked expert a
//   used    the experts that were picked
static int32_t sort_by_expert(const ggml_tensor * ids, int64_t n_experts, int32_t * starts, int32_t * used,
                              expert_use * uses) {
    const auto expert = [&](int64_t slot, int64_t token) {
        const int32_t a = *(const int32_t *) ((const char *) ids->data + slot*ids->nb[0] + token*ids->nb[1]);
        GGML_ASSERT(a >= 0 && a < n_experts);
        return a;
    };
    std::fill_n(starts, n_experts + 1, 0);
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            starts[expert(slot, token) + 1]++;
        }
    }
    int32_t n_used = 0;
    for (int64_t a = 0; a < n_experts; ++a) {
        if (starts[a + 1] > 0) {
            used[n_used++] = (int32_t) a;
        }
        starts[a + 1] += starts[a];
    }
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            uses[starts[expert(slot, token)]++] = { (int32_t) slot, (int32_t) token };
        }
    }
    // every start has moved to the value of the next one, so move them all one place up
    std::copy_backward(starts, starts + n_experts, starts + n_experts + 1);
    starts[0] = 0;
    return n_used;
}

static void compute_mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];

    const int64_t n_experts = src0->ne[2];
    const work wk(dst, params->nth);
    char * wdata = begin_product(params, dst, wk);
    int32_t    * n_used = (int32_t *) (wdata + wk.experts);
    int32_t    * starts = n_used + 1;
    int32_t    * used   = starts + n_experts + 1;
    expert_use * uses   = (expert_use *) (used + n_experts);
    if (params->ith == 0) {
        *n_used = sort_by_expert(dst->src[2], n_experts, starts, used, uses);
    }
    const aaac::weights w(ggml_aaac_get_params(src0));
    ggml_barrier(params->threadpool);

    const auto operands = [&](int64_t i) {
        const int32_t a      = used[i];
        const int64_t n_uses = starts[a + 1] - starts[a];
        return std::make_pair((const char *) src0->data + a*src0->nb[2],
                              mul_mat_id_columns{ dst, wdata + wk.acts, wk.act_size, uses + starts[a], n_uses });
    };
    mul_matrices(params, src0, w, *n_used, operands, wdata + wk.tiles + params->ith*wk.tile_size);
}

//
// hooks
//

static bool is_product(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID;
}

bool ggml_cpu_aaac_work_size(int n_threads, const ggml_tensor * op, size_t * size) {
    if (!ggml_aaac_uses(op)) {
        return false;
    }
    *size = is_product(op) ? work(op, n_threads).total : 0;
    return true;
}

bool ggml_cpu_aaac_compute_forward(ggml_compute_params * params, ggml_tensor * op) {
    if (!ggml_aaac_uses(op)) {
        return false;
    }
    if (!ggml_aaac_supports_op(op)) {
        // ggml's own code for the op would call a conversion that does not exist, so do not leave op to it
        GGML_ABORT("operation %s (%s) is not implemented for AAAC tensors", ggml_op_name(op->op), op->name);
    }
    if (params->use_ref && is_product(op)) {
        ggml_cpu_aaac_mul_mat_reference(params, op);
        return true;
    }
    switch (op->op) {
        case GGML_OP_MUL_MAT:    compute_mul_mat(params, op);        break;
        case GGML_OP_MUL_MAT_ID: compute_mul_mat_id(params, op);     break;
        case GGML_OP_GET_ROWS:   ggml_cpu_aaac_get_rows(params, op); break;
        case GGML_OP_CPY:        ggml_cpu_aaac_cpy(params, op);      break;
        default: GGML_ABORT("fatal error");
    }
    return true;
}
