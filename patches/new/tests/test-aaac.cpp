// Run one operation on AAAC weights, for tests in other languages: on the CPU backend, or on a device by its name.
//
//   test-aaac [DEVICE] < request > result
//
// request, little-endian:
//   int32   op          0 GET_ROWS, 1 CPY to F32, 2 CPY to F16, 3 CPY to BF16, 4 MUL_MAT, 5 MUL_MAT_ID
//   int32   type        80, 81 or 82
//   int32   n_threads
//   int32   first_row   if it is not 0, the operation gets a view of the weights that starts at this row
//   int64   ne0[4]      of the weights
//   int64   ne1[4]      of the second operand
//   int64   ne2[4]      of the ids of MUL_MAT_ID
//   int8    codebooks[32]
//   float32 d
//   uint8   m
//   bytes   weights
//   bytes   second operand: int32 rows (GET_ROWS), float32 activations (MUL_MAT, MUL_MAT_ID), nothing (CPY)
//   int32   ids of MUL_MAT_ID
// result: the bytes of the operation's output

#include "ggml.h"
#include "ggml-aaac.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#endif

enum test_op { OP_GET_ROWS, OP_CPY_F32, OP_CPY_F16, OP_CPY_BF16, OP_MUL_MAT, OP_MUL_MAT_ID };

static void read_bytes(void * data, size_t size) {
    if (fread(data, 1, size, stdin) != size) {
        fprintf(stderr, "test-aaac: the request ends early\n");
        exit(2);
    }
}

static void read_tensor(ggml_tensor * t) {
    std::vector<char> data(ggml_nbytes(t));
    read_bytes(data.data(), data.size());
    ggml_backend_tensor_set(t, data.data(), 0, data.size());
}

int main(int argc, char ** argv) {
#if defined(_WIN32)
    _setmode(_fileno(stdin),  _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    int32_t head[4];
    int64_t ne[3][4];
    int8_t  codebooks[32];
    float   d;
    uint8_t m;
    read_bytes(head, sizeof(head));
    read_bytes(ne, sizeof(ne));
    read_bytes(codebooks, sizeof(codebooks));
    read_bytes(&d, sizeof(d));
    read_bytes(&m, sizeof(m));
    const auto [op, type, n_threads, first_row] = head;

    if (const char * error = ggml_aaac_params_error(codebooks, d, m)) {
        fprintf(stderr, "test-aaac: %s\n", error);
        return 2;
    }

    ggml_context * ctx = ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true });
    ggml_tensor * weights = ggml_new_tensor(ctx, (ggml_type) type, 4, ne[0]);
    ggml_aaac_set_params(weights, codebooks, d, m);
    ggml_tensor * w = weights;
    if (first_row > 0) {
        w = ggml_view_4d(ctx, weights, ne[0][0], ne[0][1] - first_row, ne[0][2], ne[0][3],
                         weights->nb[1], weights->nb[2], weights->nb[3], first_row*weights->nb[1]);
    }

    ggml_tensor * src1 = nullptr;
    ggml_tensor * ids  = nullptr;
    ggml_tensor * out  = nullptr;
    switch (op) {
        case OP_GET_ROWS:
            src1 = ggml_new_tensor(ctx, GGML_TYPE_I32, 4, ne[1]);
            out  = ggml_get_rows(ctx, w, src1);
            break;
        case OP_CPY_F32:  out = ggml_cast(ctx, w, GGML_TYPE_F32);  break;
        case OP_CPY_F16:  out = ggml_cast(ctx, w, GGML_TYPE_F16);  break;
        case OP_CPY_BF16: out = ggml_cast(ctx, w, GGML_TYPE_BF16); break;
        case OP_MUL_MAT:
            src1 = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne[1]);
            out  = ggml_mul_mat(ctx, w, src1);
            break;
        case OP_MUL_MAT_ID:
            src1 = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne[1]);
            ids  = ggml_new_tensor(ctx, GGML_TYPE_I32, 4, ne[2]);
            out  = ggml_mul_mat_id(ctx, w, src1, ids);
            break;
        default: fprintf(stderr, "test-aaac: unknown op %d\n", op); return 2;
    }

    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_backend_t backend = argc > 1 ? ggml_backend_init_by_name(argv[1], nullptr) : ggml_backend_cpu_init();
    if (!backend) {
        fprintf(stderr, "test-aaac: no device %s\n", argv[1]);
        return 2;
    }
    if (ggml_backend_is_cpu(backend)) {
        ggml_backend_cpu_set_n_threads(backend, n_threads);
    }
    if (!ggml_backend_supports_op(backend, out)) {
        fprintf(stderr, "test-aaac: %s does not support this\n", ggml_backend_name(backend));
        return 3;
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    read_tensor(weights);
    if (src1) { read_tensor(src1); }
    if (ids)  { read_tensor(ids); }
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        return 4;
    }

    std::vector<char> result(ggml_nbytes(out));
    ggml_backend_tensor_get(out, result.data(), 0, result.size());
    fwrite(result.data(), 1, result.size(), stdout);

    ggml_backend_buffer_free(buffer);
    ggml_backend_free(backend);
    ggml_free(ctx);
    return 0;
}
