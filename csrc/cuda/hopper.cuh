// mixed_linear on sm_90a: weights from memory straight into the tensor cores' registers, any number of tokens.
//
// A block has 128 rows (two tiles, one for each of its two warpgroups) by TOKENS tokens at a time. A producer warp
// brings the weights and the tokens' codes of one group of inputs after another into a ring of stages; weights are
// unpacked to bytes in registers, the left operand of wgmma, while the tensor cores work on the group before. Work is
// cut by the Schedule, so that all blocks end together; blocks that share a piece add up their sums in a fixed order.
//
// Both operands are unsigned (activations code + 128; weights as stored, those of 8 bits code + 128), so an integer sum
// v of a group is below 2^23, and its bits, read as a float, are the denormal number v * 2^-149, exactly. With s the
// weight's scale and a the token's, two multiply-adds scale it without a conversion:
//
//     t = fma(bits(v), s * 2^124, -s * 128 * sum(w) * 2^-25)       y += t * a
//
// t is the product of the unsigned weights w with the signed codes, in units of 2^-25. What is left is, for every row,
// token and group, zero point * s * sum(codes) * a: a product over groups, taken from y by the tensor cores after every
// 16 groups, in bfloat16 with both factors in two parts (of whose four products the smallest, 2^-16 of the whole, is
// left out). Tiles with weight scales too large or small for these units are scaled in another, slower way.
//
// Shapes: M tokens, Mp the same in a multiple of 16, N rows, K inputs, G groups of 128 inputs, T tiles.
#pragma once

#include "hopper_weights.cuh"
#include "prepared.cuh"
#include "schedule.h"

namespace torchmix {

constexpr int kHopperThreads = 384;  // a warpgroup of which one thread copies, two that multiply
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

// What a warp of the two warpgroups that multiply knows of itself.
struct Place {
  int group, warp, lane;  // warpgroup, warp in it
  __device__ __forceinline__ explicit Place(int thread) : group(thread / 128), warp(thread / 32 % 4), lane(thread % 32) {}
};

// A group's weights in registers, and where its stage is: bytes from the first one, and its barriers'.
struct Group {
  GroupWeights weights;
  uint32_t stage, barrier;
};

// The next stage to be read.
template <int TOKENS>
struct Cursor {
  using Layout = HopperLayout<TOKENS>;
  uint32_t stage = 0, barrier = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    stage += Layout::kStageBytes;
    barrier += 8;
    if (barrier == 8 * Layout::kStages) stage = 0, barrier = 0, phase ^= 1;
  }
};

// The part of a tile that belongs to one warpgroup, some groups at a time.
template <int TOKENS>
struct Multiplier {
  using Layout = HopperLayout<TOKENS>;
  const HopperShared<TOKENS>& shared;
  const Place& place;
  Cursor<TOKENS>& at;
  int& chunks;
  const Part& part;
  float (&y)[TOKENS / 2];
  int bits;
  float unit;  // y holds sums over this

  __device__ __forceinline__ uint2* offsets(int group) const {
    return reinterpret_cast<uint2*>(shared.offsets(4 * place.group + place.warp)) + group % (2 * kChunk) * 8;
  }

  // The next COUNT groups.
  template <int BITS, int COUNT>
  __device__ __forceinline__ void load(Group (&groups)[COUNT]) const {
#pragma unroll
    for (Group& group : groups) {
      barrier_wait(shared.full + at.barrier, at.phase);
      group.stage = at.stage;
      group.barrier = at.barrier;
      const uint8_t* block = shared.stage(0) + at.stage + Layout::kCodeBytes + place.group * kTileSpace;
      load_weights<BITS>(group.weights, block, place.warp, place.lane);
      at.advance();
    }
  }

