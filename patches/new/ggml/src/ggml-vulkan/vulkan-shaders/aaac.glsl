// How a thread reads the blocks of an AAAC type: one of DATA_A_AAAC4_G16, _G32, _G128 is defined. The push constants p of
// a shader that includes this begin with what decodes a tensor besides its blocks: uint codebooks[8]; float d; uint m;
//
// A word is 4 index bytes of a run. Their low nibbles are 4 weights, and their high nibbles are the 4 weights that start
// 32 later. Each of these two halves has one selector and one scale code in every type.
//
// The blocks of AAAC4_G16 are whole words of 32 bits, those of the other types are whole words of 16 bits. Nothing is
// read in bytes, because a device need not have 8-bit storage.

#extension GL_EXT_shader_16bit_storage : require

#if defined(DATA_A_AAAC4_G16)
#define A_TYPE      uint
#define BLOCK_SIZE  9   // in elements of A_TYPE
#define BLOCK_WORDS 8   // index words in a block
#elif defined(DATA_A_AAAC4_G32)
#define A_TYPE      uint16_t
#define BLOCK_SIZE  17
#define BLOCK_WORDS 8
#else
#define A_TYPE      uint16_t
#define BLOCK_SIZE  33
#define BLOCK_WORDS 16
#endif

layout (binding = 0) readonly buffer A { A_TYPE data_a[]; };

// Both codebooks: floats, or the byte of each level for a shader that multiplies integers.
#if defined(INTEGER_LEVELS)
shared uint levels[32];
#define LEVEL      uint
#define LEVEL_BITS uint
#else
shared float levels[32];
#define LEVEL      float
#define LEVEL_BITS int
#endif

void load_levels() {
    const uint i = gl_LocalInvocationIndex;
    if (i < 32) {
        levels[i] = LEVEL(bitfieldExtract(LEVEL_BITS(p.codebooks[i / 4]), int(8 * (i % 4)), 8));
    }
    barrier();
}

// Return index word w of the block that starts at element block.
uint index_word(const uint block, const uint w) {
#if defined(DATA_A_AAAC4_G16)
    return data_a[block + 1 + w];
#else
    return uint(data_a[block + 1 + 2 * w]) | uint(data_a[block + 2 + 2 * w]) << 16;
#endif
}

// Return the scale of scale code code.
float scale_of(const uint code) {
    precise const float scale = p.d * uintBitsToFloat(0x3F800000u + (code << (23 - p.m)));
    return code == 0 ? 0.0 : scale;
}

// Return the header of a block: its scale codes and selectors.
uint header_of(const uint block) {
    return uint(data_a[block]);
}

// Return the scale and the codebook of one half (0: low nibbles, 1: high) of word w. A codebook is 0 or 16, the offset of
// its levels, in each of 4 bytes.
void group_of(const uint header, const uint w, const uint high, out float scale, out uint book) {
#if defined(DATA_A_AAAC4_G16)
    const uint s = header >> (8 * (w / 4 + 2 * high));
    scale = scale_of(s & 0x7F);
    book  = (s >> 7 & 1) * 0x10101010u;
#elif defined(DATA_A_AAAC4_G32)
    const uint s = header >> (8 * high);
    scale = scale_of(s & 0x3F);
    book  = (s >> (6 + w / 4) & 1) * 0x10101010u;
#else
    scale = scale_of(header & 0x7F);
    book  = (header >> (8 + w / 8 * 4 + w / 4 % 2 + 2 * high) & 1) * 0x10101010u;
#endif
}

// Return the levels of the 4 weights whose indices are the low nibbles of the bytes of indices. Integers are in 4 bytes.
#if defined(INTEGER_LEVELS)
uint levels_of(const uint indices, const uint book) {
    const uint places = indices & 0x0F0F0F0Fu | book;
    return levels[bitfieldExtract(places, 0, 8)]       | levels[bitfieldExtract(places, 8, 8)]  << 8 |
           levels[bitfieldExtract(places, 16, 8)] << 16 | levels[bitfieldExtract(places, 24, 8)] << 24;
}
#else
vec4 levels_of(const uint indices, const uint book) {
    const uint places = indices & 0x0F0F0F0Fu | book;
    return vec4(levels[bitfieldExtract(places, 0, 8)], levels[bitfieldExtract(places, 8, 8)],
                levels[bitfieldExtract(places, 16, 8)], levels[bitfieldExtract(places, 24, 8)]);
}
#endif

// Return the column of the first weight of word w, counted over a row: 32 weights of a run have their low nibbles first.
uint column_of(const uint w) {
    return w / 8 * 64 + w % 8 * 4;
}
