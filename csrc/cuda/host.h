// What the host side of the kernels shares: torch's stable interface, checks, and the functions that launch kernels.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "common.cuh"

namespace torchmix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

struct QuantizedActivation {
  Tensor codes, scale, group_sum;
};

// torchmix/ops/quantize_activation.py
QuantizedActivation quantize_activation(const Tensor& x, int64_t group_size, bool per_token);

inline cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Float float_type(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float: return Float::kFloat32;
    case ScalarType::Half: return Float::kFloat16;
    case ScalarType::BFloat16: return Float::kBFloat16;
    default: STD_TORCH_CHECK(false, what, " must be float32, float16 or bfloat16"); return Float::kFloat32;
  }
}

inline Float float_type(const Tensor& tensor, const char* what) { return float_type(tensor.scalar_type(), what); }

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace torchmix
