// What the sources of this folder share. It is put before each of them: nothing is included, so NVRTC needs no headers.

constexpr unsigned ALL = 0xffffffffu;  // lanes of a warp
#define INF __uint_as_float(0x7f800000u)
constexpr double WORST = 1.7976931348623157e308;  // a score past fp64, still better than that of a code with a NaN

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};
template <class T>
struct alignas(4 * sizeof(T)) Four {
    T at[4];
};

__device__ inline float wide(float value) { return value; }
__device__ inline float wide(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ inline float wide(f16 value) {
#ifdef __CUDA_ARCH__
    float single;
    asm("cvt.f32.f16 %0, %1;" : "=f"(single) : "h"(value.bits));
    return single;
#else
    return single_of_half(value.bits);
#endif
}

__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(float value, bf16& out) {
    const unsigned bits = __float_as_uint(value);
    out.bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;  // to nearest even
}
__device__ inline void narrow(float value, f16& out) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    out.bits = half_of_single(value);
#endif
}

__device__ inline bool is_finite(float value) { return fabsf(value) < INF; }  // false for NaN too

// Two floats as bf16, to nearest even, the first in the lower half.
__device__ inline unsigned two_bf16(float first, float second) {
#ifdef __CUDA_ARCH__
    unsigned two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
#else
    bf16 low, high;
    narrow(first, low);
    narrow(second, high);
    return low.bits | (unsigned)high.bits << 16;
#endif
}
