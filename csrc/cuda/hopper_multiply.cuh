// The warpgroups of hopper_kernel (hopper.cuh) that multiply: one part of one tile.
#pragma once

#include "hopper_bring.cuh"
#include "hopper_weights.cuh"

namespace torchmix {

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
    if (more) {
      load<BITS>(next);
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

}  // namespace torchmix
