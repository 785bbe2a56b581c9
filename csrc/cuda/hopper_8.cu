// hopper_kernel for 8 tokens at once.
#include "hopper_launch.h"

namespace torchmix {

template <>
cudaError_t launch_hopper<8>(const HopperParams& params, int blocks, cudaStream_t stream) {
  return launch_hopper_kernel<8>(params, blocks, stream);
}

}  // namespace torchmix
