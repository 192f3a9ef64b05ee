// Gated linear unit with SiLU; `ELEMENT` is the dtype. Strides are in elements, between rows.

#include "cuda_elements.cuh"

template <int COUNT, int STEPS>
__device__ __forceinline__ void forward(
    const ELEMENT* __restrict__ gate,
    const ELEMENT* __restrict__ up,
    ELEMENT* __restrict__ y,
    long long columns,
    const Part<COUNT, STEPS>& part) {
    if (part.is_whole(columns)) {
        ELEMENT gates[STEPS][COUNT], ups[STEPS][COUNT];
        // All loads before the first use: they wait for memory together.
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            read(gate + part.column(step), gates[step]);
            read(up + part.column(step), ups[step]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            ELEMENT results[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) results[i] = swiglu(gates[step][i], ups[step][i]);
            write(y + part.column(step), results);
        }
        return;
    }
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const long long start = part.column(step);
#pragma unroll 1
        for (long long i = start; i < min(start + COUNT, columns); ++i) y[i] = swiglu(gate[i], up[i]);
    }
}

template <int COUNT, int STEPS>
__device__ __forceinline__ void backward(
    const ELEMENT* __restrict__ grad_y,
    const ELEMENT* __restrict__ gate,
    const ELEMENT* __restrict__ up,
    ELEMENT* __restrict__ grad_gate,
    ELEMENT* __restrict__ grad_up,
    long long columns,
    const Part<COUNT, STEPS>& part) {
    if (part.is_whole(columns)) {
        ELEMENT grads[STEPS][COUNT], gates[STEPS][COUNT], ups[STEPS][COUNT];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            read(grad_y + part.column(step), grads[step]);
            read(gate + part.column(step), gates[step]);
            read(up + part.column(step), ups[step]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            ELEMENT of_gate[COUNT], of_up[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                swiglu_gradients(grads[step][i], gates[step][i], ups[step][i], of_gate[i], of_up[i]);
            }
            write(grad_gate + part.column(step), of_gate);
            write(grad_up + part.column(step), of_up);
        }
        return;
    }
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const long long start = part.column(step);
#pragma unroll 1
        for (long long i = start; i < min(start + COUNT, columns); ++i) {
            swiglu_gradients(grad_y[i], gate[i], up[i], grad_gate[i], grad_up[i]);
        }
    }
}

#define FORWARD(NAME, COUNT, STEPS)                                                         \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                 \
        const ELEMENT* gate, const ELEMENT* up, ELEMENT* y, long long gate_stride,          \
        long long up_stride, long long y_stride, long long rows, long long columns,         \
        unsigned blocks) {                                                                  \
        const Part<COUNT, STEPS> part(blocks);                                              \
        if (part.row >= rows) return;                                                       \
        forward(                                                                            \
            gate + part.row * gate_stride, up + part.row * up_stride,                       \
            y + part.row * y_stride, columns, part);                                        \
    }

#define BACKWARD(NAME, COUNT, STEPS)                                                        \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                 \
        const ELEMENT* grad_y, const ELEMENT* gate, const ELEMENT* up, ELEMENT* grad_gate,  \
        ELEMENT* grad_up, long long grad_y_stride, long long gate_stride,                   \
        long long up_stride, long long result_stride, long long rows, long long columns,    \
        unsigned blocks) {                                                                  \
        const Part<COUNT, STEPS> part(blocks);                                              \
        if (part.row >= rows) return;                                                       \
        backward(                                                                           \
            grad_y + part.row * grad_y_stride, gate + part.row * gate_stride,               \
            up + part.row * up_stride, grad_gate + part.row * result_stride,                \
            grad_up + part.row * result_stride, columns, part);                             \
    }

// 16 bytes a load where addresses allow it, else an element. The steps are as in `_cuda.py`.
FORWARD(swiglu_forward_vectors, 16 / sizeof(ELEMENT), 2)
FORWARD(swiglu_forward_elements, 1, 8)
BACKWARD(swiglu_backward_vectors, 16 / sizeof(ELEMENT), 2)
BACKWARD(swiglu_backward_elements, 1, 8)
