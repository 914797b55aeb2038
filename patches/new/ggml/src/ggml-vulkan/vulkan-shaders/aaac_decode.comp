#version 450

// Decode rows of an AAAC tensor to a contiguous result: all rows, or with GET_ROWS those that ids name. One thread per
// index word of the result. D_TYPE4 is 4 values of the result; D_BF16 says that they are BF16 in two words.

#extension GL_EXT_control_flow_attributes : require

layout (push_constant) uniform parameter {
    uint  codebooks[8];
    float d;
    uint  m;
    uint  row_words;                                  // index words in a row
    uint  n_words;                                    // index words of the whole result
    uint  ne1, ne2;                                   // rows of the tensor, or dimensions of ids
    uint  a_offset, a_stride1, a_stride2, a_stride3;  // in elements of A_TYPE
    uint  d_offset;                                   // in elements of D_TYPE4
    uint  ids_offset, ids_stride0, ids_stride1, ids_stride2;
} p;

#include "aaac.glsl"

layout (local_size_x = 64) in;

#if defined(GET_ROWS)
layout (binding = 1) readonly  buffer I { int data_ids[]; };
layout (binding = 2) writeonly buffer D { D_TYPE4 data_d[]; };
#else
layout (binding = 1) writeonly buffer D { D_TYPE4 data_d[]; };
#endif

#if defined(D_BF16)
uvec2 result_of(const vec4 weights) {
    uvec4 bits = floatBitsToUint(weights);
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16; // to nearest even. No weight is infinite or NaN
    return uvec2(bits.x | bits.y << 16, bits.z | bits.w << 16);
}
#else
#define result_of D_TYPE4 // no function, because a half that is not stored at once needs arithmetic in halves
#endif

void main() {
    load_levels();
    const uint i = (gl_WorkGroupID.y * gl_NumWorkGroups.x + gl_WorkGroupID.x) * gl_WorkGroupSize.x + gl_LocalInvocationID.x;
    if (i >= p.n_words) {
        return;
    }
    const uint row = i / p.row_words;
    const uint i1  = row % p.ne1;
    const uint i2  = row / p.ne1 % p.ne2;
    const uint i3  = row / p.ne1 / p.ne2;
    const uint w   = i % p.row_words;
#if defined(GET_ROWS)
    const uint id  = uint(data_ids[p.ids_offset + i1 * p.ids_stride0 + i2 * p.ids_stride1 + i3 * p.ids_stride2]);
    const uint a   = p.a_offset + id * p.a_stride1 + i2 * p.a_stride2 + i3 * p.a_stride3;
#else
    const uint a   = p.a_offset + i1 * p.a_stride1 + i2 * p.a_stride2 + i3 * p.a_stride3;
#endif
    const uint block   = a + w / BLOCK_WORDS * BLOCK_SIZE;
    const uint header  = header_of(block);
    const uint indices = index_word(block, w % BLOCK_WORDS);
    [[unroll]] for (uint high = 0; high < 2; ++high) {
        float scale;
        uint book;
        group_of(header, w % BLOCK_WORDS, high, scale, book);
        precise const vec4 weights = scale * levels_of(indices >> 4 * high, book);
        data_d[p.d_offset + (row * p.row_words * 8 + column_of(w)) / 4 + 8 * high] = result_of(weights);
    }
}
