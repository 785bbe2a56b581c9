// Quantization of activations to int8, one formula for all kernels (torchmix/ops/quantize_activation.py):
// codes = clamp(rint(x * (127 / absmax)), -127, 127) and scale = absmax / 127 in IEEE float32.
#pragma once

#include "common.cuh"

namespace torchmix {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kMinRangeBits = 0x0d800000u;  // 2^-100: a group below it counts as zero

// Magnitudes are compared as integers: the order is the same, and NaN comes out largest instead of being dropped.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct Quantizer {
  float factor;
  float scale;

  __device__ __forceinline__ explicit Quantizer(uint32_t largest_bits) {
    const float largest = __uint_as_float(largest_bits);
    const bool finite = largest_bits < kInfinityBits, zero = largest_bits < kMinRangeBits;
    factor = zero || !finite ? 0.0f : __fdiv_rn(127.0f, largest);
    scale = !finite ? __uint_as_float(0x7fc00000u) : zero ? 0.0f : __fdiv_rn(largest, 127.0f);
  }

  // With factor 0 the product may be NaN, of which the conversion makes 0.
  __device__ __forceinline__ int code(float x) const {
    return max(-127, min(127, __float2int_rn(__fmul_rn(x, factor))));
  }

  __device__ __forceinline__ uint32_t codes(float a, float b, float c, float d) const {
    return (code(a) & 0xff) | (code(b) & 0xff) << 8 | (code(c) & 0xff) << 16 | static_cast<uint32_t>(code(d)) << 24;
  }
};

// Sum of four int8 codes.
__device__ __forceinline__ int sum_of_codes(uint32_t codes) {
  return __dp4a(static_cast<int>(codes), 0x01010101, 0);
}

// --- loads of consecutive inputs of a token; what lies beyond `inputs` is zero ---------------------------------------

__device__ __forceinline__ void unpack_two(uint32_t word, bool bfloat16, float& low, float& high) {
  if (bfloat16) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = both.x;
    high = both.y;
  }
}

// Four inputs from column k; `aligned`: every row starts at a multiple of four inputs in memory.
__device__ __forceinline__ float4 load_four(const void* x, int64_t row_start, int k, int inputs, Float type,
                                            bool aligned) {
  float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
  if (aligned && k + 3 < inputs) {
    if (type == Float::kFloat32) {
      v = *reinterpret_cast<const float4*>(static_cast<const float*>(x) + row_start + k);
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x) + row_start + k);
      unpack_two(words.x, type == Float::kBFloat16, v.x, v.y);
      unpack_two(words.y, type == Float::kBFloat16, v.z, v.w);
    }
    return v;
  }
  if (k < inputs) v.x = load_float(x, row_start + k, type);
  if (k + 1 < inputs) v.y = load_float(x, row_start + k + 1, type);
  if (k + 2 < inputs) v.z = load_float(x, row_start + k + 2, type);
  if (k + 3 < inputs) v.w = load_float(x, row_start + k + 3, type);
  return v;
}

// Eight inputs from column k; `aligned`: rows start at multiples of eight inputs in memory, and `inputs` is one.
__device__ __forceinline__ void load_eight(const void* x, int64_t row_start, int k, int inputs, Float type, bool aligned,
                                           float (&v)[8]) {
  if (aligned && type != Float::kFloat32) {
    uint4 words = {0, 0, 0, 0};
    if (k < inputs) words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + row_start + k);
    const bool bfloat16 = type == Float::kBFloat16;
    unpack_two(words.x, bfloat16, v[0], v[1]);
    unpack_two(words.y, bfloat16, v[2], v[3]);
    unpack_two(words.z, bfloat16, v[4], v[5]);
    unpack_two(words.w, bfloat16, v[6], v[7]);
    return;
  }
  const float4 low = load_four(x, row_start, k, inputs, type, aligned);
  const float4 high = load_four(x, row_start, k + 4, inputs, type, aligned);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

__device__ __forceinline__ uint32_t largest_of_eight(const float (&v)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = max(largest, magnitude_bits(v[i]));
  return largest;
}

__device__ __forceinline__ uint32_t largest_of(const float4& v) {
  return max(max(magnitude_bits(v.x), magnitude_bits(v.y)), max(magnitude_bits(v.z), magnitude_bits(v.w)));
}

}  // namespace torchmix
