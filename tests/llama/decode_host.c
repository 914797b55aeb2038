/* aaac_decode.cuh behind one function, for test_decode_host.py to call through ctypes. C and C++ compile it. */

#include "aaac_decode.cuh"

#ifdef __cplusplus
extern "C" {
#endif

int block_bytes(int type) {
    return (int) (type == 80 ? sizeof(block_aaac4_g16) : type == 81 ? sizeof(block_aaac4_g32) : sizeof(block_aaac4_g128));
}

int block_weights(int type) {
    return type == 80 ? QK_AAAC4_G16 : type == 81 ? QK_AAAC4_G32 : QK_AAAC4_G128;
}

void decode(int type, const int8_t * codebooks, float d, uint8_t m, const void * data, int n_blocks, float * out) {
    aaac_params p;
    memcpy(p.codebooks, codebooks, sizeof(p.codebooks));
    p.d = d;
    p.m = m;
    for (int ib = 0; ib < n_blocks; ++ib) {
        for (int i = 0; i < block_weights(type); ++i) {
            *out++ = type == 80 ? aaac4_g16_weight (&p, (const block_aaac4_g16  *) data + ib, i)
                   : type == 81 ? aaac4_g32_weight (&p, (const block_aaac4_g32  *) data + ib, i)
                   :              aaac4_g128_weight(&p, (const block_aaac4_g128 *) data + ib, i);
        }
    }
}

#ifdef __cplusplus
}
#endif
