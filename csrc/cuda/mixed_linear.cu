// torchmix::mixed_linear_tiled and its form for quantized activations on CUDA (torchmix/ops/mixed_linear_tiled.py).
#include <atomic>
#include <mutex>
#include <random>

#include "host.h"
#include "hopper_launch.h"
#include "stream_launch.h"

namespace torchmix {
namespace {

constexpr int kQuantizeInside = 16;  // tokens up to which every block of stream_kernel quantizes for itself
constexpr int kMostDevices = 64;

DeviceLimits device_limits(int device) {
  static DeviceLimits known[kMostDevices];
  static std::once_flag asked[kMostDevices];
  STD_TORCH_CHECK(device >= 0 && device < kMostDevices, "mixed_linear: device ", device, " is out of range");
  DeviceLimits& limits = known[device];
  std::call_once(asked[device], [&] {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    limits.hopper = major == 9 && has_hopper_code();  // of the current device, which is this one
  });
  return limits;
}

// A value that no memory holds by chance: what blocks of one launch tell each other by.
uint64_t next_signal() {
  static std::atomic<uint64_t> counter{std::random_device{}() * 0x9e3779b97f4a7c15u};
  uint64_t z = counter.fetch_add(0x9e3779b97f4a7c15u) + 0x9e3779b97f4a7c15u;  // splitmix64
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return (z ^ z >> 31) | 1;  // never 0, which means that nobody has told anything
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
                      weight.tile_table.dim() == 2 && weight.tile_table.size(1) == 4,
                  "mixed_linear: tile_table must be contiguous int32 (tiles, 4)");
  STD_TORCH_CHECK(weight.row_index.numel() == weight.tile_table.size(0) * kTileRows,
                  "mixed_linear: row_index has ", weight.row_index.numel(), " rows, but there are ",
                  weight.tile_table.size(0), " tiles of ", kTileRows);
  STD_TORCH_CHECK(is_aligned(weight.tiles.const_data_ptr(), 16) && is_aligned(weight.tile_table.const_data_ptr(), 16),
                  "mixed_linear: tiles and tile_table must start at multiples of 16 bytes");
  STD_TORCH_CHECK(!weight.bias.has_value() || weight.bias->numel() == weight.out_features,
                  "mixed_linear: the bias must have ", weight.out_features, " values");
  STD_TORCH_CHECK(in_features > 0 && in_features < (1 << 30), "mixed_linear: ", in_features,
                  " inputs are not possible on CUDA, there must be 1 or more");
}

void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "mixed_linear: launch failed: ", cudaGetErrorString(error));
}

// What a call computes: y (M, N) = activations (M, K) times the weight, on the stream of y's device.
struct Call {
  const TiledWeight& weight;
  Tensor bias;  // contiguous; default-constructed where there is none
  Tensor y;
  int64_t M, K, G, Mp;
  DeviceLimits limits;
  cudaStream_t stream;

  Call(const TiledWeight& weight, const Tensor& like, int64_t M, int64_t K, ScalarType dtype)
      : weight(weight),
        y(torch::stable::new_empty(like, {M, weight.out_features}, dtype)),
        M(M),
        K(K),
        G((K + kGroup - 1) / kGroup),
        Mp((M + 15) / 16 * 16),
        limits(device_limits(like.get_device_index())),
        stream(current_stream(like)) {
    check_weight(weight, K);
    if (weight.bias.has_value()) bias = torch::stable::contiguous(*weight.bias);
  }

