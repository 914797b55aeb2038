// Decode to float32, float16 and bfloat16. The kernels are templates in aaac_dequant.cuh. nvcc instantiates all of
// them, NVRTC those that kernels.py asks for.
#include "aaac_dequant.cuh"

#if !defined(__CUDACC_RTC__)
#define INSTANTIATE(T, O)                                                                                            \
    template __global__ void aaac_dequant<T, O>(const AAAC_GRID_CONSTANT aaac_params, const uint8_t *, int64_t, int, \
                                                uint32_t, O *, int64_t);
#define INSTANTIATE_TYPES(O) INSTANTIATE(aaac_g16, O) INSTANTIATE(aaac_g32, O) INSTANTIATE(aaac_g128, O)
INSTANTIATE_TYPES(float)
INSTANTIATE_TYPES(aaac_f16)
INSTANTIATE_TYPES(aaac_bf16)
#endif
