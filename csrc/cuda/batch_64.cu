// batch_kernel for pieces of 64 tokens.
#include "batch_launch.h"

namespace torchmix {

template <>
cudaError_t launch_batch<64>(const BatchParams& params, int multiprocessors, cudaStream_t stream) {
  return launch_batch_kernel<64>(params, multiprocessors, stream);
}

}  // namespace torchmix
