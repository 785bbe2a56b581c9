// torchmix::quantize_activation, mixed_linear and mixed_linear_quantized on the CPU: checks, memory, threads.
// Schemas and references: torchmix/ops/quantize_activation.py and torchmix/ops/mixed_linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace torchmix::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokenGrain = 1 << 16;  // values that are worth waking a thread when tokens are quantized
constexpr int64_t kRowGrain = 1 << 19;    // products that are worth waking a thread

constexpr int64_t kPieces = 4;            // of the rows for each thread
constexpr int64_t kPieceRows = 512;       // of a piece at least: the last block of each width is seldom full

[[noreturn]] void wrong(const std::string& text) { throw std::invalid_argument(text); }

Float float_type(ScalarType type, const char* what) {
  switch (type) {
    case ScalarType::Float: return Float::kFloat32;
    case ScalarType::Half: return Float::kFloat16;
    case ScalarType::BFloat16: return Float::kBFloat16;
    default: wrong(std::string(what) + " must be float32, float16 or bfloat16");
  }
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_group_size(int64_t group_size) {
  if (group_size < 8 || group_size > kMostGroup || group_size % 8 != 0) {
    wrong("group_size=" + std::to_string(group_size) + " must be a positive multiple of 8, at most 512");
  }
}

// x as (M, K) with features next to one another, without a copy where possible.
Tensor token_rows(const Tensor& x, int64_t M, int64_t K) {
  if (x.dim() == 2 && (K <= 1 || x.stride(1) == 1)) return x;
  const Tensor packed = dense(x);
  return packed.dim() == 2 ? packed : torch::stable::reshape(packed, {M, K});
}

Input make_input(const Tensor& rows, int64_t group_size, bool per_token) {
  const int64_t K = rows.size(1);
  return {rows.const_data_ptr(), float_type(rows.scalar_type(), "the input"), rows.stride(0), rows.size(0), K,
          ceil_div(K, group_size), static_cast<int>(group_size), per_token};
}

int64_t grain(int64_t worth, int64_t each) { return each >= worth ? 1 : ceil_div(worth, each > 0 ? each : 1); }

// --- quantize_activation ---------------------------------------------------------------------------------------------

struct Quantized {
  Tensor codes, scale, group_sum;
};

Quantized quantize_rows(const Tensor& rows, int64_t group_size, bool per_token) {
  const Input input = make_input(rows, group_size, per_token);
  Quantized out = {torch::stable::new_empty(rows, {input.M, input.K}, ScalarType::Char),
                   torch::stable::new_empty(rows, {input.M, input.G}, ScalarType::Float),
                   torch::stable::new_empty(rows, {input.M, input.G}, ScalarType::Int)};
  int8_t* codes = static_cast<int8_t*>(out.codes.mutable_data_ptr());
  float* scale = static_cast<float*>(out.scale.mutable_data_ptr());
  int32_t* group_sum = static_cast<int32_t*>(out.group_sum.mutable_data_ptr());
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, input.M, grain(kTokenGrain, input.K), [&](int64_t begin, int64_t end) {
    kernel.quantize(input, codes, scale, group_sum, begin, end);
  });
  return out;
}

// --- the weight ------------------------------------------------------------------------------------------------------

// A weight whose sizes are checked: kernels rely on them. `copied` has its last rows, where kernels may read behind.
struct CheckedWeight {
  Tensor codes, scale, zero_point, row_bits;
  std::vector<uint8_t> copied;
  std::vector<int64_t> offsets;
  Weight weight = {};
};

