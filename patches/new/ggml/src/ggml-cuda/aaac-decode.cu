// GET_ROWS and CPY of AAAC tensors: blocks to floats.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "aaac-common.cuh"
#include "aaac_dequant.cuh"

// The shape and strides of a tensor, strides in bytes.
struct aaac_layout {
    int64_t ne0, ne1, ne2;
    int64_t nb0, nb1, nb2, nb3;
    int     block; // elements per nb0
};

static aaac_layout layout_of(const ggml_tensor * t) {
    return { t->ne[0], t->ne[1], t->ne[2], (int64_t) t->nb[0], (int64_t) t->nb[1], (int64_t) t->nb[2],
        (int64_t) t->nb[3], (int) ggml_blck_size(t->type) };
}

// Return the offset in bytes of element i. Elements are numbered in logical order, whatever the strides.
static __device__ __forceinline__ int64_t offset_of(const aaac_layout & l, int64_t i) {
    const int64_t i0 = i % l.ne0;
    i /= l.ne0;
    const int64_t i1 = i % l.ne1;
    i /= l.ne1;
    return i0/l.block*l.nb0 + i1*l.nb1 + i % l.ne2*l.nb2 + i/l.ne2*l.nb3;
}

// Copy the elements in logical order: source and result may have different shapes and strides. One thread per unit.
template <class T, class O>
static __global__ void k_aaac_cpy(const AAAC_GRID_CONSTANT aaac_params p, const uint8_t * src, const aaac_layout from,
                                  char * dst, const aaac_layout to, int64_t n_units) {
    __shared__ aaac_tables tables;
    aaac_make_tables(p, threadIdx.x, &tables);
    __syncthreads();
    const int64_t unit = (int64_t) blockIdx.x*blockDim.x + threadIdx.x;
    if (unit >= n_units) {
        return;
    }
    const int64_t block = unit/T::units*T::units*AAAC_UNIT; // the first element of the unit's block
    const int     v     = unit % T::units;
    aaac_raw raw;
    float    weights[32];
    T::load(src + offset_of(from, block), v, raw);
    aaac_decode_unit<T>(p, tables, raw, v, weights);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int64_t at = block + v/2*AAAC_RUN_SIZE + v % 2*16 + i/16*32 + i % 16;
        *(O *) (dst + offset_of(to, at)) = aaac_from_float<O>(weights[i]);
    }
}

void ggml_cuda_aaac_cpy(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const int64_t n_units = ggml_nelements(src0)/AAAC_UNIT;
    const auto run = [&](auto o) {
        with_type(src0->type, [&](auto t) {
            const unsigned n_blocks = ceil_div(n_units, AAAC_DEQUANT_THREADS);
            k_aaac_cpy<decltype(t), decltype(o)><<<n_blocks, AAAC_DEQUANT_THREADS, 0, ctx.stream()>>>(
                *ggml_aaac_get_params(src0), (const uint8_t *) src0->data, layout_of(src0), (char *) dst->data,
                layout_of(dst), n_units);
        });
    };
    switch (dst->type) {
        case GGML_TYPE_F32:  run(float{});     break;
        case GGML_TYPE_F16:  run(aaac_f16{});  break;
        case GGML_TYPE_BF16: run(aaac_bf16{}); break;
        default: GGML_ABORT("%s: type %s", __func__, ggml_type_name(dst->type));
    }
    CUDA_CHECK(cudaGetLastError());
}

// The ids of GET_ROWS, and the strides of the source.
struct aaac_rows {
    const char * ids;
    int64_t      ne0, ne1; // of ids
    int64_t      nb0, nb1, nb2;
    int64_t      src_nb1, src_nb2, src_nb3;
};

// Decode the rows that ids name. One thread per unit of the result, which is contiguous.
template <class T>
static __global__ void k_aaac_get_rows(const AAAC_GRID_CONSTANT aaac_params p, const uint8_t * src,
                                       const aaac_rows rows, int k, int64_t n_units, float * dst) {
    __shared__ aaac_tables tables;
    aaac_make_tables(p, threadIdx.x, &tables);
    __syncthreads();
    const int64_t unit = (int64_t) blockIdx.x*blockDim.x + threadIdx.x;
    if (unit >= n_units) {
        return;
    }
    const int     per_row = k/AAAC_UNIT;
    const int64_t j   = unit/per_row;
    const int64_t i10 = j % rows.ne0;
    const int64_t i11 = j/rows.ne0 % rows.ne1;
    const int64_t i12 = j/rows.ne0 / rows.ne1;
    const int64_t i01 = *(const int32_t *) (rows.ids + i10*rows.nb0 + i11*rows.nb1 + i12*rows.nb2);
    const uint8_t * row = src + i01*rows.src_nb1 + i11*rows.src_nb2 + i12*rows.src_nb3;
    aaac_dequant_unit<T, float>(p, tables, row, (int) (unit % per_row), dst + j*k);
}

void ggml_cuda_aaac_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const aaac_rows rows = { (const char *) src1->data, src1->ne[0], src1->ne[1],
        (int64_t) src1->nb[0], (int64_t) src1->nb[1], (int64_t) src1->nb[2],
        (int64_t) src0->nb[1], (int64_t) src0->nb[2], (int64_t) src0->nb[3] };
    const int64_t n_units = ggml_nelements(dst)/AAAC_UNIT;
    check_aligned(dst->data);
    with_type(src0->type, [&](auto t) {
        const unsigned n_blocks = ceil_div(n_units, AAAC_DEQUANT_THREADS);
        k_aaac_get_rows<decltype(t)><<<n_blocks, AAAC_DEQUANT_THREADS, 0, ctx.stream()>>>(
            *ggml_aaac_get_params(src0), (const uint8_t *) src0->data, rows, src0->ne[0], n_units, (float *) dst->data);
    });
    CUDA_CHECK(cudaGetLastError());
}

#endif // !GGML_USE_HIP && !GGML_USE_MUSA
