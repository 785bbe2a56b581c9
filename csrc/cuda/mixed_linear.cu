// torchmix::mixed_linear_tiled and its form for quantized activations on CUDA (torchmix/ops/mixed_linear_tiled.py).
#include "host.h"
#include "batch_launch.h"
#include "stream_launch.h"

namespace torchmix {
namespace {

constexpr int kQuantizeInside = 16;  // tokens up to which every block quantizes the activations for itself
constexpr int kMostDevices = 64;

DeviceLimits device_limits(int device) {
  static DeviceLimits known[kMostDevices];  // written once; a race writes the same values
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "mixed_linear: device ", device, " is out of range");
  DeviceLimits& limits = known[device];
  if (limits.multiprocessors == 0) {
    int major = 0, shared = 0, multiprocessors = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    limits.shared_bytes = shared;
    limits.clusters = major == 9;
    limits.multiprocessors = multiprocessors;
  }
  return limits;
}

// The weight of a call, checked; the same for all kernels.
struct TiledWeight {
  const Tensor &tiles, &row_index, &tile_table;
  const std::optional<Tensor>& bias;
  int64_t out_features;
};

void check_weight(const TiledWeight& weight, int64_t in_features) {
  STD_TORCH_CHECK(weight.tiles.scalar_type() == ScalarType::Byte && weight.tiles.is_contiguous(),
                  "mixed_linear: tiles must be contiguous uint8");
  STD_TORCH_CHECK(weight.row_index.scalar_type() == ScalarType::Int && weight.row_index.is_contiguous(),
                  "mixed_linear: row_index must be contiguous int32");
  STD_TORCH_CHECK(weight.tile_table.scalar_type() == ScalarType::Int && weight.tile_table.is_contiguous() &&
                      weight.tile_table.dim() == 2 && weight.tile_table.size(1) == 3,
                  "mixed_linear: tile_table must be contiguous int32 (tiles, 3)");
  STD_TORCH_CHECK(weight.row_index.numel() == weight.tile_table.size(0) * kTileRows,
                  "mixed_linear: row_index has ", weight.row_index.numel(), " rows, but there are ",
                  weight.tile_table.size(0), " tiles of ", kTileRows);
  STD_TORCH_CHECK(is_aligned(weight.tiles.const_data_ptr(), 16), "mixed_linear: tiles must start at 16 bytes");
  STD_TORCH_CHECK(!weight.bias.has_value() || weight.bias->numel() == weight.out_features,
                  "mixed_linear: the bias must have ", weight.out_features, " values");
  STD_TORCH_CHECK(in_features < (1 << 30), "mixed_linear: too many inputs");
}

// Everything that both kernels need, of x or of its codes; a default-constructed tensor stands for what is not there.
StreamParams call_params(int64_t M, int64_t K, const TiledWeight& weight, const Tensor& bias, const Tensor& y) {
  StreamParams params = {};
  params.M = static_cast<int>(M);
  params.N = static_cast<int>(weight.out_features);
  params.K = static_cast<int>(K);
  params.G = static_cast<int>((K + kGroup - 1) / kGroup);
  params.T = static_cast<int>(weight.tile_table.size(0));
  params.tiles = static_cast<const uint8_t*>(weight.tiles.const_data_ptr());
  params.row_index = static_cast<const int32_t*>(weight.row_index.const_data_ptr());
  params.tile_table = static_cast<const int32_t*>(weight.tile_table.const_data_ptr());
  if (weight.bias.has_value()) {
    params.bias = bias.const_data_ptr();
    params.bias_type = float_type(bias, "mixed_linear: the bias");
  }
  params.y = y.mutable_data_ptr();
  params.y_type = float_type(y, "mixed_linear: the result");
  return params;
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "mixed_linear: launch failed: ", cudaGetErrorString(error));
}

// Few tokens: each is read where it is, weights once.
void run_stream(StreamParams& params, const DeviceLimits& limits, cudaStream_t stream) {
  const StreamChoice choice = choose_stream(params.M, params.G, params.T, limits);
  STD_TORCH_CHECK(choice.tokens > 0, "mixed_linear: ", params.K, " inputs do not fit this GPU's shared memory (",
                  limits.shared_bytes, " bytes per block)");
  params.slots = choice.slots;
  params.together = choice.tokens;
  const bool quantize = params.x != nullptr;
  switch (stream_token_tiles(choice.tokens)) {
    case 1: check_launch(launch_stream<1>(params, choice, limits, quantize, stream)); break;
    case 2: check_launch(launch_stream<2>(params, choice, limits, quantize, stream)); break;
    default: check_launch(launch_stream<4>(params, choice, limits, quantize, stream)); break;
  }
}

// Many tokens: brought into the order of wgmma first, in scratch memory of torch's allocator.
void run_batch(const StreamParams& params, const Tensor& on, const DeviceLimits& limits, cudaStream_t stream) {
  const int64_t G = params.G, Mp = (params.M + 15) / 16 * 16, Gp = (G + 15) / 16 * 16;
  const int64_t codes = G * Mp * kGroup, scale = G * Mp * 4, sums = Mp * Gp * 6, unit = Mp * 4;
  const Tensor scratch = torch::stable::new_empty(on, {codes + scale + sums + unit}, ScalarType::Byte);
  uint8_t* at = static_cast<uint8_t*>(scratch.mutable_data_ptr());  // Mp makes every part a multiple of 64 bytes
  PrepareParams prepare = {};
  prepare.source = params;
  prepare.to = {at, reinterpret_cast<float*>(at + codes), reinterpret_cast<uint32_t*>(at + codes + scale),
                reinterpret_cast<float*>(at + codes + scale + sums), static_cast<int>(Mp), static_cast<int>(Gp)};
  check_launch(launch_prepare(prepare, stream));
  BatchParams batch = {};
  batch.tiles = params.tiles;
  batch.row_index = params.row_index;
  batch.tile_table = params.tile_table;
  batch.tokens = prepare.to;
  batch.bias = params.bias;
  batch.y = params.y;
  batch.M = params.M;
  batch.N = params.N;
  batch.G = params.G;
  batch.T = params.T;
  batch.bias_type = params.bias_type;
  batch.y_type = params.y_type;
  check_launch(params.M <= 64 ? launch_batch<64>(batch, limits.multiprocessors, stream)
                              : launch_batch<128>(batch, limits.multiprocessors, stream));
}

