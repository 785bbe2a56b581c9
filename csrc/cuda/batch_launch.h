// Launch of batch_kernel, one function for each number of tokens so that files compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "prepare.cuh"

namespace torchmix {

// Starts a kernel that may overlap with the one before it (wait_for_previous), with so much dynamic shared memory.
template <class Params>
cudaError_t launch_overlapping(void (*kernel)(Params), int blocks, int threads, int shared_bytes, cudaStream_t stream,
                               const Params& params) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <int TOKENS>
cudaError_t launch_batch_kernel(const BatchParams& params, int multiprocessors, cudaStream_t stream) {
  const int pieces = (params.T + 3) / 4 * ((params.M + TOKENS - 1) / TOKENS);
  const int blocks = pieces < multiprocessors ? pieces : multiprocessors;
  return launch_overlapping(batch_kernel<TOKENS>, blocks, kBatchThreads, BatchLayout<TOKENS>::kSharedBytes, stream,
                            params);
}

template <int TOKENS>
cudaError_t launch_batch(const BatchParams& params, int multiprocessors, cudaStream_t stream);

cudaError_t launch_prepare(const PrepareParams& params, cudaStream_t stream);

}  // namespace torchmix
