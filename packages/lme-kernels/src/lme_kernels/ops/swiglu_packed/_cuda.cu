// Gated linear unit of pairs (gate, up) that follow each other; `ELEMENT` is the dtype. Columns
// are pairs, strides elements between rows.

#include "cuda_elements.cuh"

// Pairs start where an element may; only vectors of them are known to start where they may.
template <int COUNT>
__device__ __forceinline__ void read_pairs(const ELEMENT* from, ELEMENT (&values)[2 * COUNT]) {
    if constexpr (COUNT == 1) {
        values[0] = from[0];
        values[1] = from[1];
    } else {
        read(from, values);
    }
}

template <int COUNT>
__device__ __forceinline__ void write_pairs(ELEMENT* to, const ELEMENT (&values)[2 * COUNT]) {
    if constexpr (COUNT == 1) {
        to[0] = values[0];
        to[1] = values[1];
    } else {
        write(to, values);
    }
}

template <int COUNT, int STEPS>
__device__ __forceinline__ void forward(
    const ELEMENT* __restrict__ x,
    ELEMENT* __restrict__ y,
    long long columns,
    const Part<COUNT, STEPS>& part) {
    if (part.is_whole(columns)) {
        ELEMENT pairs[STEPS][2 * COUNT];
        // All loads before the first use: they wait for memory together.
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            read_pairs<COUNT>(x + 2 * part.column(step), pairs[step]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            ELEMENT results[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                results[i] = swiglu(pairs[step][2 * i], pairs[step][2 * i + 1]);
            }
            write(y + part.column(step), results);
        }
        return;
    }
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const long long start = part.column(step);
#pragma unroll 1
        for (long long i = start; i < min(start + COUNT, columns); ++i) {
            y[i] = swiglu(x[2 * i], x[2 * i + 1]);
        }
    }
}

template <int COUNT, int STEPS>
__device__ __forceinline__ void backward(
    const ELEMENT* __restrict__ grad_y,
    const ELEMENT* __restrict__ x,
    ELEMENT* __restrict__ grad_x,
    long long columns,
    const Part<COUNT, STEPS>& part) {
    if (part.is_whole(columns)) {
        ELEMENT grads[STEPS][COUNT], pairs[STEPS][2 * COUNT];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            read(grad_y + part.column(step), grads[step]);
            read_pairs<COUNT>(x + 2 * part.column(step), pairs[step]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            ELEMENT results[2 * COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                swiglu_gradients(
                    grads[step][i], pairs[step][2 * i], pairs[step][2 * i + 1], results[2 * i],
                    results[2 * i + 1]);
            }
            write_pairs<COUNT>(grad_x + 2 * part.column(step), results);
        }
        return;
    }
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const long long start = part.column(step);
#pragma unroll 1
        for (long long i = start; i < min(start + COUNT, columns); ++i) {
            swiglu_gradients(
                grad_y[i], x[2 * i], x[2 * i + 1], grad_x[2 * i], grad_x[2 * i + 1]);
        }
    }
}

#define FORWARD(NAME, COUNT, STEPS)                                                         \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                 \
        const ELEMENT* x, ELEMENT* y, long long x_stride, long long y_stride,               \
        long long rows, long long columns, unsigned blocks) {                               \
        const Part<COUNT, STEPS> part(blocks);                                              \
        if (part.row >= rows) return;                                                       \
        forward(x + part.row * x_stride, y + part.row * y_stride, columns, part);           \
    }

#define BACKWARD(NAME, COUNT, STEPS)                                                        \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                 \
        const ELEMENT* grad_y, const ELEMENT* x, ELEMENT* grad_x, long long grad_y_stride,  \
        long long x_stride, long long grad_x_stride, long long rows, long long columns,     \
        unsigned blocks) {                                                                  \
        const Part<COUNT, STEPS> part(blocks);                                              \
        if (part.row >= rows) return;                                                       \
        backward(                                                                           \
            grad_y + part.row * grad_y_stride, x + part.row * x_stride,                     \
            grad_x + part.row * grad_x_stride, columns, part);                              \
    }

// 16 bytes of pairs a load where addresses allow it, else an element.
FORWARD(swiglu_packed_forward_vectors, 8 / sizeof(ELEMENT), 4)
FORWARD(swiglu_packed_forward_elements, 1, 8)
BACKWARD(swiglu_packed_backward_vectors, 8 / sizeof(ELEMENT), 2)
BACKWARD(swiglu_packed_backward_elements, 1, 8)
