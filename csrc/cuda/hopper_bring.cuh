// Shared memory of hopper_kernel (hopper.cuh), and the two threads that fill it.
#pragma once

#include "codes.cuh"
#include "prepared.cuh"
#include "schedule.h"

namespace torchmix {

constexpr int kHopperThreads = 384;  // a warpgroup of which two threads copy, two that multiply
constexpr int kMultiplying = 256;
constexpr int kTileSpace = block_bytes(8);  // of a stage, for each warpgroup
constexpr int kMaxStages = 12;
constexpr int kHopperShared = 227 << 10;
constexpr int kOffsetBytes = 2 * kChunk * 8 * 8;  // of a warp: scales and zero points of 32 groups of 8 pairs of rows

struct HopperParams {
  const uint8_t* tiles;
  int64_t tile_bytes;
  const int32_t* row_index;   // (T * 64)
  const int32_t* tile_table;  // (T, 4): offset / 16, bits, number of tiles above 4 bits, whether its scales are usual
  Prepared tokens;
  const void* bias;  // (N) or null
  void* y;           // (M, N)
  float* partial;    // (blocks, 2, TOKENS / 2, 128): sums that a block leaves to another
  uint64_t* ready;   // (blocks, 2): `signal` once they are there, else anything but that
  uint64_t signal;
  int M, N, T, row_pieces, token_pieces, wide_shift;
  Float bias_type, y_type;
  bool early;  // weights may be read while the kernel before this one still runs, see prepare_kernel
};

template <int TOKENS>
struct HopperLayout {
  // Blocks of a cluster have different rows and the same tokens, which each of them brings for both.
  static constexpr int kCluster = TOKENS >= 64 ? 2 : 1;
  // With few tokens registers are left for the blocks of prepare_kernel, so that both can run at one time.
  static constexpr int kBoundThreads = TOKENS <= 16 ? 512 : kHopperThreads;
  static constexpr int kFewRegisters = TOKENS == 128 ? 40 : 56;
  static constexpr int kManyRegisters = TOKENS <= 16 ? 160 : TOKENS <= 64 ? 224 : 232;
  // Of those that the launch reserves; asking for more would wait for ever.
  static_assert(128 * kFewRegisters + kMultiplying * kManyRegisters <= kHopperThreads * (65536 / kBoundThreads / 8 * 8));
  // Groups that a warpgroup takes at a time: few tokens leave registers for more, which hides latencies.
  static constexpr int kTogether = TOKENS <= 32 ? 2 : 1;
  static constexpr int kCodeBytes = TOKENS * kGroup;
  static constexpr int kScaleBytes = TOKENS < 16 ? 64 : TOKENS * 4;  // 16 tokens are the least
  static constexpr int kStageBytes = (kCodeBytes + 2 * kTileSpace + kScaleBytes + 1023) / 1024 * 1024;
  static constexpr int kSumBytes = TOKENS * kChunkBytes;
  static constexpr int kOffsetSpace = kMultiplying / 32 * kOffsetBytes;
  static constexpr int kFixedBytes = 1024 + kOffsetSpace + 2 * kSumBytes;
  static constexpr int kFitting = (kHopperShared - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;
};

// Places in shared memory; barriers as addresses.
template <int TOKENS>
struct HopperShared {
  using Layout = HopperLayout<TOKENS>;
  uint8_t* base;
  uint32_t full, empty, sums_full, sums_empty;

  __device__ __forceinline__ explicit HopperShared(uint8_t* base) : base(base) {
    full = smem_address(base);
    empty = full + 8 * kMaxStages;
    sums_full = empty + 8 * kMaxStages;
    sums_empty = sums_full + 16;
  }
  __device__ __forceinline__ uint8_t* offsets(int warp) const { return base + 1024 + warp * kOffsetBytes; }
  __device__ __forceinline__ uint8_t* stage(int slot) const { return base + 1024 + Layout::kOffsetSpace + slot * Layout::kStageBytes; }
  __device__ __forceinline__ uint32_t stage_address(int slot) const { return smem_address(stage(slot)); }
  __device__ __forceinline__ uint8_t* sums(int buffer) const {
    return stage(Layout::kStages) + buffer * Layout::kSumBytes;
  }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < Layout::kStages; i++) {
      barrier_init(full + 8 * i, 2);  // who brings weights, who brings tokens
      barrier_init(empty + 8 * i, Layout::kCluster * kMultiplying / 32);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(sums_full + 8 * i, 1);
      barrier_init(sums_empty + 8 * i, Layout::kCluster * kMultiplying / 32);
    }
    barrier_init_fence();
  }

  // A warp is done with what this barrier guards, and says so to everybody who writes there.
  __device__ __forceinline__ void give_back(uint32_t barrier) const {
    if constexpr (Layout::kCluster == 1) {
      barrier_arrive(barrier);
    } else {
      for (int rank = 0; rank < Layout::kCluster; rank++) barrier_arrive_at(barrier, rank);
    }
  }
};

// A tile as the table has it; bits 0: there is none.
struct Tile {
  const uint8_t* data;
  int bits;
  bool usual;

  __device__ __forceinline__ Tile(const HopperParams& p, int number) : data(nullptr), bits(0), usual(true) {
    if (number >= p.T) return;
    const int4 entry = *reinterpret_cast<const int4*>(p.tile_table + 4 * number);
    data = p.tiles + 16 * static_cast<int64_t>(entry.x);
    bits = entry.y;
    usual = entry.w != 0;
  }
  __device__ __forceinline__ uint32_t bytes() const { return bits > 0 ? block_bytes(bits) : 0; }  // of a group
};

