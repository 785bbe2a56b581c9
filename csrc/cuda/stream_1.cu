// stream_kernel for up to 8 tokens at once.
#include "stream_launch.h"

namespace torchmix {

template <>
cudaError_t launch_stream<1>(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                             cudaStream_t stream) {
  return launch_stream_kernel<1>(params, choice, device, stream);
}

}  // namespace torchmix
