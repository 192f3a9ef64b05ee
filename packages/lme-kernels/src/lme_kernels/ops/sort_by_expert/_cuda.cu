// Counting sort by expert, stable: every warp takes entries that follow each other. Indices have the
// dtype `INTEGER`. Sums are of integers, exact in any order.

extern __shared__ int shared[];

constexpr int WARPS = 8;
constexpr unsigned ALL = 0xffffffffu;

// The nearest expert that exists.
__device__ __forceinline__ int expert_of(INTEGER index, int experts) {
    return static_cast<int>(index < 0 ? 0 : index < experts ? index : experts - 1);
}

// Entries of a block, `span` of them.
struct Entries {
    long long first, last;

    __device__ __forceinline__ Entries(long long block, long long span, long long size) {
        first = min(block * span, size);
        last = min(first + span, size);
    }
};

// Count the entries of each expert in each block, into `counts` (blocks, experts).
template <bool SHARED>
__device__ __forceinline__ void count(
    const INTEGER* __restrict__ indices, int* counts, long long size, long long span, int experts) {
    counts += static_cast<long long>(blockIdx.x) * experts;
    for (int each = threadIdx.x; each < experts; each += blockDim.x) {
        (SHARED ? shared : counts)[each] = 0;
    }
    __syncthreads();
    const Entries entries(blockIdx.x, span, size);
    for (long long i = entries.first + threadIdx.x; i < entries.last; i += blockDim.x) {
        const int expert = expert_of(indices[i], experts);
        if constexpr (SHARED) {
            atomicAdd(shared + expert, 1);
        } else {
            atomicAdd(counts + expert, 1);
        }
    }
    if constexpr (SHARED) {
        __syncthreads();
        for (int each = threadIdx.x; each < experts; each += blockDim.x) counts[each] = shared[each];
    }
}

// Sum over the warps of a block of what its threads give, of those before this thread; and of all.
__device__ __forceinline__ int sum_before(int value, int& all) {
    __shared__ int of_warps[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(ALL, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) of_warps[warp] = sum;
    __syncthreads();
    int before = sum - value;
    all = 0;
#pragma unroll
    for (int each = 0; each < WARPS; ++each) {
        if (each < warp) before += of_warps[each];
        all += of_warps[each];
    }
    __syncthreads();
    return before;
}

// Place the entries of a block. `memory` has 2 + WARPS numbers an expert: entries of all blocks,
// those of the blocks before, then for each warp where its next entry of the expert goes.
__device__ __forceinline__ void place(
    const INTEGER* __restrict__ indices, const int* __restrict__ counts, int* memory, int* ends,
    int* order, int* position, long long size, long long span, int experts) {
    int* const total = memory;
    int* const before = memory + experts;
    int* const next = memory + 2 * experts;
    for (int i = threadIdx.x; i < (2 + WARPS) * experts; i += blockDim.x) memory[i] = 0;
    __syncthreads();
    // Several threads share the blocks of an expert where there are more threads than experts.
    int width = 1;
    while (width < experts && width < blockDim.x) width *= 2;
    for (int each = threadIdx.x % width; each < experts; each += width) {
        int sum = 0, sum_of_before = 0;
#pragma unroll 8
        for (int block = threadIdx.x / width; block < gridDim.x; block += blockDim.x / width) {
            const int count = counts[static_cast<long long>(block) * experts + each];
            sum += count;
            sum_of_before += block < blockIdx.x ? count : 0;
        }
        atomicAdd(total + each, sum);
        atomicAdd(before + each, sum_of_before);
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long span_of_warp = span / WARPS;
    const Entries of_block(blockIdx.x, span, size);
    const long long first = min(of_block.first + warp * span_of_warp, of_block.last);
    const long long last = min(first + span_of_warp, of_block.last);
    for (long long i = first + lane; i < last; i += 32) {
        atomicAdd(next + warp * experts + expert_of(indices[i], experts), 1);
    }
    __syncthreads();
    int start = 0;
    for (int base = 0; base < experts; base += blockDim.x) {
        const int each = base + threadIdx.x;
        const int value = each < experts ? total[each] : 0;
        int all;
        const int first_of_all = start + sum_before(value, all);
        start += all;
        if (each < experts) {
            if (blockIdx.x == 0) ends[each] = first_of_all + value;
            int to = first_of_all + before[each];
#pragma unroll
            for (int other = 0; other < WARPS; ++other) {
                const int count = next[other * experts + each];
                next[other * experts + each] = to;
                to += count;
            }
        }
    }
    __syncthreads();
    int* const mine = next + warp * experts;
    for (long long base = first; base < last; base += 32) {
        const long long i = base + lane;
        const int expert = i < last ? expert_of(indices[i], experts) : -1;
        // Lanes with the same expert, and how many of them came before this one.
        const unsigned same = __match_any_sync(ALL, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int to = expert < 0 ? 0 : mine[expert] + rank;
        __syncwarp();
        if (expert >= 0) {
            if (rank == 0) mine[expert] = to + __popc(same);
            position[i] = to;
            order[to] = static_cast<int>(i);
        }
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(256) count_shared(
    const INTEGER* indices, int* counts, long long size, long long span, int experts) {
    count<true>(indices, counts, size, span, experts);
}

extern "C" __global__ void __launch_bounds__(256) count_global(
    const INTEGER* indices, int* counts, long long size, long long span, int experts) {
    count<false>(indices, counts, size, span, experts);
}

extern "C" __global__ void __launch_bounds__(256) place_shared(
    const INTEGER* indices, const int* counts, int* memory, int* ends, int* order, int* position,
    long long size, long long span, int experts) {
    place(indices, counts, shared, ends, order, position, size, span, experts);
}

// For experts that do not fit in shared memory.
extern "C" __global__ void __launch_bounds__(256) place_global(
    const INTEGER* indices, const int* counts, int* memory, int* ends, int* order, int* position,
    long long size, long long span, int experts) {
    memory += static_cast<long long>(blockIdx.x) * (2 + WARPS) * experts;
    place(indices, counts, memory, ends, order, position, size, span, experts);
}
