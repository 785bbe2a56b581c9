// hopper_kernel for 16 tokens at once.
#include "hopper_launch.h"

namespace torchmix {

template <>
cudaError_t launch_hopper<16>(const HopperParams& params, int blocks, cudaStream_t stream) {
  return launch_hopper_kernel<16>(params, blocks, stream);
}

}  // namespace torchmix
