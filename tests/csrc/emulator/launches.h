// Launches of kernels as the host side asks for them; part of cuda_runtime.h.
#pragma once

#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

// What a launch may not ask for; null: nothing.
inline const char* refuse(const Launch& launch, size_t most_shared) {
  constexpr size_t kDeviceShared = __CUDA_ARCH__ >= 900 ? 227 << 10 : 163 << 10;
  if (launch.block.x * launch.block.y * launch.block.z > 1024) return "launch: more than 1024 threads in a block";
  if (launch.shared_bytes > kDeviceShared) return "launch: more shared memory than a block can have";
  if (launch.shared_bytes > most_shared) return "launch: more shared memory than the kernel was set to";
  if (launch.cluster == 0 || launch.cluster > (__CUDA_ARCH__ >= 900 ? 8 : 1)) return "launch: cluster size";
  if (launch.grid.x % launch.cluster != 0) return "launch: the grid is no multiple of the cluster";
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return "launch: an empty grid";
  if (launch.grid.y > 65535 || launch.grid.z > 65535) return "launch: the grid is too large";
  return nullptr;
}

inline size_t& most_shared_bytes(const void* kernel) {
  static std::vector<std::pair<const void*, size_t>> known;
  for (auto& [other, bytes] : known) {
    if (other == kernel) return bytes;
  }
  return known.emplace_back(kernel, 48 << 10).second;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& what, Arguments&&... arguments) {
  if (const char* refused = refuse(what, most_shared_bytes(reinterpret_cast<const void*>(kernel)))) {
    set_error(refused);
    return cudaErrorInvalidValue;
  }
  return run(what, [&] { kernel(arguments...); }) ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    emulator::most_shared_bytes(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::Launch what = {config->gridDim, config->blockDim, config->dynamicSmemBytes, 1, true};
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) what.cluster = config->attrs[i].val.clusterDim.x;
  }
  return emulator::launch(kernel, what, arguments...);
}