  template <int COUNT>
  __device__ __forceinline__ void start(int (&v)[COUNT][TOKENS / 2], const Group (&groups)[COUNT]) const {
    const uint64_t first = swizzled_descriptor(shared.stage_address(0));
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      const uint64_t tokens = first + groups[j].stage / 16;
#pragma unroll
      for (int step = 0; step < 4; step++) {
        wgmma_multiply(v[j], groups[j].weights.a + 4 * step, tokens + 2 * step, step == 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ const uint8_t* token_scales(const Group& group) const {
    return shared.stage(0) + group.stage + Layout::kCodeBytes + 2 * kTileSpace;
  }

  __device__ __forceinline__ void release(const Group& group) const {
    if (place.lane == 0) shared.give_back(shared.empty + group.barrier);
  }

  // Puts aside what a group's offsets need; four lanes write the same.
  __device__ __forceinline__ void keep_offsets(int group, const GroupWeights& weights) const {
    offsets(group)[place.lane / 4] = {weights.scales, weights.offsets};
  }

  // Takes the offsets of one chunk's groups from y.
  __device__ __forceinline__ void subtract_offsets(int chunk) {
    __syncwarp();
    uint2 pairs[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int group = chunk * kChunk + 4 * (place.lane % 4) + e;
      pairs[e] = offset_factors(offsets(group)[place.lane / 4], bits, unit);
      if (group < part.first || group >= part.last) pairs[e] = {0, 0};  // of another part, or of none
    }
    __syncwarp();
    const uint32_t first[4] = {__byte_perm(pairs[0].x, pairs[1].x, 0x5410), __byte_perm(pairs[0].x, pairs[1].x, 0x7632),
                               __byte_perm(pairs[2].x, pairs[3].x, 0x5410), __byte_perm(pairs[2].x, pairs[3].x, 0x7632)};
    const uint32_t second[4] = {__byte_perm(pairs[0].y, pairs[1].y, 0x5410), __byte_perm(pairs[0].y, pairs[1].y, 0x7632),
                                __byte_perm(pairs[2].y, pairs[3].y, 0x5410), __byte_perm(pairs[2].y, pairs[3].y, 0x7632)};
    const int buffer = chunks % 2;
    barrier_wait(shared.sums_full + 8 * buffer, chunks / 2 % 2);
    const uint64_t sums = plain_descriptor(smem_address(shared.sums(buffer)), 128, 512);
    wgmma_fence();
    wgmma_multiply(y, first, sums);
    wgmma_multiply(y, second, sums);
    wgmma_multiply(y, first, sums + 256 / 16);
    wgmma_commit();
    wgmma_wait();
    end_chunk();
  }

  __device__ __forceinline__ void end_chunk() {
    if (place.lane == 0) shared.give_back(shared.sums_empty + 8 * (chunks % 2));
    chunks++;
  }

  // Chunks that end within groups `group` to `end` - 1, at most 16 of them, or with the part.
  template <class Function>
  __device__ __forceinline__ void ended_chunks(int group, int end, Function function) const {
    if (group / kChunk != end / kChunk) function(group / kChunk);
    if (end == part.last && end % kChunk != 0) function(end / kChunk);
  }

  // COUNT groups, whose weights are in `now`; if there are more, those come into `next` while the tensor cores work.
  template <int BITS, int COUNT>
  __device__ __forceinline__ void step(int group, bool more, const Group (&now)[COUNT], Group (&next)[COUNT]) {
    int v[COUNT][TOKENS / 2];
    start(v, now);
    CodeSums sums[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      keep_offsets(group + j, now[j].weights);
      sums[j] = sums_of_codes<BITS>(now[j].weights);
    }
    if (more) load<BITS>(next);
    if (more) {
#pragma unroll
      for (Group& one : next) stay_here(one.weights.a);
    }
    wgmma_wait();
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      scale_sums<TOKENS>(y, v[j], now[j].weights.scales, sums[j], token_scales(now[j]), place.lane);
    }
    __syncwarp();
#pragma unroll
    for (const Group& one : now) release(one);
    ended_chunks(group, group + COUNT, [&](int chunk) { subtract_offsets(chunk); });
  }

  template <int BITS>
  __device__ __forceinline__ void run() {
    constexpr int kCount = Layout::kTogether;
    int group = part.first;
    if (part.last - group >= kCount) {
      Group a[kCount], b[kCount];
      load<BITS>(a);
      for (; part.last - group >= kCount; group += kCount) {
        step<BITS>(group, part.last - group >= 2 * kCount, a, b);
        group += kCount;
        if (part.last - group < kCount) break;
        step<BITS>(group, part.last - group >= 2 * kCount, b, a);
      }
    }
    if constexpr (kCount > 1) {
#pragma unroll 1
      for (; group < part.last; group++) {
        Group one[1], none[1];
        load<BITS>(one);
        step<BITS>(group, false, one, none);
      }
    }
  }

  // Any width and scales of any size: one loop, less register pressure, no overlap within a warpgroup.
  __device__ __forceinline__ void run_any(const Tile& tile) {
#pragma unroll 1
    for (int group = part.first; group < part.last; group++) {
      Group one[1];
      CodeSums sums;
      with_bits(tile.bits, [&]<int BITS>() {
        load<BITS>(one);
        sums = sums_of_codes<BITS>(one[0].weights);
      });
      const uint32_t scales = one[0].weights.scales;
      int v[1][TOKENS / 2];
      start(v, one);
      keep_offsets(group, one[0].weights);
      wgmma_wait();
      if (tile.usual) {
        scale_sums<TOKENS>(y, v[0], scales, sums, token_scales(one[0]), place.lane);
      } else {
        scale_sums_slowly<TOKENS>(y, v[0], scales, sums, token_scales(one[0]), place.lane);
      }
      __syncwarp();
      release(one[0]);
      ended_chunks(group, group + 1, [&](int chunk) { subtract_offsets(chunk); });
    }
  }

  // A warpgroup without a tile: gives everything back.
  __device__ __forceinline__ void skip() {
    for (int group = part.first; group < part.last; group++) {
      barrier_wait(shared.full + at.barrier, at.phase);
      if (place.lane == 0) shared.give_back(shared.empty + at.barrier);
      at.advance();
      ended_chunks(group, group + 1, [&](int) {
        barrier_wait(shared.sums_full + 8 * (chunks % 2), chunks / 2 % 2);
        end_chunk();
      });
    }
  }
};

// Sums of a block's warpgroup for another block; a thread's are as far apart as there are threads.
template <int TOKENS>
__device__ __forceinline__ float* partial_sums(const HopperParams& p, int block, const Place& place) {
  return p.partial + static_cast<int64_t>(2 * block + place.group) * (TOKENS / 2) * 128 + 32 * place.warp + place.lane;
}

template <int TOKENS>
__device__ __forceinline__ void leave_sums(const HopperParams& p, const Place& place, const float (&y)[TOKENS / 2]) {
  float* to = partial_sums<TOKENS>(p, blockIdx.x, place);
#pragma unroll
  for (int e = 0; e < TOKENS / 2; e++) to[128 * e] = y[e];
  named_barrier(1 + place.group, 128);
  if (place.warp == 0 && place.lane == 0) signal_ready(p.ready + 2 * blockIdx.x + place.group, p.signal);
}

// Adds the sums of all blocks that had a part of this piece before, the nearest first.
template <int TOKENS>
__device__ __forceinline__ void collect_sums(const HopperParams& p, const Schedule& schedule, const Place& place, int rank,
                                             int shared_piece, float (&y)[TOKENS / 2]) {
  constexpr int kCluster = HopperLayout<TOKENS>::kCluster;
  constexpr int kAtOnce = TOKENS <= 16 ? 4 : 1;  // blocks whose sums are on the way together
  const int block = blockIdx.x / kCluster;
  // every thread waits for one block, so that they wait side by side
  int number = 0;
  for (int other = schedule.sharer_before(block, shared_piece); other >= 0;
       other = schedule.sharer_before(other, shared_piece), number++) {
    if (number % 128 == 32 * place.warp + place.lane) {
      await_ready(p.ready + 2 * (other * kCluster + rank) + place.group, p.signal);
    }
  }
  named_barrier(1 + place.group, 128);
  int other = schedule.sharer_before(block, shared_piece);
  while (other >= 0) {
    float sums[kAtOnce][TOKENS / 2];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      const float* from = other < 0 ? nullptr : partial_sums<TOKENS>(p, other * kCluster + rank, place);
#pragma unroll
      for (int e = 0; e < TOKENS / 2; e++) sums[j][e] = other < 0 ? 0.0f : load_fresh(from + 128 * e);
      if (other >= 0) other = schedule.sharer_before(other, shared_piece);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
#pragma unroll
      for (int e = 0; e < TOKENS / 2; e++) y[e] += sums[j][e];
    }
  }
}

// Stores a warp's 16 rows, n: the original one of row lane % 16. The sums pass through shared memory, so that stores are
// a short loop: code that runs once for a piece mostly waits for its instructions.
template <int TOKENS>
__device__ __forceinline__ void store_result(const HopperParams& p, const HopperShared<TOKENS>& shared, const Place& place,
                                             int n, const Part& part, float unit, const float (&y)[TOKENS / 2]) {
  constexpr int kStaged = TOKENS < 32 ? TOKENS : 32;
  static_assert(kStaged * 16 * 4 <= kOffsetBytes);
  float* const staged = reinterpret_cast<float*>(shared.offsets(4 * place.group + place.warp));
  const auto spot = [&](int token, int row) { return staged + 16 * token + (row ^ token / 2 % 2 * 8); };
  const int lane = place.lane, first = part.tokens * TOKENS;
  const float bias = p.bias != nullptr && n >= 0 ? load_float(p.bias, n, p.bias_type) : 0.0f;
#pragma unroll
  for (int start = 0; start < TOKENS; start += kStaged) {
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kStaged / 2; e++) {
      *spot(e / 4 * 8 + 2 * (lane % 4) + e % 2, lane / 4 + e % 4 / 2 * 8) = y[start / 2 + e];
    }
    __syncwarp();
    const int tokens = n < 0 ? 0 : min(kStaged, p.M - first - start);
    const int64_t at = static_cast<int64_t>(first + start + lane / 16) * p.N + n;
    const auto store = [&](auto* to) {
#pragma unroll 8
      for (int token = lane / 16; token < tokens; token += 2, to += 2 * static_cast<int64_t>(p.N)) {
        assign(to, fmaf(*spot(token, lane % 16), unit, bias));
      }
    };
    if (p.y_type == Float::kBFloat16) {
      store(static_cast<__nv_bfloat16*>(p.y) + at);
    } else if (p.y_type == Float::kFloat16) {
      store(static_cast<__half*>(p.y) + at);
    } else {
      store(static_cast<float*>(p.y) + at);
    }
  }
}

