// prepare_kernel: activations in the form that batch_kernel reads.
#include "batch_launch.h"

namespace torchmix {

cudaError_t launch_prepare(const PrepareParams& params, cudaStream_t stream) {
  const StreamParams& source = params.source;
  const int shared_bytes = 8 * source.G;
  const auto kernel = source.x != nullptr ? prepare_kernel<true> : prepare_kernel<false>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(source.M);
  config.blockDim = dim3(kPrepareThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace torchmix
