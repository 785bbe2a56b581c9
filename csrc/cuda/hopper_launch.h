// Launches of prepare_kernel and hopper_kernel, one function for each number of tokens so that files compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "hopper.cuh"
#include "launch_choice.h"

namespace torchmix {

// Starts a kernel that may overlap with the one before it (wait_for_previous), with so much dynamic shared memory.
template <class Params>
cudaError_t launch_overlapping(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, bool overlap,
                               int cluster, cudaStream_t stream, const Params& params) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = overlap;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <int TOKENS>
cudaError_t launch_hopper_kernel(const HopperParams& params, int blocks, cudaStream_t stream) {
  using Layout = HopperLayout<TOKENS>;
  return launch_overlapping(hopper_kernel<TOKENS>, blocks, kHopperThreads, Layout::kSharedBytes, true, Layout::kCluster,
                            stream, params);
}

template <int TOKENS>
cudaError_t launch_hopper(const HopperParams& params, int blocks, cudaStream_t stream);

template <>
cudaError_t launch_hopper<8>(const HopperParams& params, int blocks, cudaStream_t stream);
template <>
cudaError_t launch_hopper<16>(const HopperParams& params, int blocks, cudaStream_t stream);
template <>
cudaError_t launch_hopper<32>(const HopperParams& params, int blocks, cudaStream_t stream);
template <>
cudaError_t launch_hopper<64>(const HopperParams& params, int blocks, cudaStream_t stream);
template <>
cudaError_t launch_hopper<128>(const HopperParams& params, int blocks, cudaStream_t stream);

inline cudaError_t launch_hopper(const HopperParams& params, const HopperChoice& choice, cudaStream_t stream) {
  switch (choice.tokens) {
    case 8: return launch_hopper<8>(params, choice.clusters * choice.cluster, stream);
    case 16: return launch_hopper<16>(params, choice.clusters * choice.cluster, stream);
    case 32: return launch_hopper<32>(params, choice.clusters * choice.cluster, stream);
    case 64: return launch_hopper<64>(params, choice.clusters * choice.cluster, stream);
    default: return launch_hopper<128>(params, choice.clusters * choice.cluster, stream);
  }
}

// The current device can run hopper_kernel as it was compiled.
bool has_hopper_code();

// Floats of HopperParams::partial, signals of HopperParams::ready.
inline int64_t partial_floats(const HopperChoice& choice) { return int64_t{choice.clusters} * choice.cluster * choice.tokens * 128; }
inline int64_t ready_signals(const HopperChoice& choice) { return int64_t{choice.clusters} * choice.cluster * 2; }

// overlap: the device can start kernels before the one before is done (sm_90).
cudaError_t launch_prepare(const PrepareParams& params, bool overlap, cudaStream_t stream);

}  // namespace torchmix
