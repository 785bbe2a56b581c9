// hopper_kernel for 32 tokens at once.
#include "hopper_launch.h"

namespace torchmix {

template <>
cudaError_t launch_hopper<32>(const HopperParams& params, int blocks, cudaStream_t stream) {
  return launch_hopper_kernel<32>(params, blocks, stream);
}

}  // namespace torchmix
