// Activations in the form that batch_kernel reads, see PreparedTokens in batch.cuh.
#pragma once

#include "batch.cuh"

namespace torchmix {

// Activations for batch_kernel, from x or from its codes, scales and sums: a block per token.
struct PrepareParams {
  StreamParams source;  // x, or codes, token_scale and group_sum; M, K, G, types and strides
  PreparedTokens to;
};

constexpr int kPrepareThreads = 256;

template <bool QUANTIZE>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams params) {
  const StreamParams& p = params.source;
  const PreparedTokens& to = params.to;
  extern __shared__ __align__(128) uint8_t prepare_shared[];
  float* scales = reinterpret_cast<float*>(prepare_shared);  // (G), then the sums
  int* sums = reinterpret_cast<int*>(scales + p.G);
  __shared__ uint32_t largest_of_warps[kPrepareThreads / 32];
  const int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous();
  uint32_t largest = 0;
  for (int g = warp; g < p.G; g += kPrepareThreads / 32) {
    const int k = g * kGroup + 4 * lane;
    uint32_t codes = 0;
    float scale;
    int sum;
    if constexpr (QUANTIZE) {
      const float4 v = load_four(p.x, token * p.x_stride, k, p.K, p.x_type, p.aligned);
      const Quantizer quantizer(__reduce_max_sync(0xffffffffu, largest_of(v)));
      codes = quantizer.codes(v.x, v.y, v.z, v.w);
      scale = quantizer.scale;
      sum = __reduce_add_sync(0xffffffffu, sum_of_codes(codes));
    } else {
      const int8_t* row = p.codes + static_cast<int64_t>(token) * p.K;
      if (p.aligned && k + 3 < p.K) {
        codes = *reinterpret_cast<const uint32_t*>(row + k);
      } else {
        for (int m = 0; m < 4; m++) {
          if (k + m < p.K) codes |= static_cast<uint32_t>(static_cast<uint8_t>(row[k + m])) << (8 * m);
        }
      }
      scale = p.token_scale[static_cast<int64_t>(token) * p.G + g];
      sum = p.group_sum[static_cast<int64_t>(token) * p.G + g];
    }
    uint8_t* place = to.codes + (static_cast<int64_t>(g) * to.Mp + token) * kGroup;
    *reinterpret_cast<uint32_t*>(place + 16 * (lane / 4 ^ token % 8) + 4 * (lane % 4)) = codes ^ 0x80808080u;
    if (lane == 0) scales[g] = scale, sums[g] = sum;
    largest = max(largest, magnitude_bits(scale));
  }
  if (lane == 0) largest_of_warps[warp] = largest;
  __syncthreads();
  for (int i = 0; i < kPrepareThreads / 32; i++) largest = max(largest, largest_of_warps[i]);
  // 2^floor(log2(largest)), at least the smallest normal number; a scale of NaN stays one, whatever it is divided by
  const uint32_t exponent = min(max(largest >> 23, 1u), 254u);
  const float unit = __uint_as_float(exponent << 23);
  if (threadIdx.x == 0) to.unit[token] = unit;
  for (int g = threadIdx.x; g < to.Gp; g += kPrepareThreads) {
    const float scale = g < p.G ? __fdiv_rn(scales[g], unit) : 0.0f;
    if (g < p.G) to.scale[static_cast<int64_t>(g) * to.Mp + scale_place(token)] = scale;
    float rest = g < p.G ? scale * static_cast<float>(sums[g]) : 0.0f;
    __nv_bfloat16* four = reinterpret_cast<__nv_bfloat16*>(
        to.sums + ((static_cast<int64_t>(token) * (to.Gp / 16) + g / 16) * 4 + g % 16 / 4) * 6);
    for (int part = 0; part < 3; part++) {
      const __nv_bfloat16 rounded = __float2bfloat16_rn(rest);
      four[4 * part + g % 4] = rounded;
      rest -= __bfloat162float(rounded);
    }
  }
}

}  // namespace torchmix