bool takes_batch(int64_t M, const DeviceLimits& limits) { return limits.clusters && M > kStreamMostTokens; }

void run(StreamParams& params, const Tensor& on, const DeviceLimits& limits) {
  if (takes_batch(params.M, limits)) {
    run_batch(params, on, limits, current_stream(on));
  } else {
    run_stream(params, limits, current_stream(on));
  }
}

Tensor linear_of_codes(const Tensor& codes, const Tensor& scale, const Tensor& group_sum, const TiledWeight& weight,
                       ScalarType dtype) {
  const int64_t M = codes.size(0), K = codes.size(1);
  check_weight(weight, K);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char, "mixed_linear: codes must be int8");
  Tensor y = torch::stable::new_empty(codes, {M, weight.out_features}, dtype);
  if (M == 0 || weight.out_features == 0) return y;
  const DeviceGuard guard(codes.get_device_index());
  const DeviceLimits limits = device_limits(codes.get_device_index());
  const Tensor bias = weight.bias.has_value() ? torch::stable::contiguous(*weight.bias) : Tensor();
  StreamParams params = call_params(M, K, weight, bias, y);
  params.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  params.token_scale = static_cast<const float*>(scale.const_data_ptr());
  params.group_sum = static_cast<const int32_t*>(group_sum.const_data_ptr());
  params.aligned = K % 4 == 0 && is_aligned(params.codes, 4);
  run(params, codes, limits);
  return y;
}

// Quantizes on the way; scales of whole tokens, and more tokens on other than sm_90, are quantized before.
Tensor linear_of_floats(const Tensor& rows, const TiledWeight& weight) {
  const int64_t M = rows.size(0), K = rows.size(1);
  const DeviceGuard guard(rows.get_device_index());
  const DeviceLimits limits = device_limits(rows.get_device_index());
  check_weight(weight, K);
  Tensor y = torch::stable::new_empty(rows, {M, weight.out_features}, rows.scalar_type());
  if (weight.out_features == 0) return y;
  const Tensor bias = weight.bias.has_value() ? torch::stable::contiguous(*weight.bias) : Tensor();
  StreamParams params = call_params(M, K, weight, bias, y);
  params.x = rows.const_data_ptr();
  params.x_type = float_type(rows, "mixed_linear: x");
  params.x_stride = rows.stride(0);
  params.aligned = K % 4 == 0 && params.x_stride % 4 == 0 && is_aligned(params.x, 16);
  run(params, rows, limits);
  return y;
}

}  // namespace

Tensor mixed_linear_tiled_quantized(const Tensor& codes, const Tensor& scale, const Tensor& group_sum,
                                    const Tensor& tiles, const Tensor& row_index, const Tensor& tile_table,
                                    std::optional<Tensor> bias, int64_t out_features, ScalarType dtype) {
  const Tensor packed = codes.is_contiguous() ? codes : torch::stable::contiguous(codes);
  const Tensor scales = scale.is_contiguous() ? scale : torch::stable::contiguous(scale);
  const Tensor sums = group_sum.is_contiguous() ? group_sum : torch::stable::contiguous(group_sum);
  return linear_of_codes(packed, scales, sums, {tiles, row_index, tile_table, bias, out_features}, dtype);
}

Tensor mixed_linear_tiled(const Tensor& x, const Tensor& tiles, const Tensor& row_index, const Tensor& tile_table,
                          std::optional<Tensor> bias, int64_t out_features, bool per_token) {
  const TiledWeight weight = {tiles, row_index, tile_table, bias, out_features};
  const int64_t K = x.size(x.dim() - 1), M = K == 0 ? 0 : x.numel() / K;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
  shape.push_back(out_features);
  const Tensor rows = x.dim() == 2 && (x.stride(1) == 1 || K == 1)
                          ? x
                          : torch::stable::reshape(torch::stable::contiguous(x), {M, K});
  const bool inside = M <= kQuantizeInside || takes_batch(M, device_limits(x.get_device_index()));
  if (M > 0 && inside && !per_token) return torch::stable::reshape(linear_of_floats(rows, weight), shape);
  const QuantizedActivation activation = quantize_activation(rows, kGroup, per_token);
  return torch::stable::reshape(
      linear_of_codes(activation.codes, activation.scale, activation.group_sum, weight, x.scalar_type()), shape);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation_op(const Tensor& x, int64_t group_size, bool per_token) {
  QuantizedActivation result = quantize_activation(x, group_size, per_token);
  return {result.codes, result.scale, result.group_sum};
}

}  // namespace torchmix

STABLE_TORCH_LIBRARY_IMPL(torchmix, CUDA, library) {
  library.impl("quantize_activation", TORCH_BOX(&torchmix::quantize_activation_op));
  library.impl("mixed_linear_tiled", TORCH_BOX(&torchmix::mixed_linear_tiled));
  library.impl("mixed_linear_tiled_quantized", TORCH_BOX(&torchmix::mixed_linear_tiled_quantized));
}
