// stream_kernel for up to 32 tokens at once.
#include "stream_launch.h"

namespace torchmix {

template <>
cudaError_t launch_stream<4>(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                             cudaStream_t stream) {
  return launch_stream_kernel<4>(params, choice, device, stream);
}

}  // namespace torchmix
