// C functions that run the kernels on the machine, for tests in Python. Sources are those of csrc/cuda, translated.
#include <string>
#include <vector>

#include "batch_launch.h"
#include "stream_launch.h"
#include "quantize_kernels.h"

using emulator::GlobalBuffer;
using namespace torchmix;

namespace {

size_t float_bytes(int type) { return type == static_cast<int>(Float::kFloat32) ? 4 : 2; }

}  // namespace

extern "C" {

// Mirrored in tests/csrc/emulated_cuda.py. Pointers are null where there is nothing.
struct StreamCall {
  const void *tiles, *row_index, *tile_table, *x, *codes, *token_scale, *group_sum, *bias;
  void* y;
  int64_t tile_bytes, x_stride, M, N, K, T;
  int32_t x_type, bias_type, y_type, aligned;
  int32_t together, blocks, slots, clusters;
  uint64_t seed;
  int32_t lanes_apart;
};

struct QuantizeCall {
  const void* x;
  void *codes, *scale, *group_sum;
  int64_t x_stride, M, K, group_size;
  int32_t type, aligned, per_token;
  uint64_t seed;
};

const char* emulated_error() { return emulator::error(); }

int emulated_stream(const StreamCall* call) {
  const StreamCall& c = *call;
  const int64_t G = (c.K + kGroup - 1) / kGroup;
  emulator::set_seed(c.seed, c.lanes_apart != 0);
  const GlobalBuffer tiles("tiles", c.tiles, c.tile_bytes), rows("row_index", c.row_index, c.T * kTileRows * 4);
  const GlobalBuffer table("tile_table", c.tile_table, c.T * 3 * 4), bias("bias", c.bias, c.N * float_bytes(c.bias_type));
  const GlobalBuffer x("x", c.x, ((c.M - 1) * c.x_stride + c.K) * float_bytes(c.x_type));
  const GlobalBuffer codes("codes", c.codes, c.M * c.K), scale("scale", c.token_scale, c.M * G * 4);
  const GlobalBuffer sums("group_sum", c.group_sum, c.M * G * 4);
  GlobalBuffer y("y", c.y, c.M * c.N * float_bytes(c.y_type));
  StreamParams p = {};
  p.tiles = static_cast<const uint8_t*>(tiles.get());
  p.row_index = static_cast<const int32_t*>(rows.get());
  p.tile_table = static_cast<const int32_t*>(table.get());
  p.x = x.get();
  p.codes = static_cast<const int8_t*>(codes.get());
  p.token_scale = static_cast<const float*>(scale.get());
  p.group_sum = static_cast<const int32_t*>(sums.get());
  p.bias = bias.get();
  p.y = y.get();
  p.x_stride = c.x_stride;
  p.M = static_cast<int>(c.M);
  p.N = static_cast<int>(c.N);
  p.K = static_cast<int>(c.K);
  p.G = static_cast<int>(G);
  p.T = static_cast<int>(c.T);
  p.slots = c.slots;
  p.together = c.together;
  p.x_type = static_cast<Float>(c.x_type);
  p.bias_type = static_cast<Float>(c.bias_type);
  p.y_type = static_cast<Float>(c.y_type);
  p.aligned = c.aligned != 0;
  const StreamChoice choice = {c.together, c.blocks, c.slots};
  const int passes = static_cast<int>((c.M + c.together - 1) / c.together);
  const DeviceLimits device = {c.clusters * c.blocks * passes, 232448, __CUDA_ARCH__ >= 900};
  const bool quantize = c.x != nullptr;
  const int token_tiles = stream_token_tiles(c.together);
  const int error = token_tiles == 1   ? launch_stream<1>(p, choice, device, quantize, nullptr)
                    : token_tiles == 2 ? launch_stream<2>(p, choice, device, quantize, nullptr)
                                       : launch_stream<4>(p, choice, device, quantize, nullptr);
  if (error == 0 && tiles.copied() != static_cast<size_t>(c.tile_bytes * passes)) {
    emulator::set_error(("of " + std::to_string(c.tile_bytes) + " bytes of tiles, for " + std::to_string(passes) +
                         " passes, " + std::to_string(tiles.copied()) + " were copied").c_str());
    return cudaErrorLaunchFailure;
  }
  return error;
}

// The same through prepare_kernel and batch_kernel; `together`: tokens of a piece, `clusters`: multiprocessors.
int emulated_batch(const StreamCall* call) {
  const StreamCall& c = *call;
  const int64_t G = (c.K + kGroup - 1) / kGroup, Mp = (c.M + 15) / 16 * 16, Gp = (G + 15) / 16 * 16;
  emulator::set_seed(c.seed, c.lanes_apart != 0);
  const GlobalBuffer tiles("tiles", c.tiles, c.tile_bytes), rows("row_index", c.row_index, c.T * kTileRows * 4);
  const GlobalBuffer table("tile_table", c.tile_table, c.T * 3 * 4), bias("bias", c.bias, c.N * float_bytes(c.bias_type));
  const GlobalBuffer x("x", c.x, ((c.M - 1) * c.x_stride + c.K) * float_bytes(c.x_type));
  const GlobalBuffer codes("codes", c.codes, c.M * c.K), scale("scale", c.token_scale, c.M * G * 4);
  const GlobalBuffer sums("group_sum", c.group_sum, c.M * G * 4);
  std::vector<uint8_t> blank(G * Mp * kGroup, 0xff), blank_scale(G * Mp * 4, 0xff), blank_sums(Mp * Gp * 6, 0xff);
  std::vector<uint8_t> blank_unit(Mp * 4, 0xff);
  GlobalBuffer to_codes("prepared codes", blank.data(), blank.size());
  GlobalBuffer to_scale("prepared scale", blank_scale.data(), blank_scale.size());
  GlobalBuffer to_sums("prepared sums", blank_sums.data(), blank_sums.size());
  GlobalBuffer to_unit("prepared unit", blank_unit.data(), blank_unit.size());
  GlobalBuffer y("y", c.y, c.M * c.N * float_bytes(c.y_type));
  PrepareParams prepare = {};
  prepare.source.x = x.get();
  prepare.source.codes = static_cast<const int8_t*>(codes.get());
  prepare.source.token_scale = static_cast<const float*>(scale.get());
  prepare.source.group_sum = static_cast<const int32_t*>(sums.get());
  prepare.source.x_stride = c.x_stride;
  prepare.source.M = static_cast<int>(c.M);
  prepare.source.K = static_cast<int>(c.K);
  prepare.source.G = static_cast<int>(G);
  prepare.source.x_type = static_cast<Float>(c.x_type);
  prepare.source.aligned = c.aligned != 0;
  prepare.to = {static_cast<uint8_t*>(to_codes.get()), static_cast<float*>(to_scale.get()),
                static_cast<uint32_t*>(to_sums.get()), static_cast<float*>(to_unit.get()), static_cast<int>(Mp),
                static_cast<int>(Gp)};
  if (const int failed = launch_prepare(prepare, nullptr)) return failed;
  BatchParams p = {};
  p.tiles = static_cast<const uint8_t*>(tiles.get());
  p.row_index = static_cast<const int32_t*>(rows.get());
  p.tile_table = static_cast<const int32_t*>(table.get());
  p.tokens = prepare.to;
  p.bias = bias.get();
  p.y = y.get();
  p.M = static_cast<int>(c.M);
  p.N = static_cast<int>(c.N);
  p.G = static_cast<int>(G);
  p.T = static_cast<int>(c.T);
  p.bias_type = static_cast<Float>(c.bias_type);
  p.y_type = static_cast<Float>(c.y_type);
  return c.together == 64 ? launch_batch<64>(p, c.clusters, nullptr) : launch_batch<128>(p, c.clusters, nullptr);
}

int emulated_quantize(const QuantizeCall* call) {
  const QuantizeCall& c = *call;
  const int64_t G = (c.K + c.group_size - 1) / c.group_size;
  emulator::set_seed(c.seed, true);
  const GlobalBuffer x("x", c.x, ((c.M - 1) * c.x_stride + c.K) * float_bytes(c.type));
  GlobalBuffer codes("codes", c.codes, c.M * c.K), scale("scale", c.scale, c.M * G * 4);
  GlobalBuffer sums("group_sum", c.group_sum, c.M * G * 4);
  QuantizeParams p = {};
  p.x = x.get();
  p.codes = static_cast<int8_t*>(codes.get());
  p.scale = static_cast<float*>(scale.get());
  p.group_sum = static_cast<int32_t*>(sums.get());
  p.x_stride = c.x_stride;
  p.M = c.M;
  p.K = static_cast<int>(c.K);
  p.G = static_cast<int>(G);
  p.group_size = static_cast<int>(c.group_size);
  p.type = static_cast<Float>(c.type);
  p.aligned = c.aligned != 0;
  if (c.group_size == kGroup && c.per_token == 0) {
    const int64_t per_block = kThreads / 16 * kUnroll;
    const dim3 grid(static_cast<unsigned>((c.M * G + per_block - 1) / per_block));
    return emulator::launch(quantize_groups, {grid, dim3(kThreads), 0, 1}, p);
  }
  return emulator::launch(quantize_tokens, {dim3(static_cast<unsigned>(c.M)), dim3(kThreads), 0, 1}, p, c.per_token != 0);
}

// result: tokens together, blocks, slots, and the bytes of shared memory without the slots.
void emulated_choose_stream(int64_t tokens, int32_t groups, int32_t tiles, int32_t multiprocessors, int32_t shared_bytes,
                            int32_t clusters, int32_t* result) {
  const StreamChoice choice = choose_stream(tokens, groups, tiles, {multiprocessors, shared_bytes, clusters != 0});
  const int share = (groups + choice.blocks - 1) / choice.blocks;
  result[0] = choice.tokens;
  result[1] = choice.blocks;
  result[2] = choice.slots;
  result[3] = choice.tokens == 0 ? 0 : stream_fixed_bytes(choice.tokens, choice.blocks, share);
}

}  // extern "C"