// Asks for the first weights of a block before anything may be read: the L2 cache always holds what is true. Should the
// table that says where they are not be there yet, something else is asked for, in vain.
template <int TOKENS>
__device__ __forceinline__ void prefetch_weights(const HopperParams& p, const Schedule& schedule, int rank) {
  using Layout = HopperLayout<TOKENS>;
  Part part;
  int left = Layout::kStages;
  for (Parts parts(schedule, blockIdx.x / Layout::kCluster); left > 0 && parts.next(part); left -= part.last - part.first) {
    for (int w = 0; w < 2; w++) {
      const int number = 2 * (part.rows * Layout::kCluster + rank) + w;
      const Tile tile(p, number);
      const int64_t start = tile.data - p.tiles + static_cast<int64_t>(part.first) * tile.bytes();
      const int64_t size = static_cast<int64_t>(min(left, part.last - part.first)) * tile.bytes();
      if (size > 0 && start >= 0 && start + size <= p.tile_bytes) prefetch_bulk(p.tiles + start, size);
    }
  }
}

// Weights of all groups of all parts of a block into the ring; one thread.
template <int TOKENS>
__device__ __forceinline__ void bring_weights(const HopperParams& p, const Schedule& schedule,
                                              const HopperShared<TOKENS>& shared, int rank) {
  using Layout = HopperLayout<TOKENS>;
  Ring at;
  Part part;
  for (Parts parts(schedule, blockIdx.x / Layout::kCluster); parts.next(part);) {
    const int first_tile = 2 * (part.rows * Layout::kCluster + rank);
    const Tile tiles[2] = {Tile(p, first_tile), Tile(p, first_tile + 1)};
    const uint32_t sizes[2] = {tiles[0].bytes(), tiles[1].bytes()};
    const uint8_t* from[2] = {tiles[0].data + static_cast<int64_t>(part.first) * sizes[0],
                              tiles[1].data + static_cast<int64_t>(part.first) * sizes[1]};
    for (int group = part.first; group < part.last; group++) {
      const uint32_t barrier = shared.full + 8 * at.slot, to = shared.stage_address(at.slot) + Layout::kCodeBytes;
      barrier_wait(shared.empty + 8 * at.slot, at.phase ^ 1);
      barrier_expect(barrier, sizes[0] + sizes[1]);
      for (int w = 0; w < 2; w++) {
        if (sizes[w] > 0) copy_bulk(to + w * kTileSpace, from[w], sizes[w], barrier);
        from[w] += sizes[w];
      }
      at.advance(1, Layout::kStages);
    }
  }
}

// Codes and scales of a stage's tokens and, with the first group of a chunk, the sums for its offsets; one thread.
template <int TOKENS>
__device__ __forceinline__ void bring_tokens(const HopperParams& p, const Schedule& schedule,
                                             const HopperShared<TOKENS>& shared, int rank) {
  using Layout = HopperLayout<TOKENS>;
  constexpr int kMine = TOKENS / Layout::kCluster;  // tokens that this block brings, from number rank * kMine on
  const Prepared& from = p.tokens;
  const auto copy = [](uint32_t to, const void* source, uint32_t bytes, uint32_t barrier) {
    if (Layout::kCluster == 1) copy_bulk(to, source, bytes, barrier);
    if (Layout::kCluster > 1 && bytes > 0) copy_bulk_to_both(to, source, bytes, barrier);
  };
  Ring at;
  Part part;
  int chunks = 0;
  for (Parts parts(schedule, blockIdx.x / Layout::kCluster); parts.next(part);) {
    const int all = min(TOKENS, from.Mp - part.tokens * TOKENS), skipped = rank * kMine;
    const int mine = max(min(kMine, all - skipped), 0), first = part.tokens * TOKENS + skipped;
    const int scales = TOKENS < 16 ? 16 : mine;  // 16 tokens are the least
    const uint32_t bytes = all * kGroup + (TOKENS < 16 ? 16 : all) * 4;
    int64_t token = static_cast<int64_t>(part.first) * from.Mp + first;
    for (int group = part.first; group < part.last; group++) {
      const uint32_t barrier = shared.full + 8 * at.slot, to = shared.stage_address(at.slot);
      barrier_wait(shared.empty + 8 * at.slot, at.phase ^ 1);
      barrier_expect(barrier, bytes);
      copy(to + skipped * kGroup, from.codes + token * kGroup, mine * kGroup, barrier);
      copy(to + Layout::kCodeBytes + 2 * kTileSpace + skipped * 4, from.scale + token, scales * 4, barrier);
      if (group == part.first || group % kChunk == 0) {
        const int buffer = chunks % 2;
        const int64_t at_token = static_cast<int64_t>(group / kChunk) * from.Mp + first;
        barrier_wait(shared.sums_empty + 8 * buffer, (chunks / 2 % 2) ^ 1);
        barrier_expect(shared.sums_full + 8 * buffer, all * kChunkBytes);
        copy(smem_address(shared.sums(buffer)) + skipped * kChunkBytes, from.sums + at_token * kChunkBytes,
             mine * kChunkBytes, shared.sums_full + 8 * buffer);
        chunks++;
      }
      token += from.Mp;
      at.advance(1, Layout::kStages);
    }
  }
}

}  // namespace torchmix
