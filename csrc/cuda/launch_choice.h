// How a product is cut into launches: a pure function of its sizes and of the device, without a look at the device.
#pragma once

#include <cstdint>

namespace torchmix {

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // that a block can have
  bool clusters;     // sm_90 and up
};

// Of stream_kernel (stream.cuh).
struct StreamChoice {
  int tokens = 0;  // that go through the weights together; 0: nothing fits
  int blocks = 1;  // of a cluster: parts that the inputs are cut into
  int slots = 0;   // of the ring
};

constexpr int kStreamSlotBytes = 4 * (4 * 512 + 128);  // 4 groups of inputs of up to 4 bits, or 2 of up to 8
constexpr int kStreamMostSlots = 32;
constexpr int kStreamLeastSlots = 4;
constexpr int kStreamWantedSlots = 11;  // about 96 KB on the way; more fill the memory of a second block for nothing
constexpr int kStreamMostTokens = 32;
constexpr int kStreamLanes = 8;

// Tiles of 8 tokens that a kernel is compiled for.
constexpr int stream_token_tiles(int tokens) { return tokens <= 8 ? 1 : tokens <= 16 ? 2 : 4; }

// Bytes of shared memory without the ring; the same sum is made of its parts in stream.cuh.
constexpr int stream_fixed_bytes(int tokens, int blocks, int groups) {
  const int tiled = 8 * stream_token_tiles(tokens);
  const int sums = 2 * kStreamLanes * tiled * 36 * 4, pushed = blocks > 1 ? 2 * blocks * tiled * 36 * 4 : 0;
  const int bytes = 1024 + 3 * 32 * 4 + sums + pushed + groups * (tokens * 128 + tiled * 8);
  return (bytes + 127) / 128 * 128;
}

inline StreamChoice choose_stream(int64_t tokens, int groups, int tiles, const DeviceLimits& device) {
  // Clock cycles, roughly: a group of 32 rows of 4 bits arrives from memory every kMemory cycles per multiprocessor, a
  // tile is finished in kTile, and in kPush more where its sums come from several blocks; a launch takes kStart.
  constexpr double kMemory = 115, kTile = 250, kPush = 700, kWideShare = 1.1;
  StreamChoice best;
  double least = 0;
  const int64_t fewest = (tokens + kStreamMostTokens - 1) / kStreamMostTokens;
  // fewer tokens at a time where the activations of all do not fit, or where passes fill the device better
  for (int64_t passes = fewest; passes <= tokens; passes += fewest) {
    if (best.tokens > 0 && passes > 4 * fewest) break;
    const int together = static_cast<int>((tokens + passes - 1) / passes);
    for (int blocks = 1; blocks <= (device.clusters ? 8 : 1) && blocks <= groups; blocks *= 2) {
      const int share = (groups + blocks - 1) / blocks;
      const int slots = (device.shared_bytes - stream_fixed_bytes(together, blocks, share)) / kStreamSlotBytes;
      if (slots < kStreamLeastSlots) continue;
      const int clusters = device.multiprocessors / blocks;
      const double tiles_each = tiles * kWideShare * static_cast<double>(passes) / clusters;
      const double rounds = static_cast<double>(static_cast<int64_t>(tiles_each + 0.999));
      const double cycles = rounds * (share * kMemory + kTile + (blocks > 1 ? kPush : 0));
      if (best.tokens == 0 || cycles < least) {
        least = cycles;
        best.tokens = together;
        best.blocks = blocks;
        best.slots = slots < kStreamWantedSlots ? slots : kStreamWantedSlots;
      }
    }
  }
  return best;
}

}  // namespace torchmix
