// mixed_linear on sm_90a: weights from memory straight into the tensor cores' registers, any number of tokens.
//
// A block has 128 rows (two tiles, one for each of its two warpgroups) by TOKENS tokens at a time. Two threads
// bring the weights and the tokens' codes of one group of inputs after another into a ring of stages; weights are
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

#include "hopper_multiply.cuh"

namespace torchmix {

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
