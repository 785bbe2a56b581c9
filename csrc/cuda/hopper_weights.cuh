// Weights of one group of inputs in registers, and the integer sums of a group scaled and added up (hopper.cuh).
#pragma once

#include "codes.cuh"

namespace torchmix {

// Codes of a warp's 16 rows as unsigned bytes, and the parameters of rows i and i + 8 as they lie in memory.
struct GroupWeights {
  uint32_t a[16];
  uint32_t scales;   // bfloat16 of row i, of row i + 8
  uint32_t offsets;  // 16 bits each: zero point and, where there is room, the sum of the codes
};

template <int BITS>
__device__ __forceinline__ void load_weights(GroupWeights& w, const uint8_t* block, int warp, int lane) {
  load_codes<BITS>(w.a, block, warp, lane);
  if constexpr (BITS == 8) {
#pragma unroll
    for (int j = 0; j < 16; j++) w.a[j] ^= 0x80808080u;  // these are signed: 128 is added
  }
  const uint8_t* params = block + 1024 * BITS + 4 * (8 * warp + lane / 4);
  w.scales = *reinterpret_cast<const uint32_t*>(params);
  w.offsets = *reinterpret_cast<const uint32_t*>(params + 128);
}

__device__ __forceinline__ float low_scale(uint32_t scales) { return __uint_as_float(scales << 16); }
__device__ __forceinline__ float high_scale(uint32_t scales) { return __uint_as_float(scales & 0xffff0000u); }

// Sums of the codes of rows i and i + 8.
struct CodeSums {
  int low, high;
};

template <int BITS>
__device__ __forceinline__ CodeSums sums_of_codes(const GroupWeights& w) {
  constexpr int kShift = BITS == 8 ? 0 : BITS;
  if constexpr (BITS <= 4 || BITS == 8) {
    return {static_cast<int>((w.offsets & 0xffff) >> kShift), static_cast<int>(w.offsets >> (16 + kShift))};
  }
  uint32_t sums[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 16; j++) sums[j % 2] = __dp4a(w.a[j], 0x01010101u, sums[j % 2]);
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], step);
    sums[1] += __shfl_xor_sync(0xffffffffu, sums[1], step);
  }
  return {static_cast<int>(sums[0]), static_cast<int>(sums[1])};
}

// A switch over widths that the compiler sees through.
template <class Function>
__device__ __forceinline__ void with_bits(int bits, Function function) {
  if (bits == 4) {
    function.template operator()<4>();
  } else if (bits == 8) {
    function.template operator()<8>();
  } else if (bits == 3) {
    function.template operator()<3>();
  } else if (bits == 5) {
    function.template operator()<5>();
  } else {
    function.template operator()<6>();
  }
}

// -unit * scale * zero point of rows i and i + 8 of one group, each in two bfloat16 parts: {row i, row i + 8}.
__device__ __forceinline__ uint2 offset_factors(uint2 kept, int bits, float unit) {
  const uint32_t scales = kept.x, mask = bits <= 4 ? (1u << bits) - 1 : 0xffffu;
  const uint32_t zero_low = bits == 8 ? 128 : kept.y & mask, zero_high = bits == 8 ? 128 : kept.y >> 16 & mask;
  const float low = low_scale(scales) * -unit * static_cast<float>(zero_low);
  const float high = high_scale(scales) * -unit * static_cast<float>(zero_high);
  const uint32_t first = pack_bfloat16(low, high);
  return {first, pack_bfloat16(low - low_scale(first), high - high_scale(first))};
}

// Scales of a thread's columns 2q, 2q + 1 of tokens 8 j to 8 j + 7 and, from 16 tokens on, of the eight after them.
template <int TOKENS>
__device__ __forceinline__ float4 load_token_scales(const uint8_t* from, int j, int lane) {
  const uint8_t* mine = from + 16 * (lane % 4) + 32 * j;
  if constexpr (TOKENS == 8) {
    const float2 two = *reinterpret_cast<const float2*>(mine);
    return {two.x, two.y, 0.0f, 0.0f};
  }
  return *reinterpret_cast<const float4*>(mine);
}

// Calls function(number of a sum of row i, scale of its token) for all of a thread's tokens; row i + 8 is two further on.
template <int TOKENS, class Function>
__device__ __forceinline__ void for_tokens(const uint8_t* token_scales, int lane, Function function) {
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j += 2) {
    const float4 four = load_token_scales<TOKENS>(token_scales, j, lane);
    const float scale[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < (TOKENS < 16 ? 2 : 4); e++) function(4 * (j + e / 2) + e % 2, scale[e]);
  }
}

// y += integer sums times scales, in units of 2^-25: two multiply-adds for each, see hopper.cuh.
template <int TOKENS>
__device__ __forceinline__ void scale_sums(float (&y)[TOKENS / 2], const int (&v)[TOKENS / 2], uint32_t scales,
                                           const CodeSums& sums, const uint8_t* token_scales, int lane) {
  const float low = low_scale(scales) * 0x1p124f, high = high_scale(scales) * 0x1p124f;
  const float low_rest = low * -0x1p-142f * static_cast<float>(sums.low);
  const float high_rest = high * -0x1p-142f * static_cast<float>(sums.high);
  for_tokens<TOKENS>(token_scales, lane, [&](int at, float scale) {
    y[at] = fmaf(fmaf(__int_as_float(v[at]), low, low_rest), scale, y[at]);
    y[at + 2] = fmaf(fmaf(__int_as_float(v[at + 2]), high, high_rest), scale, y[at + 2]);
  });
}

// The same for scales of any size, in units of 1, with a conversion for each sum.
template <int TOKENS>
__device__ __forceinline__ void scale_sums_slowly(float (&y)[TOKENS / 2], const int (&v)[TOKENS / 2], uint32_t scales,
                                                  const CodeSums& sums, const uint8_t* token_scales, int lane) {
  for_tokens<TOKENS>(token_scales, lane, [&](int at, float scale) {
    y[at] = fmaf(static_cast<float>(v[at] - 128 * sums.low) * low_scale(scales), scale, y[at]);
    y[at + 2] = fmaf(static_cast<float>(v[at + 2] - 128 * sums.high) * high_scale(scales), scale, y[at + 2]);
  });
}

}  // namespace torchmix
