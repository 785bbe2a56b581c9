// How a product is cut into launches: pure functions of its sizes and of the device, without a look at the device.
#pragma once

#include <cstdint>

namespace torchmix {

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // that a block can have
  bool hopper;       // compute capability 9.0
};

// --- hopper_kernel (hopper.cuh) --------------------------------------------------------------------------------------

struct HopperChoice {
  int tokens;        // of a piece: 8, 16, 32, 64 or 128
  int cluster;       // blocks that share the tokens of a piece
  int row_pieces;    // of 128 rows for each block of a cluster
  int token_pieces;
  int clusters;
  int wide_shift;    // a group of 8 bits takes as long as 1 << this of 4
};

inline HopperChoice choose_hopper(int64_t M, int groups, int tiles, const DeviceLimits& device) {
  // A block has at least so many groups of inputs: below that, adding up its sums takes longer than it helps.
  constexpr int64_t kLeastGroups = 4;
  HopperChoice choice = {};
  choice.tokens = M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 ? 32 : M <= 64 ? 64 : 128;
  // with few pieces, smaller ones leave less to be added up
  if (M > 64 && (tiles + 3) / 4 * ((M + 127) / 128) * 2 <= device.multiprocessors / 2) choice.tokens = 64;
  choice.cluster = choice.tokens >= 64 ? 2 : 1;
  choice.row_pieces = (tiles + 2 * choice.cluster - 1) / (2 * choice.cluster);
  choice.token_pieces = static_cast<int>((M + choice.tokens - 1) / choice.tokens);
  // few tokens take the time of reading the weights, more of them that of multiplying
  choice.wide_shift = M <= 64 ? 1 : 0;
  const int64_t most = static_cast<int64_t>(choice.row_pieces) * choice.token_pieces * groups / kLeastGroups;
  const int fitting = device.multiprocessors / choice.cluster;
  choice.clusters = most < 1 ? 1 : most < fitting ? static_cast<int>(most) : fitting;
  return choice;
}

// --- stream_kernel (stream.cuh) --------------------------------------------------------------------------------------

struct StreamChoice {
  int tokens = 0;  // that go through the weights together; 0: nothing fits
  int slots = 0;   // of the ring
};

constexpr int kStreamTileRows = 64;
constexpr int kStreamSlotBytes = 2 * (4 * 1024 + 256);  // 2 groups of inputs of up to 4 bits, or 1 of up to 8
constexpr int kStreamMostSlots = 32;
constexpr int kStreamLeastSlots = 4;
constexpr int kStreamWantedSlots = 11;  // about 96 KB on the way; more fill the memory of a second block for nothing
constexpr int kStreamMostTokens = 32;
constexpr int kStreamLanes = 4;

// Tiles of 8 tokens that a kernel is compiled for.
constexpr int stream_token_tiles(int tokens) { return tokens <= 8 ? 1 : tokens <= 16 ? 2 : 4; }

// Bytes of shared memory without the ring; the same sum is made of its parts in stream.cuh.
constexpr int stream_fixed_bytes(int tokens, int groups) {
  const int tiled = 8 * stream_token_tiles(tokens);
  const int sums = 2 * kStreamLanes * tiled * (kStreamTileRows + 4) * 4;
  const int bytes = 1024 + 3 * kStreamTileRows * 4 + sums + groups * (tokens * 128 + tiled * 8);
  return (bytes + 127) / 128 * 128;
}

// As many tokens at a time as fit, in passes of the same size.
inline StreamChoice choose_stream(int64_t tokens, int groups, const DeviceLimits& device) {
  StreamChoice choice;
  for (int64_t passes = (tokens + kStreamMostTokens - 1) / kStreamMostTokens; passes <= tokens; passes++) {
    const int together = static_cast<int>((tokens + passes - 1) / passes);
    const int slots = (device.shared_bytes - stream_fixed_bytes(together, groups)) / kStreamSlotBytes;
    if (slots < kStreamLeastSlots) continue;
    choice.tokens = together;
    choice.slots = slots < kStreamWantedSlots ? slots : kStreamWantedSlots;
    break;
  }
  return choice;
}

}  // namespace torchmix
