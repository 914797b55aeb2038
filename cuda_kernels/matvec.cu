// Products with 1 to 8 columns. The kernels are templates in aaac_matvec.cuh. NVRTC instantiates those that kernels.py
// asks for. nvcc instantiates all with 8-bit activations, and those with float activations for one type, because the
// types differ in the conversion only.
#include "aaac_matvec.cuh"

#if !defined(__CUDACC_RTC__)
#define INSTANTIATE(T, N)                                                                                           \
    template __global__ void aaac_matvec_q8<T, N>(const AAAC_GRID_CONSTANT aaac_params, const uint8_t *, int64_t,   \
                                                  int, int, const uint8_t *, int, float *, int64_t);                \
    template __global__ void aaac_matvec<T, aaac_f16, N>(const AAAC_GRID_CONSTANT aaac_params, const uint8_t *,     \
                                                         int64_t, int, int, const aaac_f16 *, int64_t, int,         \
                                                         float *, int64_t);
#define INSTANTIATE_COLUMNS(T) INSTANTIATE(T, 1) INSTANTIATE(T, 2) INSTANTIATE(T, 4) INSTANTIATE(T, 8)
INSTANTIATE_COLUMNS(aaac_g16)
INSTANTIATE_COLUMNS(aaac_g32)
INSTANTIATE_COLUMNS(aaac_g128)
template __global__ void aaac_quantize_q8<float>(const float *, int64_t, int, uint8_t *);
template __global__ void aaac_quantize_q8<aaac_f16>(const aaac_f16 *, int64_t, int, uint8_t *);
template __global__ void aaac_quantize_q8<aaac_bf16>(const aaac_bf16 *, int64_t, int, uint8_t *);
#endif
