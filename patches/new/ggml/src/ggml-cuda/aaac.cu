#include "aaac.cuh"

bool ggml_cuda_aaac_supports_op(int cc, const ggml_tensor * op) {
#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
    GGML_UNUSED_VARS(cc, op);
    return false; // these builds leave the kernels out
#else
    // the tensor core kernels need Turing: the device must have it, and its code must have been compiled for it
    if (cc < GGML_CUDA_CC_TURING || ggml_cuda_highest_compiled_arch(cc) < GGML_CUDA_CC_TURING) {
        return false;
    }
    if (!ggml_aaac_supports_op(op)) {
        return false;
    }
    const ggml_tensor * src0 = op->src[0];
    const ggml_tensor * src1 = op->src[1];
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            // dimensions 2 and 3 are dimensions of a grid
            return ggml_is_contiguous(op) && src1->ne[2] < 65536 && src1->ne[3] < 65536;
        case GGML_OP_MUL_MAT_ID:
            // activations are loaded 4 at a time, and rows are numbered across tokens
            return ggml_is_contiguous(op) && op->src[2]->nb[0] == sizeof(int32_t) && src0->ne[2] < 65536
                && src1->nb[1] % 16 == 0 && src1->nb[2] % src1->nb[1] == 0;
        case GGML_OP_GET_ROWS:
            return ggml_is_contiguous(op) && src1->type == GGML_TYPE_I32;
        default:
            return true;
    }
#endif
}

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_aaac_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op) {
    GGML_UNUSED_VARS(ctx, op);
    return false;
}

void ggml_cuda_aaac_mul_mat_vec(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
        ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion) {
    GGML_UNUSED_VARS(ctx, src0, src1, ids, dst, fusion);
    GGML_ABORT("fatal error");
}

#else

#include "aaac-common.cuh"
#include "aaac_matmul.cuh"
#include "aaac_matvec.cuh"
#include "mmid.cuh"
#include "mmvq.cuh"
#include "unary.cuh"

#include <algorithm>

// For up to this many columns, a pass over the blocks for every 8 columns moves fewer bytes than decoding to halves:
// 0.56 bytes per weight and pass, against 4.56 in all. This is an estimate. Where the two meet on a GPU was not
// measured.
static constexpr int64_t MAX_VEC_COLS = 32;

//
// decode batches
//

// A float tensor, strides in elements.
struct aaac_tensor {
    const float * data;
    unsigned ne1, ne2; // 32 bits, because a 64-bit division takes longer than the rest of a small kernel
    int64_t  s1, s2, s3;
};

static aaac_tensor tensor_of(const ggml_tensor * t) {
    return { (const float *) t->data, (unsigned) t->ne[1], (unsigned) t->ne[2],
        (int64_t) (t->nb[1]/sizeof(float)), (int64_t) (t->nb[2]/sizeof(float)), (int64_t) (t->nb[3]/sizeof(float)) };
}

// Return column col of x. Columns are numbered in logical order, whatever the strides.
static __device__ __forceinline__ const float * column_of(const aaac_tensor & x, unsigned col) {
    const unsigned i1 = col % x.ne1;
    const unsigned i2 = col/x.ne1 % x.ne2;
    const unsigned i3 = col/x.ne1 / x.ne2;
    return x.data + i1*x.s1 + i2*x.s2 + i3*x.s3;
}

// Quantize the columns of x. Grid: (columns, ceil(k / 128))
static __global__ void __launch_bounds__(AAAC_MATVEC_THREADS)
k_aaac_quantize(const aaac_tensor x, int k, uint8_t * q8) {
    ggml_cuda_pdl_lc(); // the product may start: it loads weights while this kernel runs
    ggml_cuda_pdl_sync();
    const unsigned col = blockIdx.x;
    const int64_t  i   = (int64_t) blockIdx.y*AAAC_MATVEC_THREADS + threadIdx.x;
    if (i < k) {
        aaac_quantize_32(column_of(x, col), i, k, q8 + col*aaac_q8_stride(k));
    }
}

