// Activations as kernels read them (torchmix/ops/prepare_activation.py), and the kernel that makes them.
//
// Shapes: M tokens, Mp the same in a multiple of 16, K inputs, G groups of 128 inputs, C chunks of 16 groups.
#pragma once

#include "quantize.cuh"

namespace torchmix {

constexpr int kChunk = 16;             // groups whose offsets are one step of the tensor cores
constexpr int kChunkBytes = 4 * kChunk;  // of a token

struct Prepared {
  uint8_t* codes;  // (G, Mp, 128): code + 128; 16-byte parts of 8 tokens swizzled as wgmma reads them
  float* scale;    // (G, Mp): 16 tokens in the order of a thread's registers, see scale_place
  uint8_t* sums;   // (C, Mp / 8, 2, 2, 8, 8) bfloat16: scale * sum(codes) in two parts, as wgmma reads them
  int Mp, G;

  static int64_t bytes(int64_t Mp, int64_t G) { return Mp * (G * (kGroup + 4) + (G + kChunk - 1) / kChunk * kChunkBytes); }
  static Prepared at(uint8_t* data, int64_t Mp, int64_t G) {
    uint8_t* scale = data + G * Mp * kGroup;
    return {data, reinterpret_cast<float*>(scale), scale + G * Mp * 4, static_cast<int>(Mp), static_cast<int>(G)};
  }
};

// Place of a token's scale among 16: a thread's four, of columns 2q, 2q + 1 of two tiles of 8, lie together.
__device__ __forceinline__ int scale_place(int token) {
  return token / 16 * 16 + token % 8 / 2 * 4 + token % 16 / 8 * 2 + token % 2;
}

// Place of the 16-byte part `part` of a token's codes of a group, in bytes from the group's first token.
__device__ __forceinline__ int code_place(int token, int part) { return token * kGroup + 16 * (part ^ token % 8); }

// Place of a group's sum in a chunk of a token, in bytes: group 4 q + e is column 2 q + e of a fragment, or 2 q + 6 + e.
__device__ __forceinline__ int64_t sum_place(int Mp, int token, int group, int part) {
  const int c = group % kChunk, e = c % 4, k = c / 4 * 2 + e % 2 + e / 2 * 8;
  return (static_cast<int64_t>(group / kChunk) * (Mp / 8) + token / 8) * 512 + part * 256 + k / 8 * 128 + token % 8 * 16 +
         k % 8 * 2;
}

struct PrepareParams {
  const void* x;  // (M, K), or
  const int8_t* codes;        // (M, K) with
  const float* token_scale;   // (M, G) and
  const int32_t* group_sum;   // (M, G)
  Prepared to;
  int64_t x_stride;
  int M, K;
  Float type;
  bool aligned;  // rows of x, or of codes, start at multiples of eight values in memory, and K is one
};

constexpr int kPrepareThreads = 128;

__device__ __forceinline__ uint2 load_codes_of(const PrepareParams& p, int64_t token, int k) {
  const int8_t* row = p.codes + token * p.K;
  if (p.aligned) return k < p.K ? *reinterpret_cast<const uint2*>(row + k) : uint2{0, 0};
  uint2 codes = {0, 0};
  for (int m = 0; m < 8; m++) {
    if (k + m >= p.K) break;
    (m < 4 ? codes.x : codes.y) |= static_cast<uint32_t>(static_cast<uint8_t>(row[k + m])) << (8 * (m % 4));
  }
  return codes;
}

// Sixteen threads have one group of one token, eight inputs each; tokens beyond M are zero.
template <bool QUANTIZE>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareParams p) {
  const Prepared& to = p.to;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16, group = static_cast<int>(at % to.G);
  const int64_t token = at / to.G;
  const bool mine = token < p.M;
  const int k = group * kGroup + 8 * lane;
  // Only after everything before is done: the next kernel then knows that as soon as it starts (see hopper.cuh).
  wait_for_previous();
  start_next();
  uint2 codes = {0, 0};
  float scale = 0.0f;
  int sum = 0;
  if constexpr (QUANTIZE) {
    float v[8] = {};
    if (mine) load_eight(p.x, token * p.x_stride, k, p.K, p.type, p.aligned, v);
    uint32_t largest = largest_of_eight(v);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const Quantizer quantizer(largest);
    codes = {quantizer.codes(v[0], v[1], v[2], v[3]), quantizer.codes(v[4], v[5], v[6], v[7])};
    scale = quantizer.scale;
    sum = sum_of_codes(codes.x) + sum_of_codes(codes.y);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  } else if (mine) {
    codes = load_codes_of(p, token, k);
    scale = p.token_scale[token * to.G + group];
    sum = p.group_sum[token * to.G + group];
  }
  if (token >= to.Mp) return;
  const int t = static_cast<int>(token);
  uint8_t* place = to.codes + static_cast<int64_t>(group) * to.Mp * kGroup + code_place(t, lane / 2) + lane % 2 * 8;
  *reinterpret_cast<uint2*>(place) = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u};
  if (lane == 0) to.scale[static_cast<int64_t>(group) * to.Mp + scale_place(t)] = scale;
  // groups beyond the last one of a chunk are zero: the threads of the last group see to it
  const int c = group % kChunk + lane;
  if (lane == 0 || (group == to.G - 1 && c < kChunk)) {
    const float value = lane == 0 ? scale * static_cast<float>(sum) : 0.0f;
    const __nv_bfloat16 high = __float2bfloat16_rn(value);
    const __nv_bfloat16 low = __float2bfloat16_rn(value - __bfloat162float(high));
    *reinterpret_cast<__nv_bfloat16*>(to.sums + sum_place(to.Mp, t, group + lane, 0)) = high;
    *reinterpret_cast<__nv_bfloat16*>(to.sums + sum_place(to.Mp, t, group + lane, 1)) = low;
  }
}

}  // namespace torchmix
