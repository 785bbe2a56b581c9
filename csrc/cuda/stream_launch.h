// Launches of stream_kernel, one function for each number of token tiles so that files compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "stream.cuh"

namespace torchmix {

template <int NT>
cudaError_t launch_stream(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                          cudaStream_t stream);

template <int NT, bool QUANTIZE>
cudaError_t launch_stream_kernel(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                                 cudaStream_t stream) {
  const auto kernel = stream_kernel<NT, QUANTIZE>;
  const int shared_bytes = stream_fixed_bytes(choice.tokens, params.G) + choice.slots * kSlotBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const int passes = (params.M + choice.tokens - 1) / choice.tokens;
  int blocks = device.multiprocessors / passes;  // passes over the same weights run side by side
  blocks = blocks < 1 ? 1 : blocks > params.T ? params.T : blocks;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, passes);
  config.blockDim = dim3(kConsumers + 32);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The body of launch_stream; quantizes on the way where there is an x.
template <int NT>
cudaError_t launch_stream_kernel(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                                 cudaStream_t stream) {
  return params.x != nullptr ? launch_stream_kernel<NT, true>(params, choice, device, stream)
                             : launch_stream_kernel<NT, false>(params, choice, device, stream);
}

}  // namespace torchmix
