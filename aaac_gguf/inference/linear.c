// Decode AAAC blocks on a CPU, and multiply with them, for linear.py.
//
// Blocks are [n_rows, row_bytes], rows of k weights. Columns x are float32 [n, k] and products y are float32 [n, n_rows].
// docs/format.md describes the blocks. Compiled by compiler.py for this machine.

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { RUN_BYTES = 32, N_LEVELS = 16, N_SCALES = 128, MAX_COLUMNS = 4 };
enum { G16 = 80, G32 = 81, G128 = 82 };

// A unit is 16 weights: they share a scale and a selector, in every type. As floats it is PARTS vectors of LANES.
#if defined(__AVX512F__)
enum { UNIT = 16, LANES = 16, PARTS = UNIT / LANES };
#elif defined(__AVX2__)
enum { UNIT = 16, LANES = 8, PARTS = UNIT / LANES };
#else
enum { UNIT = 16, LANES = 4, PARTS = UNIT / LANES };
#endif

typedef uint8_t bytes __attribute__((vector_size(UNIT)));
typedef int8_t levels __attribute__((vector_size(UNIT)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float floats_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // anywhere in memory

// What decodes one tensor beside its blocks. The CUDA kernels take it in this form too.
typedef struct {
    int8_t books[2 * N_LEVELS];
    float d;
    uint8_t m;
} params;

typedef struct {
    const int8_t *books;
    float scales[N_SCALES];
} codec;

#define INLINE static inline __attribute__((always_inline))

// S(i) = d * f(i), and f(i) is the float whose bits are those of 1 plus i << (23 - m); S(0) is 0.
static codec codec_of(const params *p) {
    codec c = {p->books, {0}};
    for (uint32_t i = 1; i < N_SCALES; i++) {
        const uint32_t bits = 0x3F800000u + (i << (23 - p->m));
        float factor;
        memcpy(&factor, &bits, sizeof factor);
        c.scales[i] = p->d * factor;
    }
    return c;
}

INLINE int block_size(int type) { return type == G128 ? 128 : 64; }
INLINE int header_size(int type) { return type == G16 ? 4 : 2; }

// The scale code of unit j of a block, and its selector.
INLINE int scale_code(int type, const uint8_t *block, int j) {
    return type == G16 ? block[j] & 0x7F : type == G32 ? block[j / 2] & 0x3F : block[0] & 0x7F;
}

INLINE int selector(int type, const uint8_t *block, int j) {
    return type == G16 ? block[j] >> 7 : type == G32 ? block[j / 2] >> (6 + j % 2) & 1 : block[1] >> j & 1;
}

// Sixteen levels of a codebook by index: one instruction if the compiler can shuffle bytes by a vector.
INLINE levels look_up(const int8_t *book, bytes index) {
    levels table;
    memcpy(&table, book, N_LEVELS);
#if defined(__clang__)
    levels found;
    for (int i = 0; i < UNIT; i++) found[i] = table[index[i]];
    return found;
#else
    return __builtin_shuffle(table, (levels) index);
#endif
}

// GCC 12 converts lane by lane unless told the instruction, which is five times as slow.
INLINE void to_floats(levels from, floats to[PARTS]) {
#if defined(__AVX512F__)
    to[0] = (floats) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i) from));
#elif defined(__AVX2__)
    const __m128i low = (__m128i) from;
    to[0] = (floats) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    to[1] = (floats) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(low, low)));
#else
    for (int i = 0; i < UNIT; i++) to[i / LANES][i % LANES] = from[i];
#endif
}

// The weights of unit j of a block. Byte b of a run of 64 weights holds weight b in its low half, weight b + 32 in its high half.
INLINE void decode_unit(const codec *c, int type, const uint8_t *block, int j, floats w[PARTS]) {
    bytes index;
    memcpy(&index, block + header_size(type) + j / 4 * RUN_BYTES + j % 2 * UNIT, sizeof index);
    index = j % 4 < 2 ? index & 0x0F : index >> 4;
    to_floats(look_up(c->books + N_LEVELS * selector(type, block, j), index), w);
    for (int part = 0; part < PARTS; part++) w[part] *= c->scales[scale_code(type, block, j)];
}

INLINE void decode_row(const codec *c, int type, const uint8_t *row, int64_t k, float *out) {
    const int size = block_size(type);
    for (int64_t start = 0; start < k; start += size, row += header_size(type) + size / 2) {
        for (int j = 0; j < size / UNIT; j++) {
            floats w[PARTS];
            decode_unit(c, type, row, j, w);
            for (int part = 0; part < PARTS; part++) *(floats_at *) (out + start + UNIT * j + LANES * part) = w[part];
        }
    }
}

// Each weight is decoded once for all n columns.
INLINE void multiply_row(const codec *c, int type, const uint8_t *row, int64_t k, const float *x, int n, float *y, int64_t stride) {
    const int size = block_size(type);
    floats sums[MAX_COLUMNS][PARTS] = {0};
    for (int64_t start = 0; start < k; start += size, row += header_size(type) + size / 2) {
        for (int j = 0; j < size / UNIT; j++) {
            floats w[PARTS];
            decode_unit(c, type, row, j, w);
            for (int i = 0; i < n; i++) {
                const float *at = x + i * k + start + UNIT * j;
                for (int part = 0; part < PARTS; part++) sums[i][part] += w[part] * *(const floats_at *) (at + LANES * part);
            }
        }
    }
    for (int i = 0; i < n; i++) {
        float sum = 0;
        float lanes[UNIT];
        memcpy(lanes, sums[i], sizeof lanes);
        for (int l = 0; l < UNIT; l++) sum += lanes[l];
        y[i * stride] = sum;
    }
}

// The compiler makes code of its own for each type and number of columns.
#define FOR_EACH_TYPE(CALL) \
    switch (type) { \
        case G16: CALL(G16) break; \
        case G32: CALL(G32) break; \
        case G128: CALL(G128) break; \
    }

// out: float32 [n_rows, k], to the bit what format.decode gives.
void aaac_decode(int64_t type, const params *p, const uint8_t *blocks, int64_t row_bytes, int64_t n_rows, int64_t k, float *out) {
    const codec c = codec_of(p);
#pragma omp parallel for
    for (int64_t i = 0; i < n_rows; i++) {
#define DECODE(type) decode_row(&c, type, blocks + i * row_bytes, k, out + i * k);
        FOR_EACH_TYPE(DECODE)
    }
}

// y [n, n_rows] of 1 to MAX_COLUMNS columns x [n, k].
void aaac_multiply(int64_t type, const params *p, const uint8_t *blocks, int64_t row_bytes, int64_t n_rows, int64_t k, const float *x,
                   int64_t n, float *y) {
    const codec c = codec_of(p);
#pragma omp parallel for
    for (int64_t i = 0; i < n_rows; i++) {
#define COLUMNS(type, n) case n: multiply_row(&c, type, blocks + i * row_bytes, k, x, n, y + i, n_rows); break;
#define MULTIPLY(type) switch (n) { COLUMNS(type, 1) COLUMNS(type, 2) COLUMNS(type, 3) COLUMNS(type, 4) }
        FOR_EACH_TYPE(MULTIPLY)
    }
}
