// Products with many columns on the tensor cores. The kernels are templates in aaac_matmul.cuh.
#include "aaac_matmul.cuh"

#if !defined(__CUDACC_RTC__)
#define INSTANTIATE(T, A)                                                                                      \
    template __global__ void aaac_matmul<T, A>(const AAAC_GRID_CONSTANT aaac_params, const uint8_t *, int64_t, \
                                               int, int, const A *, int64_t, int, float *, int64_t, aaac_experts);
#define INSTANTIATE_TYPES(A) INSTANTIATE(aaac_g16, A) INSTANTIATE(aaac_g32, A) INSTANTIATE(aaac_g128, A)
INSTANTIATE_TYPES(float)
INSTANTIATE_TYPES(aaac_f16)
INSTANTIATE_TYPES(aaac_bf16)
#endif
