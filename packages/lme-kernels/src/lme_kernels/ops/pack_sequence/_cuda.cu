// Packed and padded tokens: rows of bytes copied as `UNIT`, an integer whose size divides them and
// their addresses. `OFFSET` is the dtype of the offsets. Strides and widths are in units.

#include "cuda_elements.cuh"

// The bits of a pad, repeated.
struct Pad {
    unsigned long long low, high;

    __device__ __forceinline__ UNIT unit() const {
        UNIT value;
        memcpy(&value, this, sizeof(value));
        return value;
    }
};

// Number of ends at or before `token`: its sequence. Asked by all threads of a warp, each of which
// reads one of 32 places at a time.
__device__ __forceinline__ int sequence_by_warp(const OFFSET* ends, int sequences, long long token) {
    const int lane = threadIdx.x % 32;
    int low = 0, high = sequences;
    while (low < high) {
        const int step = (high - low + 31) / 32;
        const int place = low + (lane + 1) * step - 1;
        const bool passed = place < high && ends[place] <= token;
        const int count = __popc(__ballot_sync(0xffffffffu, passed));
        high = min(high, low + (count + 1) * step - 1);
        low = min(low + count * step, high);
    }
    return low;
}

// The same, asked by one thread.
__device__ __forceinline__ int sequence_by_thread(
    const OFFSET* ends, int sequences, long long token) {
    int low = 0, high = sequences;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (ends[middle] <= token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Where the row of a packed token begins in padded `x`; null if no sequence has it.
__device__ __forceinline__ const UNIT* padded_row(
    const UNIT* x,
    const OFFSET* offsets,
    long long token,
    int sequence,
    int sequences,
    long long max_seqlen,
    bool left,
    long long batch_stride,
    long long token_stride) {
    if (sequence >= sequences) return nullptr;
    const long long start = offsets[sequence], end = offsets[sequence + 1];
    const long long place = token - start + (left ? max_seqlen - (end - start) : 0);
    if (place < 0 || place >= max_seqlen) return nullptr;
    return x + sequence * batch_stride + place * token_stride;
}

// Where the row of a padded place begins in packed `x`; null if it is a pad.
__device__ __forceinline__ const UNIT* packed_row(
    const UNIT* x,
    const OFFSET* offsets,
    long long row,
    long long tokens,
    long long max_seqlen,
    bool left,
    long long token_stride) {
    const long long sequence = row / max_seqlen;
    long long place = row % max_seqlen;
    const long long start = offsets[sequence], end = offsets[sequence + 1];
    if (left) place -= max_seqlen - (end - start);
    const long long token = start + place;
    if (place < 0 || token < 0 || token >= end || token >= tokens) return nullptr;
    return x + token * token_stride;
}

// Units a thread copies of a row, 32 threads a part of it.
constexpr int STEPS = 8;

__device__ __forceinline__ void copy_part(
    const UNIT* __restrict__ from, UNIT* __restrict__ to, long long first, long long width, Pad pad) {
    const int lane = threadIdx.x % 32;
    UNIT values[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const long long column = first + step * 32 + lane;
        values[step] = from != nullptr && column < width ? from[column] : pad.unit();
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const long long column = first + step * 32 + lane;
        if (column < width) to[column] = values[step];
    }
}

__device__ __forceinline__ long long global_thread() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// A warp copies a part of a row: `parts` of them make the row.
extern "C" __global__ void __launch_bounds__(256) pack_wide(
    const UNIT* x, const OFFSET* offsets, UNIT* y, long long batch_stride, long long token_stride,
    long long width, long long tokens, long long max_seqlen, unsigned parts, int sequences,
    int left) {
    const long long warp = global_thread() / 32, token = warp / parts;
    if (token >= tokens) return;
    const int sequence = sequence_by_warp(offsets + 1, sequences, token);
    const UNIT* from = padded_row(
        x, offsets, token, sequence, sequences, max_seqlen, left, batch_stride, token_stride);
    copy_part(from, y + token * width, warp % parts * (32 * STEPS), width, Pad{0, 0});
}

extern "C" __global__ void __launch_bounds__(256) unpack_wide(
    const UNIT* x, const OFFSET* offsets, UNIT* y, long long token_stride, long long width,
    long long rows, long long tokens, long long max_seqlen, unsigned long long pad_low,
    unsigned long long pad_high, unsigned parts, int left) {
    const long long warp = global_thread() / 32, row = warp / parts;
    if (row >= rows) return;
    const UNIT* from = packed_row(x, offsets, row, tokens, max_seqlen, left, token_stride);
    copy_part(
        from, y + row * width, warp % parts * (32 * STEPS), width, Pad{pad_low, pad_high});
}

// A thread copies a unit: for rows narrower than a warp.
extern "C" __global__ void __launch_bounds__(256) pack_narrow(
    const UNIT* x, const OFFSET* offsets, UNIT* y, long long batch_stride, long long token_stride,
    long long width, long long tokens, long long max_seqlen, unsigned parts, int sequences,
    int left) {
    const long long index = global_thread(), token = index / width;
    if (token >= tokens) return;
    const int sequence = sequence_by_thread(offsets + 1, sequences, token);
    const UNIT* from = padded_row(
        x, offsets, token, sequence, sequences, max_seqlen, left, batch_stride, token_stride);
    y[index] = from != nullptr ? from[index % width] : Pad{0, 0}.unit();
}

extern "C" __global__ void __launch_bounds__(256) unpack_narrow(
    const UNIT* x, const OFFSET* offsets, UNIT* y, long long token_stride, long long width,
    long long rows, long long tokens, long long max_seqlen, unsigned long long pad_low,
    unsigned long long pad_high, unsigned parts, int left) {
    const long long index = global_thread(), row = index / width;
    if (row >= rows) return;
    const UNIT* from = packed_row(x, offsets, row, tokens, max_seqlen, left, token_stride);
    y[index] = from != nullptr ? from[index % width] : Pad{pad_low, pad_high}.unit();
}
