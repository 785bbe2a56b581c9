// C functions that run the kernels on the machine, for tests in Python. Sources are those of csrc/cuda, translated.
#include <string>
#include <vector>

#include "hopper_launch.h"
#include "stream_launch.h"
#include "quantize_kernels.h"

using emulator::GlobalBuffer;
using namespace torchmix;

// Mirrored in tests/csrc/emulated_cuda.py. Pointers are null where there is nothing.
struct LinearCall {
  const void *tiles, *row_index, *tile_table, *x, *codes, *token_scale, *group_sum, *bias;
  void *y, *prepared;
  int64_t tile_bytes, x_stride, M, N, K, T;
  int32_t x_type, bias_type, y_type, aligned;
  int32_t together, slots, blocks;  // of stream_kernel
  int32_t tokens, clusters, wide_shift, early;  // of hopper_kernel
  uint64_t seed;
  int32_t lanes_apart;
};

namespace {

size_t float_bytes(int type) { return type == static_cast<int>(Float::kFloat32) ? 4 : 2; }

// Buffers that all products read and write.
struct Operands {
  const GlobalBuffer tiles, rows, table, bias;
  GlobalBuffer y, prepared;

  explicit Operands(const LinearCall& c)
      : tiles("tiles", c.tiles, c.tile_bytes),
        rows("row_index", c.row_index, c.T * kTileRows * 4),
        table("tile_table", c.tile_table, c.T * 4 * 4),
        bias("bias", c.bias, c.N * float_bytes(c.bias_type)),
        y("y", c.y, c.M * c.N * float_bytes(c.y_type)),
        prepared("prepared", c.prepared, c.prepared == nullptr ? 0 : prepared_bytes(c)) {}

  static int64_t prepared_bytes(const LinearCall& c) {
    return Prepared::bytes((c.M + 15) / 16 * 16, (c.K + kGroup - 1) / kGroup);
  }

  template <class Params>
  Params params(const LinearCall& c) const {
    Params p = {};
    p.tiles = static_cast<const uint8_t*>(tiles.get());
    p.row_index = static_cast<const int32_t*>(rows.get());
    p.tile_table = static_cast<const int32_t*>(table.get());
    p.bias = bias.get();
    p.y = y.get();
    p.M = static_cast<int>(c.M);
    p.N = static_cast<int>(c.N);
    p.T = static_cast<int>(c.T);
    p.bias_type = static_cast<Float>(c.bias_type);
    p.y_type = static_cast<Float>(c.y_type);
    return p;
  }
  Prepared activations(const LinearCall& c) const {
    return Prepared::at(static_cast<uint8_t*>(prepared.get()), (c.M + 15) / 16 * 16, (c.K + kGroup - 1) / kGroup);
  }
};

}  // namespace