void copy_last_rows(CheckedWeight& checked) {
  Weight& weight = checked.weight;
  int64_t first = weight.N, at = weight.codes_bytes;
  const int64_t blocks = ceil_div(weight.K, 8);
  while (first > 0 && at + kSlack > weight.codes_bytes) at -= weight.row_bits[--first] * blocks;
  // Row `first` ends kSlack bytes or more before the end, if there is one: the rows behind it are copied.
  if (first < weight.N && at + weight.row_bits[first] * blocks + kSlack <= weight.codes_bytes) {
    at += weight.row_bits[first++] * blocks;
  }
  checked.copied.assign(static_cast<size_t>(weight.codes_bytes - at + kSlack), 0);
  if (weight.codes_bytes > at) {
    std::memcpy(checked.copied.data(), weight.codes + at, static_cast<size_t>(weight.codes_bytes - at));
  }
  weight.copied = checked.copied.data();
  weight.copied_offset = at;
  weight.first_copied = first;
}

void check_widths(CheckedWeight& checked) {
  Weight& weight = checked.weight;
  int64_t lengths[256] = {}, zero_lengths[256] = {};  // no length: not a width
  for (int bits = 2; bits <= 8; bits++) {
    lengths[bits] = bits * ceil_div(weight.K, 8);
    zero_lengths[bits] = bits == 8 ? 0 : ceil_div(weight.G * bits, 8);
  }
  const int64_t known = ceil_div(weight.N, kOffsetRows) + 1;
  checked.offsets.resize(static_cast<size_t>(2 * known));
  int64_t* code_offsets = checked.offsets.data();
  int64_t* zero_point_offsets = code_offsets + known;
  int64_t needed = 0, zero_bytes = 0;
  bool valid = true;
  for (int64_t first = 0, i = 0; first < weight.N; first += kOffsetRows, i++) {
    code_offsets[i] = needed;
    zero_point_offsets[i] = zero_bytes;
    const int64_t end = first + kOffsetRows < weight.N ? first + kOffsetRows : weight.N;
    for (int64_t n = first; n < end; n++) {
      const uint8_t bits = weight.row_bits[n];
      valid &= bits >= 2 && bits <= 8;
      needed += lengths[bits];
      zero_bytes += zero_lengths[bits];
    }
  }
  if (!valid) wrong("mixed_linear: row_bits must hold numbers from 2 to 8");
  code_offsets[known - 1] = needed;
  zero_point_offsets[known - 1] = zero_bytes;
  weight.code_offsets = code_offsets;
  weight.zero_point_offsets = zero_point_offsets;
  if (needed != weight.codes_bytes || zero_bytes != weight.zero_point_bytes) {
    wrong("mixed_linear: the input has " + std::to_string(weight.K) + " features, for which these " +
          std::to_string(weight.N) + " row widths need " + std::to_string(needed) + " bytes of codes and " +
          std::to_string(zero_bytes) + " of zero points, but there are " + std::to_string(weight.codes_bytes) +
          " and " + std::to_string(weight.zero_point_bytes) + "; the layer was built for another input size");
  }
}

// The arguments of an op that describe the weight.
struct WeightArguments {
  const Tensor &codes, &scale, &zero_point, &row_bits;
  const std::optional<Tensor>& bias;
  int64_t group_size;
};

void check_types(const WeightArguments& given, int64_t N) {
  if (given.codes.scalar_type() != ScalarType::Byte || given.zero_point.scalar_type() != ScalarType::Byte ||
      given.row_bits.scalar_type() != ScalarType::Byte || given.scale.scalar_type() != ScalarType::BFloat16) {
    wrong("mixed_linear: qdata, zero_point and row_bits must be uint8, and scale bfloat16");
  }
  if (given.bias.has_value() && given.bias->numel() != N) {
    wrong("mixed_linear: the bias must have " + std::to_string(N) + " values, not " +
          std::to_string(given.bias->numel()));
  }
}