struct aaac_mul_mat_args {
    const uint8_t * w;
    int64_t         nb1, nb2, nb3; // of w
    int             n_rows, k;
    const uint8_t * q8;
    unsigned        ne11, ne12;    // columns of q8 are numbered i1 + ne11*(i2 + ne12*i3)
    int             col0, n_cols;  // the columns of this launch
    int             r2, r3;        // how many matrices of src1 share one of w
    float         * dst;
    int64_t         s1, s2, s3;    // of dst, in elements
    const int32_t * ids;           // MUL_MAT_ID, else null. blockIdx.y is the slot, blockIdx.z the token
    int64_t         ids_s1;
};

struct aaac_fusion {
    aaac_params     gate_params;
    const uint8_t * gate;       // weights with the strides of w, or null
    aaac_tensor     bias;       // data may be null. For MUL_MAT_ID it has one row per expert
    aaac_tensor     gate_bias;
    int             glu_op;
    float           glu_limit;
};

static __device__ __forceinline__ float aaac_glu(int op, float gate, float up, float limit) {
    switch (op) {
        case GGML_GLU_OP_SWIGLU:       return up*ggml_cuda_op_silu_single(gate);
        case GGML_GLU_OP_GEGLU:        return up*ggml_cuda_op_gelu_single(gate);
        case GGML_GLU_OP_SWIGLU_OAI:   return ggml_cuda_op_swiglu_oai_single(gate, up);
        case GGML_GLU_OP_SWIGLU_CLAMP: return ggml_cuda_op_swiglu_clamp_single(gate, up, limit);
        default:                       return up*gate;
    }
}

template <class T, int N, bool FUSED>
static __global__ void __launch_bounds__(AAAC_MATVEC_THREADS, aaac_matvec_blocks(FUSED ? 2 : N)) k_aaac_mul_mat_vec(
        const AAAC_GRID_CONSTANT aaac_params p, const AAAC_GRID_CONSTANT aaac_mul_mat_args a,
        const AAAC_GRID_CONSTANT aaac_fusion f) {
    constexpr int R = aaac_matvec_rows(N);
    constexpr int V = R*N;
    __shared__ aaac_tables tables;
    __shared__ float partial[V*AAAC_MATVEC_WARPS];

    int64_t matrix, col, dst, expert = 0;
    if (a.ids) {
        ggml_cuda_pdl_sync(); // because an earlier kernel writes ids, and they say which weights to load
        expert = a.ids[blockIdx.y + blockIdx.z*a.ids_s1];
        matrix = expert*a.nb2;
        col    = (int64_t) blockIdx.z*a.ne11 + blockIdx.y % a.ne11;
        dst    = blockIdx.y*a.s1 + blockIdx.z*a.s2;
    } else {
        matrix = blockIdx.y/a.r2*a.nb2 + blockIdx.z/a.r3*a.nb3;
        col    = ((int64_t) blockIdx.z*a.ne12 + blockIdx.y)*a.ne11 + a.col0;
        dst    = blockIdx.y*a.s2 + blockIdx.z*a.s3 + a.col0*a.s1;
    }
    const uint8_t * q8   = a.q8 + col*aaac_q8_stride(a.k);
    const int       row0 = blockIdx.x*R;
    const int       row  = row0 + threadIdx.x/N;
    const int       c    = threadIdx.x % N;
    const bool      mine = threadIdx.x < V && row < a.n_rows && c < a.n_cols;

    float sum[V];
    const auto wait = [] { ggml_cuda_pdl_sync(); };
    aaac_dot_rows<T, N>(p, &tables, a.w + matrix, a.nb1, row0, a.n_rows, a.k, q8, a.n_cols, sum, wait);
    float result = p.d*aaac_block_sums<V>(sum, partial);

    if constexpr (FUSED) {
        const auto bias = [&](const aaac_tensor & b) {
            return b.data && mine ? b.data[row + (a.ids ? expert*b.s1 : blockIdx.y*b.s2 + blockIdx.z*b.s3)] : 0.0f;
        };
        result += bias(f.bias);
        if (f.gate) {
            __shared__ aaac_tables gate_tables;
            __shared__ float gate_partial[V*AAAC_MATVEC_WARPS];
            aaac_dot_rows<T, N>(f.gate_params, &gate_tables, f.gate + matrix, a.nb1, row0, a.n_rows, a.k, q8, a.n_cols,
                                sum, [] {});
            const float gate = f.gate_params.d*aaac_block_sums<V>(sum, gate_partial) + bias(f.gate_bias);
            result = aaac_glu(f.glu_op, gate, result, f.glu_limit);
        }
    }
    if (mine) {
        a.dst[dst + c*a.s1 + row] = result;
    }
}

