// hopper_kernel for 128 tokens at once.
#include "hopper_launch.h"

namespace torchmix {

template <>
cudaError_t launch_hopper<128>(const HopperParams& params, int blocks, cudaStream_t stream) {
  return launch_hopper_kernel<128>(params, blocks, stream);
}

}  // namespace torchmix
