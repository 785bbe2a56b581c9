// stream_kernel for up to 16 tokens at once.
#include "stream_launch.h"

namespace torchmix {

template <>
cudaError_t launch_stream<2>(const StreamParams& params, const StreamChoice& choice, const DeviceLimits& device,
                             bool quantize, cudaStream_t stream) {
  if (quantize) return launch_stream_kernel<2, true>(params, choice, device, stream);
  return launch_stream_kernel<2, false>(params, choice, device, stream);
}

}  // namespace torchmix
