// The patch's CUDA backend on the host: its test program test-aaac with the operation done by the emulated CUDA files instead of the CPU backend.
// AAAC_CUDA_FILES is the text of those files with their launches rewritten, see test_cuda_backend.py.
//
// With AAAC_FUSE=1 in the environment a product is done as ggml fuses it: (w x + bias) * silu(gate x + gate_bias), where the gate has the blocks of w
// but a scale base twice as large, bias[row] is row / 100 (+ 10 * expert), and gate_bias is -1/2.

#include "cuda_emulator.h"

namespace emulator {

struct config { dim3 grid; int64_t threads; size_t shared; void * stream; };

template <class... P, class... A> void call(const config & c, void (*kernel)(P...), const A &... args) {
    launch(c.grid, (int) c.threads, [&] { kernel(args...); });
}

} // namespace emulator

#include AAAC_CUDA_FILES

#include "ggml-backend.h"
#include "ggml-cpu.h"

static void compute_fused(ggml_tensor * op) {
    ggml_context * ctx = ggml_init({ 8*ggml_tensor_overhead() + 4*ggml_nbytes(op) + (1 << 20), nullptr, false });
    const ggml_tensor * w = op->src[0];
    const bool experts = op->op == GGML_OP_MUL_MAT_ID;

    ggml_tensor gate = *w;
    aaac_params params = *ggml_aaac_get_params(w);
    params.d *= 2.0f;
    gate.view_src = nullptr;
    memcpy(gate.op_params, &params, sizeof(params));

    ggml_tensor * bias = experts ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, w->ne[1], w->ne[2]) : ggml_dup_tensor(ctx, op);
    ggml_tensor * gate_bias = ggml_dup_tensor(ctx, bias);
    for (int64_t i = 0; i < ggml_nelements(bias); ++i) {
        ((float *) bias->data)[i]      = i % w->ne[1]*0.01f + (experts ? i/w->ne[1]*10.0f : 0.0f);
        ((float *) gate_bias->data)[i] = -0.5f;
    }
    ggml_cuda_mm_fusion_args_host fusion;
    fusion.gate      = &gate;
    fusion.x_bias    = bias;
    fusion.gate_bias = gate_bias;
    fusion.glu_op    = GGML_GLU_OP_SWIGLU;
    ggml_backend_cuda_context cuda;
    ggml_cuda_aaac_mul_mat_vec(cuda, w, op->src[1], experts ? op->src[2] : nullptr, op, &fusion);
    ggml_free(ctx);
}

static ggml_status emulated_graph_compute(ggml_backend_t, ggml_cgraph * graph) {
    ggml_backend_cuda_context cuda;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * op = ggml_graph_node(graph, i);
        if (op->op == GGML_OP_VIEW) {
            continue;
        }
        memset(op->data, 0xFF, ggml_nbytes(op)); // NaNs: what is not written shows
        if (getenv("AAAC_FUSE")) {
            compute_fused(op);
        } else if (!ggml_cuda_aaac_compute_forward(cuda, op)) {
            return GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}

static bool emulated_supports_op(ggml_backend_t, const ggml_tensor * op) {
    return ggml_cuda_aaac_supports_op(900, op);
}

#define ggml_backend_graph_compute emulated_graph_compute
#define ggml_backend_supports_op   emulated_supports_op
#include "test-aaac.cpp"