template <int TOKENS>
__device__ __forceinline__ void consume(const HopperParams& p, const Schedule& schedule,
                                        const HopperShared<TOKENS>& shared, int rank, const Place& place) {
  using Layout = HopperLayout<TOKENS>;
  Cursor<TOKENS> at;
  int chunks = 0;
  Part part;
  for (Parts parts(schedule, blockIdx.x / Layout::kCluster); parts.next(part);) {
    const int number = 2 * (part.rows * Layout::kCluster + rank) + place.group;
    const Tile tile(p, number);
    float y[TOKENS / 2];
#pragma unroll
    for (int e = 0; e < TOKENS / 2; e++) y[e] = 0.0f;
    Multiplier<TOKENS> multiplier = {shared, place, at, chunks, part, y, tile.bits, tile.usual ? 0x1p-25f : 1.0f};
    if (tile.bits == 0) {
      multiplier.skip();
      continue;
    }
    const int n = p.row_index[number * kTileRows + 16 * place.warp + place.lane % 16];  // asked for early
    if (tile.usual && tile.bits == 4) {
      multiplier.template run<4>();
    } else if (tile.usual && tile.bits == 8) {
      multiplier.template run<8>();
    } else {
      multiplier.run_any(tile);
    }
    if (part.shared >= 0 && part.last < p.tokens.G) {
      leave_sums<TOKENS>(p, place, y);
      continue;
    }
    if (part.shared >= 0) collect_sums<TOKENS>(p, schedule, place, rank, part.shared, y);
    store_result<TOKENS>(p, shared, place, n, part, tile.usual ? 0x1p25f : 1.0f, y);
  }
}