  // Fields that the parameters of both kernels have.
  template <class Params>
  Params params() const {
    Params params = {};
    params.M = static_cast<int>(M);
    params.N = static_cast<int>(weight.out_features);
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
};

// early: nothing but prepare_kernel was started since the weights were there.
void run_hopper(const Call& call, const Prepared& prepared, bool early) {
  HopperParams params = call.params<HopperParams>();
  const HopperChoice choice = choose_hopper(call.M, static_cast<int>(call.G), params.T, call.limits);
  const int64_t partial = partial_floats(choice) * 4;
  const Tensor scratch = torch::stable::new_empty(call.y, {partial + ready_signals(choice) * 8}, ScalarType::Byte);
  uint8_t* at = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  params.partial = reinterpret_cast<float*>(at);
  params.ready = reinterpret_cast<uint64_t*>(at + partial);
  params.signal = next_signal();
  params.tokens = prepared;
  params.tile_bytes = call.weight.tiles.numel();
  params.row_pieces = choice.row_pieces;
  params.token_pieces = choice.token_pieces;
  params.wide_shift = choice.wide_shift;
  params.early = early;
  check_launch(launch_hopper(params, choice, call.stream));
}

void run_stream(const Call& call, StreamParams params) {
  const StreamChoice choice = choose_stream(call.M, static_cast<int>(call.G), call.limits);
  STD_TORCH_CHECK(choice.tokens > 0, "mixed_linear: ", call.K, " inputs do not fit this GPU's shared memory (",
                  call.limits.shared_bytes, " bytes per block)");
  params.K = static_cast<int>(call.K);
  params.G = static_cast<int>(call.G);
  params.slots = choice.slots;
  params.together = choice.tokens;
  switch (stream_token_tiles(choice.tokens)) {
    case 1: check_launch(launch_stream<1>(params, choice, call.limits, call.stream)); break;
    case 2: check_launch(launch_stream<2>(params, choice, call.limits, call.stream)); break;
    default: check_launch(launch_stream<4>(params, choice, call.limits, call.stream)); break;
  }
}

void run(const Call& call, const Prepared& prepared, bool early) {
  if (call.limits.hopper) return run_hopper(call, prepared, early);
  StreamParams params = call.params<StreamParams>();
  params.prepared = prepared;
  run_stream(call, params);
}

// Activations x (M, K) or their codes in the order of the kernels, in new memory.
Tensor prepare(PrepareParams& params, const Tensor& like, int64_t M, int64_t K) {
  const int64_t G = (K + kGroup - 1) / kGroup, Mp = (M + 15) / 16 * 16;
  const Tensor prepared = torch::stable::new_empty(like, {Prepared::bytes(Mp, G)}, ScalarType::Byte);
  params.to = Prepared::at(static_cast<uint8_t*>(prepared.mutable_data_ptr()), Mp, G);
  params.M = static_cast<int>(M);
  params.K = static_cast<int>(K);
  if (M > 0 && K > 0) {
    check_launch(launch_prepare(params, device_limits(like.get_device_index()).hopper, current_stream(like)));
  }
  return prepared;
}

Tensor prepare_floats(const Tensor& rows, PrepareParams& params) {
  const int64_t K = rows.size(1);
  params.x = rows.const_data_ptr();
  params.type = float_type(rows, "mixed_linear: x");
  params.x_stride = rows.stride(0);
  params.aligned = K % 8 == 0 && params.x_stride % 8 == 0 && is_aligned(params.x, 16);
  return prepare(params, rows, rows.size(0), K);
}

Tensor prepare_codes(const Tensor& codes, const Tensor& scale, const Tensor& group_sum, PrepareParams& params) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char, "mixed_linear: codes must be int8");
  const int64_t K = codes.size(1);
  params.codes = static_cast<const int8_t*>(codes.const_data_ptr());
  params.token_scale = static_cast<const float*>(scale.const_data_ptr());
  params.group_sum = static_cast<const int32_t*>(group_sum.const_data_ptr());
  params.aligned = K % 8 == 0 && is_aligned(params.codes, 8);
  return prepare(params, codes, codes.size(0), K);
}

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// x (..., K) as (M, K) with neighbouring inputs side by side.
Tensor as_rows(const Tensor& x) {
  const int64_t K = x.size(x.dim() - 1);
  if (x.dim() == 2 && (x.stride(1) == 1 || K == 1)) return x;
  return torch::stable::reshape(torch::stable::contiguous(x), {K == 0 ? 0 : x.numel() / K, K});
}

}  // namespace

Tensor prepare_activation(const Tensor& x, bool per_token) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor rows = as_rows(x);
  PrepareParams params = {};
  if (!per_token) return prepare_floats(rows, params);
  const QuantizedActivation activation = quantize_activation(rows, kGroup, true);
  return prepare_codes(activation.codes, activation.scale, activation.group_sum, params);
}

