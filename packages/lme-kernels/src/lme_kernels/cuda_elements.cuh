// Elements of tensors and vectors of them, for NVRTC: no header is included.

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ float widen(float x) { return x; }

__device__ __forceinline__ float widen(bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

__device__ __forceinline__ float widen(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ void narrow(double x, double& y) { y = x; }

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }

__device__ __forceinline__ void narrow(float x, float16& y) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

__device__ __forceinline__ void narrow(float x, bfloat16& y) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    // Half of the last place, and one more where that makes it even; a NaN stays one.
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    y.bits = static_cast<unsigned short>(x == x ? rounded : 0x7fffu);
#endif
}

// Integers of the size of a vector, which is read and written at once.
template <int BYTES>
struct Raw;

template <>
struct Raw<16> {
    using type = uint4;
};

template <>
struct Raw<8> {
    using type = uint2;
};

template <>
struct Raw<4> {
    using type = unsigned;
};

template <>
struct Raw<2> {
    using type = unsigned short;
};

template <>
struct Raw<1> {
    using type = unsigned char;
};

// In PTX, since the compiler divides a plain store into the elements it is made of.
__device__ __forceinline__ void store(uint4* to, uint4 raw) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
}

__device__ __forceinline__ void store(uint2* to, uint2 raw) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(raw.x), "r"(raw.y) : "memory");
}

template <class Integer>
__device__ __forceinline__ void store(Integer* to, Integer raw) {
    *to = raw;
}

template <class Element, int COUNT>
__device__ __forceinline__ void read(const Element* from, Element (&values)[COUNT]) {
    using type = typename Raw<sizeof(Element) * COUNT>::type;
    const type raw = *reinterpret_cast<const type*>(from);
    memcpy(values, &raw, sizeof(raw));
}

template <class Element, int COUNT>
__device__ __forceinline__ void write(Element* to, const Element (&values)[COUNT]) {
    using type = typename Raw<sizeof(Element) * COUNT>::type;
    type raw;
    memcpy(&raw, values, sizeof(raw));
    store(reinterpret_cast<type*>(to), raw);
}

// Approximate where the result is rounded to 16 bits, of which their error is no part.
template <class Element>
__device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(Element) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
    return 1.0f / (1.0f + expf(-x));
}

template <class Element>
__device__ __forceinline__ double sigmoid(double x) {
    return 1.0 / (1.0 + exp(-x));
}

// `silu(gate) * up`, rounded once.
template <class Element>
__device__ __forceinline__ Element swiglu(Element gate, Element up) {
    const auto g = widen(gate);
    Element y;
    narrow(g * sigmoid<Element>(g) * widen(up), y);
    return y;
}

template <class Element>
__device__ __forceinline__ void swiglu_gradients(
    Element grad_y, Element gate, Element up, Element& of_gate, Element& of_up) {
    const auto grad = widen(grad_y), g = widen(gate);
    const auto s = sigmoid<Element>(g);
    narrow(grad * widen(up) * (s * (1 + g * (1 - s))), of_gate);
    narrow(grad * (g * s), of_up);
}

// Part of a matrix that a thread takes. A block has `blockDim.y` rows, of which it takes one of
// `blocks` parts; thread x of a row takes vector x of `COUNT` elements, and `STEPS` - 1 more, each
// `blockDim.x` after the one before.
template <int COUNT, int STEPS>
struct Part {
    long long row;
    long long first;

    __device__ __forceinline__ explicit Part(unsigned blocks) {
        row = static_cast<long long>(blockIdx.x / blocks) * blockDim.y + threadIdx.y;
        const auto start = static_cast<long long>(blockIdx.x % blocks) * (blockDim.x * STEPS);
        first = (start + threadIdx.x) * COUNT;
    }

    // First column of the vector of a step.
    __device__ __forceinline__ long long column(int step) const {
        return first + step * (blockDim.x * COUNT);
    }

    // Whether all vectors lie within a row.
    __device__ __forceinline__ bool is_whole(long long columns) const {
        return column(STEPS - 1) + COUNT <= columns;
    }
};