void check_weight(const WeightArguments& given, int64_t K, CheckedWeight& checked) {
  check_group_size(given.group_size);
  const int64_t N = given.row_bits.numel(), G = ceil_div(K, given.group_size);
  check_types(given, N);
  if (given.row_bits.dim() != 1 || given.scale.dim() != 2 || given.scale.size(0) != N || given.scale.size(1) != G) {
    wrong("mixed_linear: the input has " + std::to_string(K) + " features, so with group_size=" +
          std::to_string(given.group_size) + " and " + std::to_string(N) + " rows the weight needs scales of shape (" +
          std::to_string(N) + ", " + std::to_string(G) + "); the layer was built for another input size");
  }
  checked.codes = dense(given.codes);
  checked.scale = dense(given.scale);
  checked.zero_point = dense(given.zero_point);
  checked.row_bits = dense(given.row_bits);
  Weight& weight = checked.weight;
  weight.codes = static_cast<const uint8_t*>(checked.codes.const_data_ptr());
  weight.scale = static_cast<const uint16_t*>(checked.scale.const_data_ptr());
  weight.zero_point = static_cast<const uint8_t*>(checked.zero_point.const_data_ptr());
  weight.row_bits = static_cast<const uint8_t*>(checked.row_bits.const_data_ptr());
  weight.codes_bytes = checked.codes.numel();
  weight.zero_point_bytes = checked.zero_point.numel();
  weight.N = N;
  weight.K = K;
  weight.G = G;
  weight.group_size = static_cast<int>(given.group_size);
  check_widths(checked);
  copy_last_rows(checked);
}

// --- the product -----------------------------------------------------------------------------------------------------

struct TileMemory {
  Tensor memory;
  Tiles tiles = {};
};

void make_tiles(const Kernels& kernel, const Tensor& like, int64_t M, int64_t G, int64_t group_size,
                TileMemory& out) {
  Tiles& tiles = out.tiles;
  tiles.M = M;
  tiles.G = G;
  tiles.group_size = static_cast<int>(group_size);
  kernel.lay_out(tiles);
  const int64_t values = tiles.tokens() * G, codes = values * tiles.group_bytes;
  out.memory = torch::stable::new_empty(like, {codes + 8 * values}, ScalarType::Byte);
  tiles.codes = static_cast<uint8_t*>(out.memory.mutable_data_ptr());
  tiles.scale = reinterpret_cast<float*>(tiles.codes + codes);  // group_bytes is a multiple of 4
  tiles.sum = tiles.scale + values;
}