extern "C" {

// Mirrored like LinearCall.
struct QuantizeCall {
  const void* x;
  void *codes, *scale, *group_sum;
  int64_t x_stride, M, K, group_size;
  int32_t type, aligned, per_token;
  uint64_t seed;
};

const char* emulated_error() { return emulator::error(); }

// prepare_kernel, into call->prepared.
int emulated_prepare(const LinearCall* call) {
  const LinearCall& c = *call;
  const int64_t G = (c.K + kGroup - 1) / kGroup, Mp = (c.M + 15) / 16 * 16;
  emulator::set_seed(c.seed, c.lanes_apart != 0);
  const GlobalBuffer x("x", c.x, ((c.M - 1) * c.x_stride + c.K) * float_bytes(c.x_type));
  const GlobalBuffer codes("codes", c.codes, c.M * c.K), scale("scale", c.token_scale, c.M * G * 4);
  const GlobalBuffer sums("group_sum", c.group_sum, c.M * G * 4);
  GlobalBuffer prepared("prepared", c.prepared, Prepared::bytes(Mp, G));
  PrepareParams p = {};
  p.x = x.get();
  p.codes = static_cast<const int8_t*>(codes.get());
  p.token_scale = static_cast<const float*>(scale.get());
  p.group_sum = static_cast<const int32_t*>(sums.get());
  p.to = Prepared::at(static_cast<uint8_t*>(prepared.get()), Mp, G);
  p.x_stride = c.x_stride;
  p.M = static_cast<int>(c.M);
  p.K = static_cast<int>(c.K);
  p.type = static_cast<Float>(c.x_type);
  p.aligned = c.aligned != 0;
  return launch_prepare(p, __CUDA_ARCH__ >= 900, nullptr);
}

// stream_kernel, on x or on prepared activations.
int emulated_stream(const LinearCall* call) {
  const LinearCall& c = *call;
  emulator::set_seed(c.seed, c.lanes_apart != 0);
  const Operands operands(c);
  const GlobalBuffer x("x", c.x, ((c.M - 1) * c.x_stride + c.K) * float_bytes(c.x_type));
  StreamParams p = operands.params<StreamParams>(c);
  p.x = x.get();
  if (p.x == nullptr) p.prepared = operands.activations(c);
  p.x_stride = c.x_stride;
  p.K = static_cast<int>(c.K);
  p.G = static_cast<int>((c.K + kGroup - 1) / kGroup);
  p.slots = c.slots;
  p.together = c.together;
  p.x_type = static_cast<Float>(c.x_type);
  p.aligned = c.aligned != 0;
  const StreamChoice choice = {c.together, c.slots};
  const int passes = static_cast<int>((c.M + c.together - 1) / c.together);
  const DeviceLimits device = {c.blocks * passes, 232448, false};
  const int token_tiles = stream_token_tiles(c.together);
  const int error = token_tiles == 1   ? launch_stream<1>(p, choice, device, nullptr)
                    : token_tiles == 2 ? launch_stream<2>(p, choice, device, nullptr)
                                       : launch_stream<4>(p, choice, device, nullptr);
  if (error == 0 && operands.tiles.copied() != static_cast<size_t>(c.tile_bytes * passes)) {
    emulator::set_error(("of " + std::to_string(c.tile_bytes) + " bytes of tiles, for " + std::to_string(passes) +
                         " passes, " + std::to_string(operands.tiles.copied()) + " were copied").c_str());
    return cudaErrorLaunchFailure;
  }
  return error;
}

// hopper_kernel, on prepared activations.
int emulated_hopper(const LinearCall* call) {
  const LinearCall& c = *call;
  emulator::set_seed(c.seed, c.lanes_apart != 0);
  const Operands operands(c);
  HopperChoice choice = choose_hopper(c.M, 1, static_cast<int>(c.T), {1, 232448, true});
  choice.tokens = c.tokens;
  choice.cluster = c.tokens >= 64 ? 2 : 1;
  choice.clusters = c.clusters;
  std::vector<float> blank(partial_floats(choice), __builtin_nanf(""));
  std::vector<uint64_t> nobody(ready_signals(choice), 0xababababababababu);
  GlobalBuffer partial("partial", blank.data(), blank.size() * 4), ready("ready", nobody.data(), nobody.size() * 8);
  HopperParams p = operands.params<HopperParams>(c);
  p.tile_bytes = c.tile_bytes;
  p.tokens = operands.activations(c);
  p.partial = static_cast<float*>(partial.get());
  p.ready = static_cast<uint64_t*>(ready.get());
  p.signal = 12345;
  p.row_pieces = static_cast<int>((c.T + 2 * choice.cluster - 1) / (2 * choice.cluster));
  p.token_pieces = static_cast<int>((c.M + c.tokens - 1) / c.tokens);
  p.wide_shift = c.wide_shift;
  p.early = c.early != 0;
  const int error = launch_hopper(p, choice, nullptr);
  const size_t wanted = static_cast<size_t>(c.tile_bytes) * p.token_pieces;
  if (error == 0 && operands.tiles.copied() != wanted) {
    emulator::set_error((std::to_string(operands.tiles.copied()) + " bytes of tiles were copied instead of " +
                         std::to_string(wanted)).c_str());
    return cudaErrorLaunchFailure;
  }
  return error;
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

// result: tokens together, slots, and the bytes of shared memory without the slots.
void emulated_choose_stream(int64_t tokens, int32_t groups, int32_t shared_bytes, int32_t* result) {
  const StreamChoice choice = choose_stream(tokens, groups, {1, shared_bytes, false});
  result[0] = choice.tokens;
  result[1] = choice.slots;
  result[2] = choice.tokens == 0 ? 0 : stream_fixed_bytes(choice.tokens, groups);
}

// result: tokens of a piece, blocks of a cluster, pieces of rows and of tokens, clusters, wide_shift.
void emulated_choose_hopper(int64_t M, int32_t groups, int32_t tiles, int32_t multiprocessors, int32_t* result) {
  const HopperChoice choice = choose_hopper(M, groups, tiles, {multiprocessors, 232448, true});
  result[0] = choice.tokens;
  result[1] = choice.cluster;
  result[2] = choice.row_pieces;
  result[3] = choice.token_pieces;
  result[4] = choice.clusters;
  result[5] = choice.wide_shift;
}

// Writes rows, tokens, first, last and shared of every part of a block, and who else has one; returns how many parts.
int32_t emulated_parts(const int32_t* schedule, int32_t block, int32_t* result, int32_t room) {
  const Schedule cut(schedule[0], schedule[1], schedule[2], schedule[3], schedule[4], schedule[5]);
  Part part;
  int32_t count = 0;
  for (Parts parts(cut, block); parts.next(part) && count < room; count++) {
    const int sharer = part.shared < 0 ? -1 : cut.sharer_before(block, part.shared);
    const int32_t values[6] = {part.rows, part.tokens, part.first, part.last, part.shared, sharer};
    for (int i = 0; i < 6; i++) result[6 * count + i] = values[i];
  }
  return count;
}

}  // extern "C"
