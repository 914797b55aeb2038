#version 450

// Multiply rows of an AAAC tensor with up to NUM_COLS columns of floats. A workgroup makes NUM_ROWS results of each
// column; it does not matter how many subgroups it is. With MUL_MAT_ID a workgroup has one column, and ids say which
// matrix it is multiplied with. With Q8_1 the columns are 8-bit blocks of ggml instead, without gaps, and 4 products are one
// integer instruction.

#extension GL_EXT_control_flow_attributes : require

layout (push_constant) uniform parameter {
    uint  codebooks[8];
    float d;
    uint  m;
    uint  k;
    uint  n_rows;
    uint  n_cols;                          // MUL_MAT_ID: of the activations of one token
    uint  a_offset, a_stride1, a_stride2, a_stride3;  // in elements of A_TYPE
    uint  b_offset, b_stride1, b_stride2, b_stride3;  // in vectors of 4 activations
    uint  d_offset, d_stride1, d_stride2, d_stride3;
#if defined(MUL_MAT_ID)
    uint  ids_offset, ids_stride0, ids_stride1;
#else
    uint  ne12, r2, r3;                    // r2, r3: how many matrices of the activations share one of the weights
#endif
} p;

#if defined(Q8_1)
#define INTEGER_LEVELS
#endif
#include "aaac.glsl"

layout (local_size_x_id = 0) in;
layout (constant_id = 0) const uint THREADS = 64;
layout (constant_id = 1) const uint NUM_COLS = 1;
layout (constant_id = 2) const uint NUM_ROWS = 2;

#if defined(Q8_1)
#extension GL_EXT_spirv_intrinsics : require
spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6018, 6019], id = 4450)
int signed_dot(uint a, uint b, spirv_literal int packed_format);

// block_q8_1_x4: 4 pairs of halves (scale, sum), then 128 activations
layout (binding = 1) readonly  buffer B { uvec4 data_b[]; };

#define W_TYPE4 uint
#define SUM     int

// Return where in data_b the activations of vector start, and their scale. A run of 64 weights meets one block.
uint  place_of(const uint vector)   { return vector / 32 * 9 + 1 + vector % 32 / 4; }
float scale_of_b(const uint vector) { return unpackHalf2x16(data_b[vector / 32 * 9][vector % 32 / 8]).x; }
#else
layout (binding = 1) readonly  buffer B { vec4 data_b[]; };

#define W_TYPE4 vec4
#define SUM     float
uint  place_of(const uint vector)   { return vector; }
float scale_of_b(const uint vector) { return 1.0; }
#endif
layout (binding = 2) writeonly buffer D { float data_d[]; };
#if defined(MUL_MAT_ID)
layout (binding = 3) readonly  buffer I { int data_ids[]; };
#endif

shared float partial[NUM_ROWS][NUM_COLS][THREADS];