void ggml_cuda_aaac_mul_mat_vec(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
        ggml_tensor * dst, const ggml_cuda_mm_fusion_args_host * fusion) {
    GGML_ASSERT(src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float));
    GGML_ASSERT(dst->type == GGML_TYPE_F32 && dst->nb[0] == sizeof(float));
    const int64_t k      = src0->ne[0];
    const int64_t n_cols = ids ? 1 : src1->ne[1];
    cudaStream_t stream = ctx.stream();

    aaac_fusion fused = {};
    if (fusion) {
        GGML_ASSERT(n_cols == 1 && !fusion->x_scale && !fusion->gate_scale);
        if (fusion->gate) {
            GGML_ASSERT(fusion->gate->type == src0->type && ggml_are_same_stride(fusion->gate, src0));
            fused.gate        = (const uint8_t *) fusion->gate->data;
            fused.gate_params = *ggml_aaac_get_params(fusion->gate);
        }
        for (const ggml_tensor * bias : { fusion->x_bias, fusion->gate_bias }) {
            GGML_ASSERT(!bias || (bias->type == GGML_TYPE_F32 && bias->nb[0] == sizeof(float)));
            GGML_ASSERT(!bias || bias->ne[0] == dst->ne[0]);
        }
        fused.bias      = fusion->x_bias    ? tensor_of(fusion->x_bias)    : aaac_tensor{};
        fused.gate_bias = fusion->gate_bias ? tensor_of(fusion->gate_bias) : aaac_tensor{};
        fused.glu_op    = fusion->glu_op;
        fused.glu_limit = fusion->glu_limit;
    }

    ggml_cuda_pool_alloc<uint8_t> q8(ctx.pool(), ggml_nrows(src1)*aaac_q8_stride(k));
    check_aligned(q8.get());
    const dim3 quantize_grid(ggml_nrows(src1), ceil_div(k, AAAC_MATVEC_THREADS));
    const ggml_cuda_kernel_launch_params quantize(quantize_grid, AAAC_MATVEC_THREADS, (size_t) 0, stream);
    ggml_cuda_kernel_launch(k_aaac_quantize, quantize, tensor_of(src1), (int) k, q8.get());

    const aaac_tensor y = tensor_of(dst);
    aaac_mul_mat_args args = {};
    args.w      = (const uint8_t *) src0->data;
    args.nb1    = src0->nb[1];
    args.nb2    = src0->nb[2];
    args.nb3    = src0->nb[3];
    args.n_rows = src0->ne[1];
    args.k      = k;
    args.q8     = q8.get();
    args.ne11   = (unsigned) src1->ne[1];
    args.ne12   = (unsigned) src1->ne[2];
    args.r2     = ids ? 1 : src1->ne[2]/src0->ne[2];
    args.r3     = ids ? 1 : src1->ne[3]/src0->ne[3];
    args.dst    = (float *) dst->data;
    args.s1     = y.s1;
    args.s2     = y.s2;
    args.s3     = y.s3;
    args.ids    = ids ? (const int32_t *) ids->data : nullptr;
    args.ids_s1 = ids ? ids->nb[1]/sizeof(int32_t) : 0;
    const aaac_params & params = *ggml_aaac_get_params(src0);
    const dim3 batch(0, ids ? ids->ne[0] : src1->ne[2], ids ? ids->ne[1] : src1->ne[3]);

    with_type(src0->type, [&](auto t) {
        using T = decltype(t);
        const auto launch = [&](auto kernel, int n) {
            const dim3 grid(ceil_div(args.n_rows, aaac_matvec_rows(n)), batch.y, batch.z);
            const ggml_cuda_kernel_launch_params launch_params(grid, AAAC_MATVEC_THREADS, (size_t) 0, stream);
            ggml_cuda_kernel_launch(kernel, launch_params, params, args, fused);
        };
        for (args.col0 = 0; args.col0 < n_cols; args.col0 += MMVQ_MAX_BATCH_SIZE) {
            args.n_cols = std::min<int64_t>(n_cols - args.col0, MMVQ_MAX_BATCH_SIZE);
            if      (fusion)           { launch(k_aaac_mul_mat_vec<T, 1, true >, 1); }
            else if (args.n_cols == 1) { launch(k_aaac_mul_mat_vec<T, 1, false>, 1); }
            else if (args.n_cols == 2) { launch(k_aaac_mul_mat_vec<T, 2, false>, 2); }
            else if (args.n_cols <= 4) { launch(k_aaac_mul_mat_vec<T, 4, false>, 4); }
            else                       { launch(k_aaac_mul_mat_vec<T, 8, false>, 8); }
        }
    });
}