template <int TOKENS>
__global__ void __launch_bounds__(HopperLayout<TOKENS>::kBoundThreads, 1) hopper_kernel(const __grid_constant__ HopperParams p) {
#if defined(TORCHMIX_EMULATE) || __CUDA_ARCH_FEAT_SM90_ALL  // other devices have stream_kernel
  extern __shared__ __align__(1024) uint8_t hopper_shared[];
  constexpr int kCluster = HopperLayout<TOKENS>::kCluster;
  const HopperShared<TOKENS> shared(hopper_shared);
  const int rank = kCluster == 1 ? 0 : cluster_rank();
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  if (kCluster > 1) cluster_barrier();
  const auto make_schedule = [&] {
    constexpr int kTiles = 2 * kCluster;  // of a piece
    const int wide = min(max((p.tile_table[2] + kTiles - 1) / kTiles, 0), p.row_pieces);
    return Schedule(p.row_pieces, p.token_pieces, p.tokens.G, gridDim.x / kCluster, wide, p.wide_shift);
  };
  if (!p.early && threadIdx.x == 0) prefetch_weights<TOKENS>(p, make_schedule(), rank);
  if (!p.early || threadIdx.x / 32 != 0) wait_for_previous();
  const Schedule schedule = make_schedule();
  if (threadIdx.x < 128) {
    fewer_registers<HopperLayout<TOKENS>::kFewRegisters>();
    if (threadIdx.x == 0) bring_weights<TOKENS>(p, schedule, shared, rank);
    if (threadIdx.x == 32) bring_tokens<TOKENS>(p, schedule, shared, rank);
    __syncwarp();
  } else {
    start_next();
    more_registers<HopperLayout<TOKENS>::kManyRegisters>();
    consume<TOKENS>(p, schedule, shared, rank, Place(threadIdx.x - 128));
  }
  if (kCluster > 1) cluster_barrier();  // the other block still writes here
#endif
}

}  // namespace torchmix
