// prepare_kernel: activations in the form that batch_kernel reads.
#include "batch_launch.h"

namespace torchmix {

cudaError_t launch_prepare(const PrepareParams& params, cudaStream_t stream) {
  const StreamParams& source = params.source;
  const auto kernel = source.x != nullptr ? prepare_kernel<true> : prepare_kernel<false>;
  return launch_overlapping(kernel, source.M, kPrepareThreads, 8 * source.G, stream, params);
}

}  // namespace torchmix
