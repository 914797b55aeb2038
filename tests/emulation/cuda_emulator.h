// Run CUDA kernels on the host, one block at a time, every thread a fiber: as much of the language as cuda_kernels/ uses.
// Warp operations and barriers switch fibers. So indexing, shared memory and the exchange between threads are tested.
// Time, memory coalescing and races that need true parallelism are not.

#pragma once

#define AAAC_EMULATE

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static // a block at a time, so the threads of one block share what all blocks share
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x((unsigned) x), y((unsigned) y), z((unsigned) z) {}
};

namespace emulator {

constexpr int WARP = 32, STACK = 128*1024;

struct barrier { int arrived = 0, generation = 0; };
struct warp_state { barrier b; uint32_t word[WARP]; const void * pointer[WARP]; uint32_t fragment[WARP][6]; };

inline ucontext_t scheduler;
inline std::vector<ucontext_t> fibers;
inline std::vector<bool> done;
inline std::vector<warp_state> warps;
inline barrier block_barrier;
inline int current, n_threads;
inline uint32_t order = 1;
inline std::function<void()> body;

inline void wait(barrier & b, int all) {
    const int generation = b.generation;
    if (++b.arrived == all) {
        b.arrived = 0;
        b.generation++;
        return;
    }
    while (b.generation == generation) {
        swapcontext(&fibers[current], &scheduler);
    }
}

inline warp_state & warp() { return warps[current/WARP]; }
inline int lane() { return current % WARP; }
inline void sync_warp() { wait(warp().b, WARP); }

inline void entry() {
    body();
    done[current] = true;
    swapcontext(&fibers[current], &scheduler);
}

} // namespace emulator

static dim3 threadIdx, blockIdx, blockDim;

inline void __syncthreads() { emulator::wait(emulator::block_barrier, emulator::n_threads); }
inline void __syncwarp() { emulator::sync_warp(); }

template <class V> V __shfl_xor_sync(uint32_t, V value, int mask) {
    using namespace emulator;
    static_assert(sizeof(V) == 4, "32-bit values only");
    memcpy(&warp().word[lane()], &value, 4);
    sync_warp();
    memcpy(&value, &warp().word[lane() ^ mask], 4);
    sync_warp();
    return value;
}

template <class V> V __shfl_sync(uint32_t, V value, int from, int width) {
    using namespace emulator;
    static_assert(sizeof(V) == 4, "32-bit values only");
    memcpy(&warp().word[lane()], &value, 4);
    sync_warp();
    memcpy(&value, &warp().word[lane()/width*width + from], 4);
    sync_warp();
    return value;
}

inline void aaac_ldmatrix(const uint16_t * row, uint32_t * out) {
    using namespace emulator;
    if ((uintptr_t) row % 16) {
        fprintf(stderr, "ldmatrix: address is not a multiple of 16\n");
        abort();
    }
    warp().pointer[lane()] = row;
    sync_warp();
    for (int i = 0; i < 4; ++i) {
        memcpy(&out[i], (const uint16_t *) warp().pointer[8*i + lane()/4] + lane() % 4*2, 4);
    }
    sync_warp();
}

struct aaac_f16;
struct aaac_bf16;
inline float emulated_half(const aaac_f16 *, uint32_t bits) {
    const uint16_t low = (uint16_t) bits;
    _Float16 h;
    memcpy(&h, &low, 2);
    return (float) h;
}
inline float emulated_half(const aaac_bf16 *, uint32_t bits) {
    bits <<= 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// d[16][8] += a[16][16]*b[16][8] with the fragment layouts of mma.m16n8k16; the sum in double, rounded once
template <class M> void aaac_mma(M, float * d, const uint32_t * a, const uint32_t * b) {
    using namespace emulator;
    memcpy(warp().fragment[lane()],     a, 16);
    memcpy(warp().fragment[lane()] + 4, b, 8);
    sync_warp();
    for (int v = 0; v < 4; ++v) {
        const int row = lane()/4 + v/2*8, col = lane() % 4*2 + v % 2;
        double sum = d[v];
        for (int k = 0; k < 16; ++k) {
            const uint32_t wa = warp().fragment[row % 8*4 + k % 8/2][row/8 + k/8*2];
            const uint32_t wb = warp().fragment[col*4 + k % 8/2][4 + k/8];
            sum += (double) emulated_half((const M *) nullptr, wa >> k % 2*16)*emulated_half((const M *) nullptr, wb >> k % 2*16);
        }
        d[v] = (float) sum;
    }
    sync_warp();
}

// kernel<<<grid, threads>>>(...) with the call in a lambda
inline void launch(dim3 grid, int threads, std::function<void()> call) {
    using namespace emulator;
    static std::vector<std::unique_ptr<char[]>> stacks;
    while ((int) stacks.size() < threads) {
        stacks.emplace_back(new char[STACK]);
    }
    n_threads = threads;
    blockDim = dim3(threads);
    body = std::move(call);
    fibers.resize(threads);
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                warps.assign(threads/WARP, {});
                block_barrier = {};
                done.assign(threads, false);
                for (int i = 0; i < threads; ++i) {
                    getcontext(&fibers[i]);
                    fibers[i].uc_stack.ss_sp   = stacks[i].get();
                    fibers[i].uc_stack.ss_size = STACK;
                    fibers[i].uc_link          = &scheduler;
                    makecontext(&fibers[i], (void (*)()) entry, 0);
                }
                for (int left = threads; left > 0;) {
                    // a new order each time, and some warps stall: a reader that should have waited for a writer comes first sooner or later
                    order = order*1664525u + 1013904223u;
                    for (int i = 0; i < threads; ++i) {
                        current = ((order >> 31 ? i : threads - 1 - i) + (int) (order >> 8 & 1023)) % threads;
                        if (!done[current] && !(order >> (current/WARP + 12) & 1)) {
                            threadIdx.x = current;
                            swapcontext(&scheduler, &fibers[current]);
                            left -= done[current];
                        }
                    }
                }
            }
        }
    }
}
