// What kernels use of CUDA C++, for a plain C++ compiler: keywords, vector types, conversions, intrinsics, launches.
// Found instead of the toolkit's header. Primitives in PTX are in emulated_primitives.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "machine.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- vector types --------------------------------------------------------------------------------------------------

#define TORCHMIX_VECTORS(type, name, step)                               \
  struct alignas(2 * step) name##2 { type x, y; };                       \
  struct name##3 { type x, y, z; };                                      \
  struct alignas(4 * step > 16 ? 16 : 4 * step) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
TORCHMIX_VECTORS(signed char, char, 1)
TORCHMIX_VECTORS(unsigned char, uchar, 1)
TORCHMIX_VECTORS(short, short, 2)
TORCHMIX_VECTORS(unsigned short, ushort, 2)
TORCHMIX_VECTORS(int, int, 4)
TORCHMIX_VECTORS(unsigned, uint, 4)
TORCHMIX_VECTORS(float, float, 4)
TORCHMIX_VECTORS(long long, longlong, 8)
TORCHMIX_VECTORS(unsigned long long, ulonglong, 8)
TORCHMIX_VECTORS(double, double, 8)
#undef TORCHMIX_VECTORS

struct dim3 : emulator::Index3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : emulator::Index3{x, y, z} {}
};

// --- half precision ------------------------------------------------------------------------------------------------

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Round to nearest even: in units of the result's last place the value is at most 2^11, and rint is exact.
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  if (std::isnan(value)) return {0x7fff};
  const float size = std::fabs(value);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  const int exponent = std::max(static_cast<int>((bits >> 23 & 255)) - 127, -14);
  const unsigned steps = static_cast<unsigned>(std::rint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (static_cast<unsigned>(exponent + 14) << 10) + steps)};
}

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const unsigned bits = __float_as_uint(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// --- arithmetic ----------------------------------------------------------------------------------------------------

// As in CUDA, two numbers of different types may be compared.
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return static_cast<Common>(a) < static_cast<Common>(b) ? static_cast<Common>(b) : static_cast<Common>(a);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr auto min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return static_cast<Common>(b) < static_cast<Common>(a) ? static_cast<Common>(b) : static_cast<Common>(a);
}

inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
using std::fmaf;

inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  const float rounded = std::nearbyint(x);
  if (rounded >= 2147483648.0f) return std::numeric_limits<int>::max();
  if (rounded < -2147483648.0f) return std::numeric_limits<int>::min();
  return static_cast<int>(rounded);
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(both >> 8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// --- memory --------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
inline uint64_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulator::spin(); }

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = old + value;
  emulator::yield();
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  const T old = *at;
  *at = value;
  return old;
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}

// --- warps and blocks ----------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::block_barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::collective("__syncwarp", mask, nullptr, nullptr, nullptr);
}

namespace emulator {

template <class T>
struct Shuffle {
  T value;
  int source;  // lane
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  const Shuffle<T> in = {value, source};
  T out;
  collective(name, mask, &in, &out, [](const Lanes& lanes) {
    for (int lane = 0; lane < 32; lane++) {
      if ((lanes.present >> lane & 1) == 0) continue;
      const int from = static_cast<const Shuffle<T>*>(lanes.in[lane])->source;
      T& result = *static_cast<T*>(lanes.out[lane]);
      if (lanes.present >> from & 1) {
        result = static_cast<const Shuffle<T>*>(lanes.in[from])->value;
      } else {
        memset(&result, 0xff, sizeof(T));  // of a lane that is not there
      }
    }
  });
  return out;
}

// Every lane gets the values of all put together.
template <class Combine, class T>
T reduce(const char* name, unsigned mask, T value) {
  T out;
  collective(name, mask, &value, &out, [](const Lanes& lanes) {
    T total{};
    bool first = true;
    for (int lane = 0; lane < 32; lane++) {
      if ((lanes.present >> lane & 1) == 0) continue;
      const T one = *static_cast<const T*>(lanes.in[lane]);
      total = first ? one : Combine()(total, one);
      first = false;
    }
    for (int lane = 0; lane < 32; lane++) {
      if (lanes.present >> lane & 1) *static_cast<T*>(lanes.out[lane]) = total;
    }
  });
  return out;
}

struct Larger {
  template <class T>
  T operator()(T a, T b) const { return a < b ? b : a; }
};
struct Smaller {
  template <class T>
  T operator()(T a, T b) const { return b < a ? b : a; }
};
struct Sum {  // wraps around
  template <class T>
  T operator()(T a, T b) const { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); }
};
struct Or {
  unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};
struct And {
  unsigned operator()(unsigned a, unsigned b) const { return a & b; }
};

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = emulator::lane(), from = lane ^ step;
  return emulator::shuffle("__shfl_xor_sync", mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = emulator::lane(), from = lane + step;
  return emulator::shuffle("__shfl_down_sync", mask, value, from / width > lane / width ? lane : from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_up_sync", mask, value, lane % width < step ? lane : lane - step);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulator::reduce<emulator::Larger>("__reduce_max_sync", mask, value);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulator::reduce<emulator::Smaller>("__reduce_min_sync", mask, value);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulator::reduce<emulator::Sum>("__reduce_add_sync", mask, value);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::reduce<emulator::Or>("__ballot_sync", mask, predicate != 0 ? 1u << emulator::lane() : 0u);
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::reduce<emulator::Or>("__any_sync", mask, predicate != 0 ? 1u : 0u) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulator::reduce<emulator::And>("__all_sync", mask, predicate != 0 ? 1u : 0u) != 0;
}

#include "launches.h"
