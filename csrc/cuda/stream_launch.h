// Launches of stream_kernel, one function for each number of token tiles so that files compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "stream.cuh"

namespace torchmix {

template <int NT>
cudaError_t launch_stream(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                          bool quantize, cudaStream_t stream);

template <int NT, bool QUANTIZE, bool CLUSTER>
cudaError_t launch_stream_kernel(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                                 cudaStream_t stream) {
  const auto kernel = stream_kernel<NT, QUANTIZE, CLUSTER>;
  const int groups = (params.G + choice.blocks - 1) / choice.blocks;
  const int shared_bytes = stream_fixed_bytes(choice.tokens, choice.blocks, groups) + choice.slots * kSlotBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const int passes = (params.M + choice.tokens - 1) / choice.tokens;
  int clusters = device.multiprocessors / choice.blocks / passes;  // passes over the same weights run side by side
  clusters = clusters < 1 ? 1 : clusters > params.T ? params.T : clusters;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * choice.blocks, passes);
  config.blockDim = dim3(kConsumers + 32);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (device.clusters) {  // sm_90, which can also start blocks while the kernel before is still running
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  if (CLUSTER) {
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = choice.blocks;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.numAttrs = 2;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <int NT, bool QUANTIZE>
cudaError_t launch_stream_kernel(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                                 cudaStream_t stream) {
  return choice.blocks > 1 ? launch_stream_kernel<NT, QUANTIZE, true>(params, choice, device, stream)
                           : launch_stream_kernel<NT, QUANTIZE, false>(params, choice, device, stream);
}

}  // namespace torchmix
