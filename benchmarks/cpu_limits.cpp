// The two limits of token generation on a CPU, for cpu.py: `cpu_limits THREADS` prints JSON.
//   read       bytes per second that THREADS threads read from memory, each its own part of a buffer larger than the caches
//   kernels    weights per second of one thread's product of rows with one column, weights in the second-level cache
// The stock kernels are those that llama.cpp's repacked layouts take on x86, called as its matrix product calls them.

#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

extern "C" {
void ggml_cpu_init(void);
void ggml_gemv_q4_0_8x8_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
void ggml_gemv_q4_K_8x8_q8_K(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
void ggml_gemv_iq4_nl_8x8_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, int nr, int nc);
}

static double seconds(const std::function<void()> & f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static double read_bandwidth(int n_threads) {
    constexpr size_t N = size_t(256) << 20, ROUNDS = 9;
    std::vector<uint64_t> data(N/8, 1), sums(n_threads*8);
    std::vector<double> times;
    for (size_t round = 0; round < ROUNDS; ++round) {
        times.push_back(seconds([&] {
            std::vector<std::thread> threads;
            for (int t = 0; t < n_threads; ++t) {
                threads.emplace_back([&, t] {
                    uint64_t sum = 0;
                    for (size_t i = data.size()*t/n_threads; i < data.size()*(t + 1)/n_threads; ++i) {
                        sum += data[i];
                    }
                    sums[8*t] += sum;
                });
            }
            for (auto & t : threads) {
                t.join();
            }
        }));
    }
    if (sums[0] == 0) {
        exit(1); // the sums are in use
    }
    std::nth_element(times.begin(), times.begin() + ROUNDS/2, times.end());
    return N/times[ROUNDS/2];
}

constexpr int K = 2048, ROWS = 128; // 147 kB at 4.5 bits

struct kernel_times {
    std::map<std::string, double> least;
    void operator()(const char * name, const std::function<void()> & f) {
        const double t = seconds(f);
        const auto at = least.emplace(name, t).first;
        at->second = std::min(at->second, t);
    }
};

template <class T>
struct aaac_case {
    aaac::weights      w;
    std::vector<char>  rows, acts;
    aaac::act_view     act;
    float              out[ROWS];
    float            * outs[1] = { out };

    explicit aaac_case(const aaac_params * p) : w(p), rows(ROWS*aaac::row_bytes<T>(K)), acts(aaac::act_size(K) + 64) {
        for (char & c : rows) {
            c = (char) (rand() & 0x3F); // valid in every type
        }
        std::vector<float> x(K);
        for (float & v : x) {
            v = (float) (rand() % 201 - 100);
        }
        char * aligned = (char *) (((uintptr_t) acts.data() + 63)/64*64);
        aaac::quantize_act(x.data(), aligned, K, 0, K);
        act = aaac::act_view(aligned, K);
    }

    void operator()() { aaac::mul_rows<T>(w, rows.data(), aaac::row_bytes<T>(K), ROWS, K, &act, 1, outs); }
};

int main(int argc, char ** argv) {
    const int n_threads = argc > 1 ? atoi(argv[1]) : 1;
    ggml_cpu_init();

    alignas(64) static float out[ROWS];
    std::vector<char> weights(ROWS*K, 0x21), acts(2*K, 0x21);
    aaac_params params = {};
    params.d = 0.01f;
    params.m = 4;
    for (int i = 0; i < 16; ++i) {
        params.codebooks[0][i] = params.codebooks[1][i] = (int8_t) (15*i - 112);
    }
    aaac_case<aaac::g16>  g16(&params);
    aaac_case<aaac::g32>  g32(&params);
    aaac_case<aaac::g128> g128(&params);

    kernel_times time;
    for (int round = 0; round < 400; ++round) {
        time("Q4_0",   [&] { ggml_gemv_q4_0_8x8_q8_0  (K, out, 0, weights.data(), acts.data(), 1, ROWS); });
        time("IQ4_NL", [&] { ggml_gemv_iq4_nl_8x8_q8_0(K, out, 0, weights.data(), acts.data(), 1, ROWS); });
        time("Q4_K_S", [&] { ggml_gemv_q4_K_8x8_q8_K  (K, out, 0, weights.data(), acts.data(), 1, ROWS); });
        time("AAAC4_G16",  [&] { g16(); });
        time("AAAC4_G32",  [&] { g32(); });
        time("AAAC4_G128", [&] { g128(); });
    }
    printf("{\"read\": %.4g, \"kernels\": {", read_bandwidth(n_threads));
    const char * comma = "";
    for (const auto & [name, t] : time.least) {
        printf("%s\"%s\": %.4g", comma, name.c_str(), (double) ROWS*K/t);
        comma = ", ";
    }
    printf("}}\n");
}
