#pragma once

// What the kernels of every instruction set build on: the three types behind one interface, and quantized activations.

#include "aaac_decode.cuh"

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace aaac {

constexpr int ACT_BLOCK = 32; // activations per scale, as in Q8_0

// A run is 64 weights: 32 index bytes and 4 selectors. A pair of runs is read at once. Its offsets count from the start
// of the block of its first run.
//   header(r), qs(r)       byte offset of the header and of the index bytes of run r (0, 1)
//   code_bit(j)            first bit, in the header, of the scale code of the run's weights 16j .. 16j+15
//   selector_bit(r, j)     bit, in the header, of their selector
struct g16 {
    using block = block_aaac4_g16;
    static constexpr int group = 16;
    static constexpr int size  = QK_AAAC4_G16;
    static constexpr int n_codes = 128;
    static constexpr int header(int r) { return 36*r; }
    static constexpr int qs(int r) { return 36*r + 4; }
    static constexpr int code_bit(int j) { return 8*j; }
    static constexpr int selector_bit(int, int j) { return 8*j + 7; }
    static int code(const block & b, int i) { return aaac4_g16_code(&b, i); }
    static uint32_t selectors(const block & b, int) {
        uint32_t s;
        memcpy(&s, b.s, 4);
        // Gather the top bits of the 4 bytes. In the top nibble of the product, bit 28+j is bit 7+8j and nothing else.
        return ((s & 0x80808080u) >> 7) * 0x10204080u >> 28;
    }
};

struct g32 {
    using block = block_aaac4_g32;
    static constexpr int group = 32;
    static constexpr int size  = QK_AAAC4_G32;
    static constexpr int n_codes = 64;
    static constexpr int header(int r) { return 34*r; }
    static constexpr int qs(int r) { return 34*r + 2; }
    static constexpr int code_bit(int j) { return j/2*8; }
    static constexpr int selector_bit(int, int j) { return j/2*8 + 6 + j % 2; }
    static int code(const block & b, int i) { return aaac4_g32_code(&b, i); }
    static uint32_t selectors(const block & b, int) { return (b.s[0] >> 6) | (b.s[1] >> 6) << 2; }
};

struct g128 {
    using block = block_aaac4_g128;
    static constexpr int group = 128;
    static constexpr int size  = QK_AAAC4_G128;
    static constexpr int n_codes = 128;
    static constexpr int header(int) { return 0; }
    static constexpr int qs(int r) { return 32*r + 2; }
    static constexpr int code_bit(int) { return 0; }
    static constexpr int selector_bit(int r, int j) { return 8 + 4*r + j; }
    static int code(const block & b, int i) { return aaac4_g128_code(&b, i); }
    static uint32_t selectors(const block & b, int run) { return b.sel >> 4*run & 15; }
};

// Return the bytes of n weights.
template <class T>
constexpr size_t row_bytes(int64_t n) {
    return n/T::size*sizeof(typename T::block);
}

struct act_chunk; // CHUNK activations in the order that dot_rows wants, if it wants one of its own

// One column of k quantized activations in memory.
//   q       int8  [k]                rounded to nearest, in [-127, 127]
//   d       float [k/32]             scales
//   corr    int32 [k/16]             see LEVEL_OFFSET
//   chunks  [k/CHUNK, rounded up]    the same activations again, for dot_rows. Starts at a multiple of 64 bytes
struct act_view {
    const int8_t    * q;
    const float     * d;
    const int32_t   * corr;
    const act_chunk * chunks;

    act_view() = default;
    act_view(const void * data, int64_t k) {
        q      = (const int8_t    *) data;
        d      = (const float     *) (q + k);
        corr   = (const int32_t   *) (d + k/ACT_BLOCK);
        chunks = (const act_chunk *) (q + natural_size(k));
    }

    // Return the bytes of q, d and corr.
    static size_t natural_size(int64_t k) {
        return (k + k/ACT_BLOCK*sizeof(float) + k/16*sizeof(int32_t) + 63)/64*64;
    }
};

// Return the inverse of a scale of activations: 0 for a subnormal one, which has no finite inverse.
inline float inverse_scale(float d) { return d >= FLT_MIN ? 1.0f/d : 0.0f; }

} // namespace aaac