//
// prompts
//

// Round the columns of x to contiguous halves. Grid: (columns, ceil(k / 256))
static __global__ void k_aaac_to_f16(const aaac_tensor x, int k, aaac_f16 * y) {
    const unsigned col = blockIdx.x;
    const int64_t  i   = (int64_t) blockIdx.y*blockDim.x + threadIdx.x;
    if (i < k) {
        y[(int64_t) col*k + i] = aaac_from_float<aaac_f16>(column_of(x, col)[i]);
    }
}

// Decode n_rows rows of src0, from data, to y.
template <class O>
static void dequantize(const ggml_tensor * src0, const void * data, int64_t n_rows, O * y, cudaStream_t stream) {
    check_aligned(y);
    with_type(src0->type, [&](auto t) {
        const int64_t n_units = n_rows*src0->ne[0]/AAAC_UNIT;
        aaac_dequant<decltype(t), O><<<ceil_div(n_units, AAAC_DEQUANT_THREADS), AAAC_DEQUANT_THREADS, 0, stream>>>(
            *ggml_aaac_get_params(src0), (const uint8_t *) data, src0->nb[1], src0->ne[0], (uint32_t) n_units, y,
            src0->ne[0]);
    });
    CUDA_CHECK(cudaGetLastError());
}

// Decode each matrix to halves and leave the product to cuBLAS, with sums in float32.
static void mul_mat_cublas(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    const int64_t k = src0->ne[0];
    const int64_t n = src0->ne[1];
    const int64_t n_cols = src1->ne[1];
    cudaStream_t stream = ctx.stream();

    ggml_cuda_pool_alloc<aaac_f16> x(ctx.pool(), ggml_nelements(src1));
    ggml_cuda_pool_alloc<aaac_f16> w(ctx.pool(), n*k);
    k_aaac_to_f16<<<dim3(ggml_nrows(src1), ceil_div(k, 256)), 256, 0, stream>>>(tensor_of(src1), k, x.get());
    CUDA_CHECK(cudaGetLastError());

    const int64_t r2 = src1->ne[2]/src0->ne[2];
    const int64_t r3 = src1->ne[3]/src0->ne[3];
    const float one = 1.0f, zero = 0.0f;
    for (int64_t i03 = 0; i03 < src0->ne[3]; ++i03) {
        for (int64_t i02 = 0; i02 < src0->ne[2]; ++i02) {
            dequantize(src0, (const char *) src0->data + i02*src0->nb[2] + i03*src0->nb[3], n, w.get(), stream);
            for (int64_t j = 0; j < r2*r3; ++j) {
                const int64_t i2 = i02*r2 + j % r2;
                const int64_t i3 = i03*r3 + j / r2;
                const aaac_f16 * xi = x.get() + (i2 + src1->ne[2]*i3)*n_cols*k;
                float * yi = (float *) ((char *) dst->data + i2*dst->nb[2] + i3*dst->nb[3]);
                CUBLAS_CHECK(cublasGemmEx(ctx.cublas_handle(), CUBLAS_OP_T, CUBLAS_OP_N, n, n_cols, k,
                    &one, w.get(), CUDA_R_16F, k, xi, CUDA_R_16F, k, &zero, yi, CUDA_R_32F, dst->nb[1]/sizeof(float),
                    CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP));
            }
        }
    }
}

