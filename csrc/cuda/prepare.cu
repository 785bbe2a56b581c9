// prepare_kernel.
#include "hopper_launch.h"

namespace torchmix {

cudaError_t launch_prepare(const PrepareParams& params, bool overlap, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(params.to.Mp) * params.to.G * 16;
  const int64_t blocks = (threads + kPrepareThreads - 1) / kPrepareThreads;
  return params.x != nullptr
             ? launch_overlapping(prepare_kernel<true>, blocks, kPrepareThreads, 0, overlap, 1, stream, params)
             : launch_overlapping(prepare_kernel<false>, blocks, kPrepareThreads, 0, overlap, 1, stream, params);
}

}  // namespace torchmix
