// The CPU kernels of the patch without ggml, for test_cpu_kernels.py, which compiles this for one instruction set after another.
//
// stdin, little-endian: int32 type, k, n_rows, n_cols; int8 codebooks[32], float d, uint8 m; blocks of n_rows rows; float x[n_cols][k]
// stdout: int32 TILE_ROWS; int8 q[n_cols][k]; float d[n_cols][k/32]; float by_row[n_cols][n_rows]; float by_tile[n_cols][n_rows]

#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

static void read_bytes(void * data, size_t size) {
    if (fread(data, 1, size, stdin) != size) {
        exit(2);
    }
}

static void write_bytes(const void * data, size_t size) {
    fwrite(data, 1, size, stdout);
}

template <class T>
static void run(int k, int n_rows, int n_cols) {
    using namespace aaac;

    aaac_params params;
    read_bytes(params.codebooks, sizeof(params.codebooks));
    read_bytes(&params.d, sizeof(params.d));
    read_bytes(&params.m, sizeof(params.m));
    const size_t stride = k/T::size*sizeof(typename T::block);
    std::vector<char>  rows(n_rows*stride);
    std::vector<float> x(n_cols*k);
    read_bytes(rows.data(), rows.size());
    read_bytes(x.data(), x.size()*sizeof(float));

    const weights w(&params);
    const size_t act_bytes = act_size(k);
    std::vector<char>     buffer(n_cols*act_bytes + tile_size(k) + 64);
    std::vector<act_view> acts(n_cols);
    char * aligned = (char *) (((uintptr_t) buffer.data() + 63)/64*64);
    for (int c = 0; c < n_cols; ++c) {
        quantize_act(&x[c*k], aligned + c*act_bytes, k, 0, k);
        acts[c] = act_view(aligned + c*act_bytes, k);
    }
    char * tile = aligned + n_cols*act_bytes;

    std::vector<float> by_row(n_cols*n_rows), by_tile(n_cols*n_rows), padded(n_cols*TILE_ROWS);
    std::vector<float *> out(n_cols);
    for (int c = 0; c < n_cols; ++c) {
        out[c] = &padded[c*TILE_ROWS];
    }
    for (int row0 = 0; row0 < n_rows; row0 += TILE_ROWS) {
        const int n = n_rows - row0 < TILE_ROWS ? n_rows - row0 : TILE_ROWS;
        decode_tile<T>(w, &rows[row0*stride], stride, n, k, tile);
        mul_tile<T>(tile, k, acts.data(), n_cols, out.data());
        for (int c = 0; c < n_cols; ++c) {
            memcpy(&by_tile[c*n_rows + row0], out[c], n*sizeof(float));
        }
    }
    for (int c = 0; c < n_cols; ++c) {
        out[c] = &by_row[c*n_rows];
    }
    mul_rows<T>(w, rows.data(), stride, n_rows, k, acts.data(), n_cols, out.data());

    const int tile_rows = TILE_ROWS;
    write_bytes(&tile_rows, sizeof(tile_rows));
    for (const act_view & a : acts) { write_bytes(a.q, k); }
    for (const act_view & a : acts) { write_bytes(a.d, k/ACT_BLOCK*sizeof(float)); }
    write_bytes(by_row.data(),  by_row.size()*sizeof(float));
    write_bytes(by_tile.data(), by_tile.size()*sizeof(float));
}

int main() {
    int32_t head[4];
    read_bytes(head, sizeof(head));
    switch (head[0]) {
        case 80: run<aaac::g16 >(head[1], head[2], head[3]); break;
        case 81: run<aaac::g32 >(head[1], head[2], head[3]); break;
        case 82: run<aaac::g128>(head[1], head[2], head[3]); break;
        default: return 2;
    }
    return 0;
}