void multiply(const Kernels& kernel, const Weight& weight, const Tiles& tiles, const std::optional<Tensor>& bias,
              const Tensor& y) {
  const Tensor dense_bias = bias.has_value() ? dense(*bias) : Tensor();
  Output out = {y.mutable_data_ptr(), float_type(y.scalar_type(), "the result"), nullptr, Float::kFloat32};
  if (bias.has_value()) {
    out.bias = dense_bias.const_data_ptr();
    out.bias_type = float_type(dense_bias.scalar_type(), "the bias");
  }
  // Threads take pieces of rows as they come: one that is woken late, or is held up, leaves more to the others.
  const int64_t most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t worth = ceil_div(weight.N, grain(kRowGrain, weight.K * tiles.M));
  const int64_t threads = worth < most ? worth : most;
  const int64_t share = ceil_div(weight.N, threads), piece = ceil_div(share, kPieces);
  const int64_t least = share < kPieceRows ? share : kPieceRows;
  const int64_t rows = ceil_div(piece < least ? least : piece, kOffsetRows) * kOffsetRows;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(rows); begin < weight.N; begin = next.fetch_add(rows)) {
      kernel.linear(weight, tiles, out, begin, begin + rows < weight.N ? begin + rows : weight.N);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> quantize_activation(const Tensor& x, int64_t group_size, bool per_token) {
  check_group_size(group_size);
  if (x.dim() != 2) wrong("quantize_activation: x must have 2 dimensions, not " + std::to_string(x.dim()));
  const Quantized out = quantize_rows(token_rows(x, x.size(0), x.size(1)), group_size, per_token);
  return {out.codes, out.scale, out.group_sum};
}

Tensor mixed_linear_quantized(const Tensor& codes, const Tensor& activation_scale, const Tensor& group_sum,
                              const Tensor& qdata, const Tensor& scale, const Tensor& zero_point,
                              const Tensor& row_bits, std::optional<Tensor> bias, int64_t group_size,
                              ScalarType dtype) {
  if (codes.dim() != 2 || codes.scalar_type() != ScalarType::Char) {
    wrong("mixed_linear_quantized: codes must be int8 of shape (tokens, features)");
  }
  const int64_t M = codes.size(0), K = codes.size(1);
  CheckedWeight checked;
  check_weight({qdata, scale, zero_point, row_bits, bias, group_size}, K, checked);
  const int64_t G = checked.weight.G;
  for (const Tensor* part : {&activation_scale, &group_sum}) {
    if (part->dim() != 2 || part->size(0) != M || part->size(1) != G) {
      wrong("mixed_linear_quantized: activation_scale and group_sum must have the shape (" + std::to_string(M) + ", " +
            std::to_string(G) + "); quantize the activations with the group_size of the weight");
    }
  }
  if (activation_scale.scalar_type() != ScalarType::Float || group_sum.scalar_type() != ScalarType::Int) {
    wrong("mixed_linear_quantized: activation_scale must be float32 and group_sum int32");
  }
  Tensor y = torch::stable::new_empty(codes, {M, checked.weight.N}, dtype);
  if (M == 0 || checked.weight.N == 0) return y;
  const Tensor dense_codes = dense(codes), dense_scale = dense(activation_scale), dense_sum = dense(group_sum);
  const Kernels& kernel = kernels();
  TileMemory memory;
  make_tiles(kernel, codes, M, G, group_size, memory);
  const int8_t* from = static_cast<const int8_t*>(dense_codes.const_data_ptr());
  const float* scales = static_cast<const float*>(dense_scale.const_data_ptr());
  const int32_t* sums = static_cast<const int32_t*>(dense_sum.const_data_ptr());
  torch::stable::parallel_for(0, memory.tiles.num_tiles(), grain(kTokenGrain, K * memory.tiles.tile),
                              [&](int64_t begin, int64_t end) {
                                kernel.copy_tiles(from, scales, sums, K, memory.tiles, begin, end);
                              });
  multiply(kernel, checked.weight, memory.tiles, bias, y);
  return y;
}

Tensor mixed_linear(const Tensor& x, const Tensor& qdata, const Tensor& scale, const Tensor& zero_point,
                    const Tensor& row_bits, std::optional<Tensor> bias, int64_t group_size, bool per_token) {
  if (x.dim() == 0) wrong("mixed_linear: x must have at least one dimension");
  const int64_t K = x.size(x.dim() - 1);
  int64_t M = 1;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); i++) {
    shape.push_back(x.size(i));
    M *= x.size(i);
  }
  CheckedWeight checked;
  check_weight({qdata, scale, zero_point, row_bits, bias, group_size}, K, checked);
  shape.push_back(checked.weight.N);
  Tensor y = torch::stable::new_empty(x, shape, x.scalar_type());
  if (M == 0 || checked.weight.N == 0) return y;
  const Tensor rows = token_rows(x, M, K);
  const Input input = make_input(rows, group_size, per_token);
  const Kernels& kernel = kernels();
  TileMemory memory;
  make_tiles(kernel, x, M, input.G, group_size, memory);
  torch::stable::parallel_for(
      0, memory.tiles.num_tiles(), grain(kTokenGrain, K * memory.tiles.tile),
      [&](int64_t begin, int64_t end) { kernel.fill_tiles(input, memory.tiles, begin, end); });
  multiply(kernel, checked.weight, memory.tiles, bias, y);
  return y;
}

}  // namespace torchmix::cpu

STABLE_TORCH_LIBRARY_IMPL(torchmix, CPU, library) {
  library.impl("quantize_activation", TORCH_BOX(&torchmix::cpu::quantize_activation));
  library.impl("mixed_linear", TORCH_BOX(&torchmix::cpu::mixed_linear));
  library.impl("mixed_linear_quantized", TORCH_BOX(&torchmix::cpu::mixed_linear_quantized));
}
