#pragma once

inline float ggml_cuda_op_silu_single(float x) { return x/(1.0f + expf(-x)); }
inline float ggml_cuda_op_gelu_single(float x) { return 0.5f*x*(1.0f + tanhf(0.79788456080286535588f*x*(1.0f + 0.044715f*x*x))); }
inline float ggml_cuda_op_swiglu_oai_single(float x, float g, float alpha = 1.702f, float limit = 7.0f) {
    x = fminf(x, limit);
    g = fmaxf(fminf(g, limit), -limit);
    return x/(1.0f + expf(-x*alpha))*(1.0f + g);
}
inline float ggml_cuda_op_swiglu_clamp_single(float gate, float up, float limit) {
    return ggml_cuda_op_silu_single(fminf(gate, limit))*fmaxf(fminf(up, limit), -limit);
}
