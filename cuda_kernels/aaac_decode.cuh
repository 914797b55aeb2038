// The one decode of the AAAC tensor types: block layouts, scale codes, selectors and indices.
//
// C, C++, nvcc, HIP and NVRTC compile this text. llama.cpp's CPU and CUDA backends, its file checks and the CuPy
// kernels include it, and a test compares it bit for bit with the numpy oracle. It has no loops and no vector code, so
// that it reads like the layout.
//
//     w = S(scale_code) * C[selector][index]       S(0) = 0, S(i) = d * f(i)
//
// Each of the two products is one float32 multiplication with one rounding.

#ifndef AAAC_DECODE_CUH
#define AAAC_DECODE_CUH

#if defined(__CUDACC_RTC__)
// NVRTC has no standard headers
typedef signed char    int8_t;
typedef unsigned char  uint8_t;
typedef unsigned int   uint32_t;
#else
#include <stdint.h>
#include <string.h>
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define AAAC_FN static __host__ __device__ __forceinline__
#else
#define AAAC_FN static inline
#endif

#define AAAC_N_CODEBOOKS   2
#define AAAC_N_LEVELS      16
#define AAAC_SELECTOR_SIZE 16  // weights per selector bit, in every type
#define AAAC_RUN_SIZE      64  // weights per run of 32 index bytes

#define QK_AAAC4_G16  64   // weights per block
#define QK_AAAC4_G32  64
#define QK_AAAC4_G128 128

typedef struct {
    uint8_t s[4];   // s[j] = selector << 7 | scale code of weights 16j .. 16j+15
    uint8_t qs[32];
} block_aaac4_g16;

typedef struct {
    // s[j] = selector of the last 16 << 7 | selector of the first 16 << 6 | 6-bit scale code of weights 32j .. 32j+31
    uint8_t s[2];
    uint8_t qs[32];
} block_aaac4_g32;

typedef struct {
    uint8_t s;      // scale code. Bit 7 is zero
    uint8_t sel;    // bit j: selector of weights 16j .. 16j+15
    uint8_t qs[64];
} block_aaac4_g128;

// What is needed to decode one tensor besides its blocks.
// In ggml it is at the start of the op_params of the weight, which is a leaf and has no other use for them.
typedef struct aaac_params {
    int8_t  codebooks[AAAC_N_CODEBOOKS][AAAC_N_LEVELS]; // each strictly ascending, in [-127, 127]
    float   d;                                          // scale base, finite and positive
    uint8_t m;                                          // mantissa bits of the scale code, 2 .. 5
} aaac_params;

AAAC_FN float aaac_as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
    return __uint_as_float(bits);
#else
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
#endif
}

// Return f(code) = 2^e * (1 + mantissa / 2^m). The code is the exponent and mantissa of a float whose exponent counts
// from that of 1.0, so an integer addition makes the float.
AAAC_FN float aaac_scale_factor(int code, int m) {
    return aaac_as_float(code == 0 ? 0u : 0x3F800000u + ((uint32_t) code << (23 - m)));
}

// Multiply with one rounding. nvcc must not fuse this product with a sum of the caller.
AAAC_FN float aaac_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

AAAC_FN float aaac_scale(const aaac_params * p, int code) {
    return aaac_mul(p->d, aaac_scale_factor(code, p->m));
}

// Return the index of weight i of the block.
// Byte b of a run of 64 weights holds weight b in its low nibble and weight b + 32 in its high nibble.
AAAC_FN int aaac_index(const uint8_t * qs, int i) {
    const int byte = (i / AAAC_RUN_SIZE) * (AAAC_RUN_SIZE / 2) + i % (AAAC_RUN_SIZE / 2);
    return i % AAAC_RUN_SIZE < AAAC_RUN_SIZE / 2 ? qs[byte] & 0x0F : qs[byte] >> 4;
}

AAAC_FN int aaac4_g16_code     (const block_aaac4_g16  * b, int i) { return b->s[i / 16] & 0x7F; }
AAAC_FN int aaac4_g16_selector (const block_aaac4_g16  * b, int i) { return b->s[i / 16] >> 7; }
AAAC_FN int aaac4_g32_code     (const block_aaac4_g32  * b, int i) { return b->s[i / 32] & 0x3F; }
AAAC_FN int aaac4_g32_selector (const block_aaac4_g32  * b, int i) { return b->s[i / 32] >> (6 + (i / 16) % 2) & 1; }
AAAC_FN int aaac4_g128_code    (const block_aaac4_g128 * b, int i) { (void) i; return b->s & 0x7F; }
AAAC_FN int aaac4_g128_selector(const block_aaac4_g128 * b, int i) { return b->sel >> (i / 16) & 1; }

AAAC_FN float aaac_weight(const aaac_params * p, int code, int selector, int index) {
    return aaac_mul(aaac_scale(p, code), (float) p->codebooks[selector][index]);
}

AAAC_FN float aaac4_g16_weight(const aaac_params * p, const block_aaac4_g16 * b, int i) {
    return aaac_weight(p, aaac4_g16_code(b, i), aaac4_g16_selector(b, i), aaac_index(b->qs, i));
}

AAAC_FN float aaac4_g32_weight(const aaac_params * p, const block_aaac4_g32 * b, int i) {
    return aaac_weight(p, aaac4_g32_code(b, i), aaac4_g32_selector(b, i), aaac_index(b->qs, i));
}

AAAC_FN float aaac4_g128_weight(const aaac_params * p, const block_aaac4_g128 * b, int i) {
    return aaac_weight(p, aaac4_g128_code(b, i), aaac4_g128_selector(b, i), aaac_index(b->qs, i));
}

#endif // AAAC_DECODE_CUH
