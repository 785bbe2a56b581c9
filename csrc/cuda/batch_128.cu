// batch_kernel for pieces of 128 tokens.
#include "batch_launch.h"

namespace torchmix {

template <>
cudaError_t launch_batch<128>(const BatchParams& params, int multiprocessors, cudaStream_t stream) {
  return launch_batch_kernel<128>(params, multiprocessors, stream);
}

}  // namespace torchmix