// Sort the tokens by expert on the device, and multiply with one launch for all experts. Nothing waits for the device,
// so CUDA graphs stay usable.
static void mul_mat_id_experts(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, const ggml_tensor * ids,
        ggml_tensor * dst) {
    const int64_t n_experts = src0->ne[2];
    const int64_t n_used    = ids->ne[0];
    const int64_t n_tokens  = ids->ne[1];
    cudaStream_t stream = ctx.stream();

    ggml_cuda_pool_alloc<int32_t> sources(ctx.pool(), n_tokens*n_used);
    ggml_cuda_pool_alloc<int32_t> targets(ctx.pool(), n_tokens*n_used);
    ggml_cuda_pool_alloc<int32_t> bounds (ctx.pool(), n_experts + 1);
    ggml_cuda_launch_mm_ids_helper((const int32_t *) ids->data, sources.get(), targets.get(), bounds.get(), n_experts,
        n_tokens, n_used, src1->ne[1], ids->nb[1]/sizeof(int32_t), src1->nb[2]/src1->nb[1], /*write_inverse =*/ false,
        stream);
    CUDA_CHECK(cudaGetLastError());

    check_aligned(src1->data);
    const aaac_experts experts = { bounds.get(), sources.get(), targets.get(), (int64_t) src0->nb[2] };
    // an expert has n_tokens columns at most, because a token uses it at most once
    const dim3 grid(ceil_div(src0->ne[1], AAAC_MATMUL_ROWS), ceil_div(n_tokens, AAAC_MATMUL_COLS), n_experts);
    with_type(src0->type, [&](auto t) {
        aaac_matmul<decltype(t), float><<<grid, AAAC_MATMUL_THREADS, 0, stream>>>(
            *ggml_aaac_get_params(src0), (const uint8_t *) src0->data, src0->nb[1], src0->ne[1], src0->ne[0],
            (const float *) src1->data, src1->nb[1]/sizeof(float), n_tokens, (float *) dst->data,
            dst->nb[1]/sizeof(float), experts);
    });
    CUDA_CHECK(cudaGetLastError());
}

bool ggml_cuda_aaac_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op) {
    if (!ggml_aaac_uses(op)) {
        return false;
    }
    const ggml_tensor * src0 = op->src[0];
    const ggml_tensor * src1 = op->src[1];
    switch (op->op) {
        case GGML_OP_MUL_MAT:
            if (src1->ne[1] <= MAX_VEC_COLS) {
                ggml_cuda_aaac_mul_mat_vec(ctx, src0, src1, nullptr, op, nullptr);
            } else {
                mul_mat_cublas(ctx, src0, src1, op);
            }
            break;
        case GGML_OP_MUL_MAT_ID:
            if (src1->ne[2] <= MMVQ_MAX_BATCH_SIZE) {
                ggml_cuda_aaac_mul_mat_vec(ctx, src0, src1, op->src[2], op, nullptr);
            } else {
                mul_mat_id_experts(ctx, src0, src1, op->src[2], op);
            }
            break;
        case GGML_OP_GET_ROWS: ggml_cuda_aaac_get_rows(ctx, op); break;
        case GGML_OP_CPY:      ggml_cuda_aaac_cpy(ctx, op);      break;
        default: GGML_ABORT("operation %s (%s) is not implemented for AAAC tensors", ggml_op_name(op->op), op->name);
    }
    return true;
}

#endif // GGML_USE_HIP || GGML_USE_MUSA
