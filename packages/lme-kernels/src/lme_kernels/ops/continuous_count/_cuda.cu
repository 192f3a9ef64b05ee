// Histogram of integers of dtype `INTEGER`, by additions of integers: exact in any order.

#include "cuda_elements.cuh"

// Integers a vector, which has 16 bytes.
constexpr int COUNT = 16 / sizeof(INTEGER);

extern __shared__ int shared[];

template <class Add>
__device__ __forceinline__ void for_each(
    const INTEGER* __restrict__ x, long long size, bool aligned, Add add) {
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long vectors = aligned ? size / COUNT : 0;
    for (long long vector = thread; vector < vectors; vector += threads) {
        INTEGER values[COUNT];
        read(x + vector * COUNT, values);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) add(values[i]);
    }
    for (long long i = vectors * COUNT + thread; i < size; i += threads) add(x[i]);
}

// Both add to `counts`, which is zero. `aligned` says that `x` may be read by vectors.

// A block counts in shared memory first.
extern "C" __global__ void __launch_bounds__(256) count_shared(
    const INTEGER* x, int* counts, long long size, int bins, int aligned) {
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) shared[bin] = 0;
    __syncthreads();
    for_each(x, size, aligned, [&](INTEGER value) {
        if (value >= 0 && value < bins) atomicAdd(shared + value, 1);
    });
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
        if (shared[bin] != 0) atomicAdd(counts + bin, shared[bin]);
    }
}

// For bins that do not fit there.
extern "C" __global__ void __launch_bounds__(256) count_global(
    const INTEGER* x, int* counts, long long size, int bins, int aligned) {
    for_each(x, size, aligned, [&](INTEGER value) {
        if (value >= 0 && value < bins) atomicAdd(counts + value, 1);
    });
}