void main() {
    load_levels();
    const uint row0 = gl_WorkGroupID.x * NUM_ROWS;
#if defined(MUL_MAT_ID)
    const uint slot  = gl_WorkGroupID.y;
    const uint token = gl_WorkGroupID.z;
    const uint id    = uint(data_ids[p.ids_offset + slot * p.ids_stride0 + token * p.ids_stride1]);
    const uint a     = p.a_offset + id * p.a_stride2;
    const uint b     = p.b_offset + token * p.b_stride2;
    const uint d     = p.d_offset + token * p.d_stride2;
    const uint col0  = slot;
#else
    const uint i12   = gl_WorkGroupID.z % p.ne12;
    const uint i13   = gl_WorkGroupID.z / p.ne12;
    const uint a     = p.a_offset + i12 / p.r2 * p.a_stride2 + i13 / p.r3 * p.a_stride3;
    const uint b     = p.b_offset + i12 * p.b_stride2 + i13 * p.b_stride3;
    const uint d     = p.d_offset + i12 * p.d_stride2 + i13 * p.d_stride3;
    const uint col0  = gl_WorkGroupID.y * NUM_COLS;
#endif

    // The last rows and columns are read more than once if they do not fill a workgroup.
    uint rows[NUM_ROWS];
    uint cols[NUM_COLS];
    float sums[NUM_ROWS][NUM_COLS];
    [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
        rows[r] = a + min(row0 + r, p.n_rows - 1) * p.a_stride1;
        [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
            sums[r][c] = 0.0;
        }
    }
    [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
#if defined(MUL_MAT_ID)
        cols[c] = b + slot % p.n_cols * p.b_stride1; // the slots of a token may share its activations
#else
        cols[c] = b + min(col0 + c, p.n_cols - 1) * p.b_stride1;
#endif
    }

    // A thread takes 4 words at a time: in each half of them, 16 weights have one scale and one codebook.
    for (uint unit = gl_LocalInvocationID.x; unit < p.k / 32; unit += THREADS) {
        const uint block  = unit / (BLOCK_WORDS / 4) * BLOCK_SIZE;
        const uint word   = unit % (BLOCK_WORDS / 4) * 4;
        const uint column = (unit / 2 * 64 + unit % 2 * 16) / 4;
        uint places[NUM_COLS];
        [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
            places[c] = place_of(cols[c] + column);
        }
        uint headers[NUM_ROWS];
        uint indices[NUM_ROWS][4];
        [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
            headers[r] = header_of(rows[r] + block);
            [[unroll]] for (uint i = 0; i < 4; ++i) {
                indices[r][i] = index_word(rows[r] + block, word + i);
            }
        }
        [[unroll]] for (uint high = 0; high < 2; ++high) {
            float scales[NUM_ROWS];
            uint books[NUM_ROWS];
            SUM products[NUM_ROWS][NUM_COLS];
            [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
                group_of(headers[r], word, high, scales[r], books[r]);
                [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
                    products[r][c] = SUM(0);
                }
            }
#if defined(Q8_1)
            uvec4 x[NUM_COLS];
            [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
                x[c] = data_b[places[c] + 2 * high];
            }
#endif
            [[unroll]] for (uint i = 0; i < 4; ++i) {
#if !defined(Q8_1)
                vec4 x[NUM_COLS];
                [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
                    x[c] = data_b[places[c] + 8 * high + i];
                }
#endif
                [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
                    const W_TYPE4 w = levels_of(indices[r][i] >> 4 * high, books[r]);
                    [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
#if defined(Q8_1)
                        products[r][c] += signed_dot(w, x[c][i], 0);
#else
                        products[r][c] += dot(w, x[c]);
#endif
                    }
                }
            }
            [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
                const float scale_b = scale_of_b(cols[c] + column + 8 * high);
                [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
                    sums[r][c] += scales[r] * (scale_b * float(products[r][c]));
                }
            }
        }
    }

    // The sum over all threads, in shared memory.
    const uint thread = gl_LocalInvocationID.x;
    [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
        [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
            partial[r][c][thread] = sums[r][c];
        }
    }
    barrier();
    for (uint n = THREADS / 2; n > 0; n /= 2) {
        if (thread < n) {
            [[unroll]] for (uint r = 0; r < NUM_ROWS; ++r) {
                [[unroll]] for (uint c = 0; c < NUM_COLS; ++c) {
                    partial[r][c][thread] += partial[r][c][thread + n];
                }
            }
        }
        barrier();
    }
    if (thread < NUM_ROWS * NUM_COLS) {
        const uint row = row0 + thread / NUM_COLS;
        const uint col = col0 + thread % NUM_COLS;
#if defined(MUL_MAT_ID)
        if (row < p.n_rows) {
#else
        if (row < p.n_rows && col < p.n_cols) {
#endif
            data_d[d + row + col * p.d_stride1] = partial[thread / NUM_COLS][thread % NUM_COLS][0];
        }
    }
}
