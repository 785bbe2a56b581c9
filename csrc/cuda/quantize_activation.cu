// torchmix::quantize_activation on CUDA.
#include "host.h"
#include "quantize.cuh"

namespace torchmix {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // groups of a half-warp in flight

struct QuantizeParams {
  const void* x;
  int8_t* codes;
  float* scale;
  int32_t* group_sum;
  int64_t x_stride;
  int64_t M;
  int K, G, group_size;
  Float type;
  bool aligned;  // rows of x start at 16 bytes, rows of codes at 8, and K is a multiple of 8
};

__device__ __forceinline__ void store_eight(const QuantizeParams& p, int64_t token, int k, uint2 codes) {
  int8_t* row = p.codes + token * p.K;
  if (p.aligned) {
    if (k < p.K) *reinterpret_cast<uint2*>(row + k) = codes;
    return;
  }
  for (int i = 0; i < 8; i++) {
    if (k + i < p.K) row[k + i] = static_cast<int8_t>((i < 4 ? codes.x >> (8 * i) : codes.y >> (8 * i - 32)) & 0xff);
  }
}

// Groups of 128: sixteen threads have one group, eight inputs each.
__global__ void __launch_bounds__(kThreads) quantize_groups(const __grid_constant__ QuantizeParams p) {
  const int64_t half = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / 16), total = p.M * p.G;
  float v[kUnroll][8];
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int64_t at = half + u * stride;
    if (at >= total) continue;
    const int k = static_cast<int>(at % p.G) * kGroup + 8 * lane;
    load_eight(p.x, at / p.G * p.x_stride, k, p.K, p.type, p.aligned, v[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; u++) {
    const int64_t at = half + u * stride;
    uint32_t largest = at < total ? largest_of_eight(v[u]) : 0;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    const Quantizer quantizer(largest);
    uint2 codes = {quantizer.codes(v[u][0], v[u][1], v[u][2], v[u][3]),
                   quantizer.codes(v[u][4], v[u][5], v[u][6], v[u][7])};
    int sum = sum_of_codes(codes.x) + sum_of_codes(codes.y);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (at >= total) continue;
    store_eight(p, at / p.G, static_cast<int>(at % p.G) * kGroup + 8 * lane, codes);
    if (lane == 0) {
      p.scale[at] = quantizer.scale;
      p.group_sum[at] = sum;
    }
  }
}

// Any group size, and scales of whole tokens: a block per token.
__global__ void __launch_bounds__(kThreads) quantize_tokens(const __grid_constant__ QuantizeParams p, bool per_token) {
  __shared__ uint32_t largest_of_warps[kThreads / 32];
  const int64_t token = blockIdx.x, start = token * p.x_stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t largest = 0;
  if (per_token) {
    for (int k = threadIdx.x; k < p.K; k += kThreads) {
      largest = max(largest, magnitude_bits(load_float(p.x, start + k, p.type)));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) largest_of_warps[warp] = largest;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; i++) largest = max(largest, largest_of_warps[i]);
  }
  for (int g = warp; g < p.G; g += kThreads / 32) {
    const int begin = g * p.group_size, end = min(begin + p.group_size, p.K);
    if (!per_token) {
      largest = 0;
      for (int k = begin + lane; k < end; k += 32) {
        largest = max(largest, magnitude_bits(load_float(p.x, start + k, p.type)));
      }
      largest = __reduce_max_sync(0xffffffffu, largest);
    }
    const Quantizer quantizer(largest);
    int sum = 0;
    for (int k = begin + lane; k < end; k += 32) {
      const int code = quantizer.code(load_float(p.x, start + k, p.type));
      p.codes[token * p.K + k] = static_cast<int8_t>(code);
      sum += code;
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) {
      p.scale[token * p.G + g] = quantizer.scale;
      p.group_sum[token * p.G + g] = sum;
    }
  }
}

}  // namespace

QuantizedActivation quantize_activation(const Tensor& x, int64_t group_size, bool per_token) {
  STD_TORCH_CHECK(x.dim() == 2, "quantize_activation: x must have two dimensions, tokens and inputs");
  STD_TORCH_CHECK(group_size > 0, "quantize_activation: group_size must be positive, not ", group_size);
  const Tensor rows = x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
  const int64_t M = rows.size(0), K = rows.size(1), G = (K + group_size - 1) / group_size;
  QuantizedActivation result = {
      torch::stable::new_empty(rows, {M, K}, ScalarType::Char),
      torch::stable::new_empty(rows, {M, G}, ScalarType::Float),
      torch::stable::new_empty(rows, {M, G}, ScalarType::Int),
  };
  if (M == 0 || K == 0) return result;
  const DeviceGuard guard(rows.get_device_index());
  const Float type = float_type(rows, "quantize_activation: x");
  const int64_t bytes = type == Float::kFloat32 ? 4 : 2;
  const bool aligned = K % 8 == 0 && rows.stride(0) * bytes % 16 == 0 && is_aligned(rows.const_data_ptr(), 16);
  const QuantizeParams params = {
      rows.const_data_ptr(),
      static_cast<int8_t*>(result.codes.mutable_data_ptr()),
      static_cast<float*>(result.scale.mutable_data_ptr()),
      static_cast<int32_t*>(result.group_sum.mutable_data_ptr()),
      rows.stride(0),
      M,
      static_cast<int>(K),
      static_cast<int>(G),
      static_cast<int>(group_size),
      type,
      aligned,
  };
  const cudaStream_t stream = current_stream(rows);
  if (group_size == kGroup && !per_token) {
    const int64_t per_block = kThreads / 16 * kUnroll;
    quantize_groups<<<static_cast<unsigned>((M * G + per_block - 1) / per_block), kThreads, 0, stream>>>(params);
  } else {
    quantize_tokens<<<static_cast<unsigned>(M), kThreads, 0, stream>>>(params, per_token);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace torchmix
