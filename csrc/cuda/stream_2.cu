// stream_kernel for up to 16 tokens at once.
#include "stream_launch.h"

namespace torchmix {

template <>
cudaError_t launch_stream<2>(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                             cudaStream_t stream) {
  return launch_stream_kernel<2>(params, choice, device, stream);
}

}  // namespace torchmix
