// Whether this library holds code for sm_90a, or only for older devices that sm_90 runs too.
#include "hopper_launch.h"

namespace torchmix {
namespace {
__global__ void probe() {}
}  // namespace

bool has_hopper_code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe) == cudaSuccess && attributes.ptxVersion >= 90;
}

}  // namespace torchmix
