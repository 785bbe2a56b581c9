// Launch of batch_kernel, one function for each number of tokens so that files compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "prepare.cuh"

namespace torchmix {

template <int TOKENS>
cudaError_t launch_batch(const BatchParams& params, int multiprocessors, cudaStream_t stream);

cudaError_t launch_prepare(const PrepareParams& params, cudaStream_t stream);

}  // namespace torchmix
