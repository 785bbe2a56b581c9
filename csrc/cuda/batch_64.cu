// batch_kernel for pieces of 64 tokens.
#include "batch_launch.h"

namespace torchmix {

template <>
cudaError_t launch_batch<64>(const BatchParams& params, int multiprocessors, cudaStream_t stream) {
  const auto kernel = batch_kernel<64>;
  constexpr int kBytes = BatchLayout<64>::kSharedBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int pieces = (params.T + 3) / 4 * ((params.M + 64 - 1) / 64);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(pieces < multiprocessors ? pieces : multiprocessors);
  config.blockDim = dim3(kBatchThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace torchmix
