// What CUDA C++ of this package needs, for a CPU: the threads of a block take turns in one thread
// of the CPU, each until it waits for the others. Slow and exact: it proves arithmetic, indices and
// synchronisation, not speed.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

// A GPU refuses a vector at an address that its size does not divide.
inline bool misaligned = false;

template <class Type, class Pointer>
Type* aligned(Pointer* at) {
    misaligned |= reinterpret_cast<unsigned long long>(at) % sizeof(Type) != 0;
    return reinterpret_cast<Type*>(at);
}

struct Three {
    unsigned x, y, z;
};

inline Three threadIdx, blockIdx, blockDim, gridDim;

// Dynamic shared memory, with room behind it that must not be written.
inline int shared[12288 + 64];

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

struct Barrier {
    int alive = 0, arrived = 0, generation = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<long long> slots;
    ucontext_t scheduler;
    int current = 0;
    bool progressed = false;
};

inline Block block;

inline void release_if_full(Barrier& barrier) {
    if (barrier.alive > 0 && barrier.arrived == barrier.alive) {
        barrier.arrived = 0;
        ++barrier.generation;
        block.progressed = true;
    }
}

inline void wait_at(Barrier& barrier) {
    const int generation = barrier.generation;
    ++barrier.arrived;
    release_if_full(barrier);
    while (barrier.generation == generation) {
        swapcontext(&block.fibers[block.current].context, &block.scheduler);
    }
}

inline void __syncthreads() { wait_at(block.all); }

inline void __syncwarp() { wait_at(block.warps[block.current / 32]); }

// Show `value` to the warp and call `use` with those of its lanes.
template <class Use>
auto with_warp(long long value, Use use) {
    const int first = block.current / 32 * 32;
    block.slots[block.current] = value;
    __syncwarp();
    const auto result = use(&block.slots[first], block.current - first);
    __syncwarp();
    return result;
}

inline unsigned __ballot_sync(unsigned, bool value) {
    return with_warp(value, [](const long long* values, int) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= unsigned(values[lane] != 0) << lane;
        return bits;
    });
}

inline unsigned __match_any_sync(unsigned, int value) {
    return with_warp(value, [=](const long long* values, int) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= unsigned(values[lane] == value) << lane;
        return bits;
    });
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
    return with_warp(value, [=](const long long* values, int lane) {
        return int(values[lane >= distance ? lane - distance : lane]);
    });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float __expf(float x) { return std::exp(x); }

inline float __fdividef(float x, float y) { return x / y; }

inline float float_of_half(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof(half));
    return float(half);
}

inline unsigned short half_of_float(float value) {
    const _Float16 half = _Float16(value);
    unsigned short bits;
    memcpy(&bits, &half, sizeof(bits));
    return bits;
}

using Body = void (*)(void** parameters);

inline Body body;
inline void** body_parameters;

inline void run_fiber() {
    body(body_parameters);
    Fiber& fiber = block.fibers[block.current];
    fiber.done = true;
    block.progressed = true;
    Barrier& warp = block.warps[block.current / 32];
    --block.all.alive;
    --warp.alive;
    release_if_full(block.all);
    release_if_full(warp);
    swapcontext(&fiber.context, &block.scheduler);
}

// Run one block; false if its threads wait for each other for ever.
inline bool run_block() {
    constexpr int STACK = 64 * 1024;
    const int threads = blockDim.x * blockDim.y;
    block.fibers.resize(threads);
    block.slots.assign(threads + 32, 0);
    block.warps.assign((threads + 31) / 32, Barrier{});
    block.all = Barrier{threads};
    for (int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = block.fibers[thread];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        fiber.done = false;
        ++block.warps[thread / 32].alive;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    while (block.all.alive > 0) {
        block.progressed = false;
        for (int thread = 0; thread < threads; ++thread) {
            if (block.fibers[thread].done) continue;
            block.current = thread;
            threadIdx = {thread % blockDim.x, thread / blockDim.x, 0};
            swapcontext(&block.scheduler, &block.fibers[thread].context);
        }
        if (!block.progressed) return false;
    }
    return true;
}

template <class... Parameters, std::size_t... I>
void call(void (*kernel)(Parameters...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(parameters[I])...);
}

template <class... Parameters>
void call_with(void (*kernel)(Parameters...), void** parameters) {
    call(kernel, parameters, std::index_sequence_for<Parameters...>{});
}

// 0, or 1 for a deadlock, 2 for writing behind the shared memory that was asked for.
inline int launch(Body kernel, void** parameters, unsigned grid, unsigned x, unsigned y, int bytes) {
    body = kernel;
    body_parameters = parameters;
    gridDim = {grid, 1, 1};
    blockDim = {x, y, 1};
    misaligned = false;
    for (unsigned each = 0; each < grid; ++each) {
        blockIdx = {each, 0, 0};
        // Shared memory holds what another kernel left.
        std::fill(std::begin(shared), std::end(shared), -1234567);
        if (!run_block()) return 1;
        if (misaligned) return 4;
        if (std::any_of(shared + bytes / 4, std::end(shared), [](int v) { return v != -1234567; })) {
            return 2;
        }
    }
    return 0;
}