Tensor mixed_linear_tiled_prepared(const Tensor& prepared, int64_t M, int64_t K, const Tensor& tiles,
                                   const Tensor& row_index, const Tensor& tile_table, std::optional<Tensor> bias,
                                   int64_t out_features, ScalarType dtype) {
  const DeviceGuard guard(prepared.get_device_index());
  const TiledWeight weight = {tiles, row_index, tile_table, bias, out_features};
  const Call call(weight, prepared, M, K, dtype);
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Byte && prepared.is_contiguous() &&
                      prepared.numel() == Prepared::bytes(call.Mp, call.G) && is_aligned(prepared.const_data_ptr(), 16),
                  "mixed_linear: activations of ", M, " tokens with ", K, " inputs must be contiguous uint8 (",
                  Prepared::bytes(call.Mp, call.G), "), from prepare_activation");
  if (M == 0 || out_features == 0) return call.y;
  run(call, Prepared::at(static_cast<uint8_t*>(prepared.mutable_data_ptr()), call.Mp, call.G), false);
  return call.y;
}

Tensor mixed_linear_tiled_quantized(const Tensor& codes, const Tensor& scale, const Tensor& group_sum,
                                    const Tensor& tiles, const Tensor& row_index, const Tensor& tile_table,
                                    std::optional<Tensor> bias, int64_t out_features, ScalarType dtype) {
  const DeviceGuard guard(codes.get_device_index());
  const TiledWeight weight = {tiles, row_index, tile_table, bias, out_features};
  const Call call(weight, codes, codes.size(0), codes.size(1), dtype);
  if (call.M == 0 || out_features == 0) return call.y;
  PrepareParams params = {};
  const Tensor prepared = prepare_codes(packed(codes), packed(scale), packed(group_sum), params);
  run(call, params.to, true);
  return call.y;
}

Tensor mixed_linear_tiled(const Tensor& x, const Tensor& tiles, const Tensor& row_index, const Tensor& tile_table,
                          std::optional<Tensor> bias, int64_t out_features, bool per_token) {
  const DeviceGuard guard(x.get_device_index());
  const TiledWeight weight = {tiles, row_index, tile_table, bias, out_features};
  const Tensor rows = as_rows(x);
  const Call call(weight, rows, rows.size(0), rows.size(1), x.scalar_type());
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); i++) shape.push_back(x.size(i));
  shape.push_back(out_features);
  if (call.M > 0 && out_features > 0) {
    PrepareParams params = {};
    if (!call.limits.hopper && call.M <= kQuantizeInside && !per_token) {
      StreamParams stream = call.params<StreamParams>();
      stream.x = rows.const_data_ptr();
      stream.x_type = float_type(rows, "mixed_linear: x");
      stream.x_stride = rows.stride(0);
      stream.aligned = call.K % 4 == 0 && stream.x_stride % 4 == 0 && is_aligned(stream.x, 16);
      run_stream(call, stream);
    } else if (per_token) {
      const QuantizedActivation activation = quantize_activation(rows, kGroup, true);
      const Tensor prepared = prepare_codes(activation.codes, activation.scale, activation.group_sum, params);
      run(call, params.to, true);
    } else {
      const Tensor prepared = prepare_floats(rows, params);
      run(call, params.to, true);
    }
  }
  return torch::stable::reshape(call.y, shape);
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation_op(const Tensor& x, int64_t group_size, bool per_token) {
  QuantizedActivation result = quantize_activation(x, group_size, per_token);
  return {result.codes, result.scale, result.group_sum};
}

}  // namespace torchmix

STABLE_TORCH_LIBRARY_IMPL(torchmix, CUDA, library) {
  library.impl("quantize_activation", TORCH_BOX(&torchmix::quantize_activation_op));
  library.impl("prepare_activation", TORCH_BOX(&torchmix::prepare_activation));
  library.impl("mixed_linear_tiled_prepared", TORCH_BOX(&torchmix::mixed_linear_tiled_prepared));
  library.impl("mixed_linear_tiled", TORCH_BOX(&torchmix::mixed_linear_tiled));
  library.impl("mixed_linear_tiled_quantized", TORCH_BOX(&torchmix::mixed_linear_tiled_quantized));
}
