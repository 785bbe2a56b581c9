// mixed_linear on GPUs other than sm_90: up to 32 tokens at a time go through the weights.
//
// A block takes tiles, one after another. Its producer warp streams them through a ring of slots without a pause between
// tiles; the other 16 warps multiply them on the tensor cores by activations that stay in shared memory. Warp w % 4 has
// 16 of the 64 rows, warp w / 4 every fourth group of inputs (a lane); the sums of the lanes are added up at the end of a
// tile, in a fixed order, so repeated runs give the same bits.
//
// Shapes: M tokens, N rows, K inputs, G groups of 128 inputs, T tiles; NT tiles of 8 tokens.
#pragma once

#include "codes.cuh"
#include "launch_choice.h"
#include "prepared.cuh"

namespace torchmix {

constexpr int kLanes = kStreamLanes;
constexpr int kSlices = kTileRows / 16;
constexpr int kConsumers = 32 * kSlices * kLanes;  // threads that multiply
constexpr int kSlotBytes = kStreamSlotBytes;
constexpr int kMaxSlots = kStreamMostSlots;
constexpr int kSumStride = kTileRows + 4;  // floats; 68 keeps the 32 threads of a store on 32 banks
constexpr int kHeadBytes = 1024;           // barriers
constexpr int kIndexBuffers = 3;
constexpr int kNarrowBits = 4;

struct StreamParams {
  const uint8_t* tiles;
  const int32_t* row_index;   // (T * 64)
  const int32_t* tile_table;  // (T, 4): offset / 16, bits, number of tiles above 4 bits, not read here
  const void* x;              // (M, K), or null and
  Prepared prepared;
  const void* bias;  // (N) or null
  void* y;           // (M, N)
  int64_t x_stride;
  int M, N, K, G, T;
  int together;  // tokens of a pass over the weights; passes are gridDim.y
  int slots;
  Float x_type, bias_type, y_type;
  bool aligned;  // rows of x start at multiples of four values in memory
};

// Which tiles a block gets. Tiles above 4 bits come first in the table and take up to twice the time; they are dealt
// out in turn, then the blocks that got one less catch up with two narrow tiles, then the rest is dealt out in turn.
struct Deal {
  int block, blocks, wide, tiles, own, rest, behind;

  __device__ __forceinline__ Deal(int block, int blocks, int wide, int tiles)
      : block(block), blocks(blocks), wide(wide), tiles(tiles) {
    rest = wide % blocks;
    own = block < wide ? (wide - block + blocks - 1) / blocks : 0;
    behind = rest > 0 ? blocks - rest : 0;
  }

  __device__ __forceinline__ int tile(int i) const {
    if (i < own) return block + i * blocks;
    i -= own;
    if (behind > 0 && block >= rest) {
      if (i < 2) return min(wide + (block - rest) + i * behind, tiles);
      i -= 2;
    }
    return min(wide + 2 * behind + block + i * blocks, tiles);
  }
};

// Activations in shared memory: of each group first k steps 0 and 1 of all tokens, then 2 and 3; a token has 64 bytes
// there, 16 for each quarter of a warp's row of threads. Scales and sums lie in fours: {scale, scale, sum, sum} of two
// tokens, for all tokens of the tiles.
struct Activations {
  uint8_t* codes;
  float4* params;
  int tokens;

  __device__ __forceinline__ uint8_t* code(int group, int half, int token, int quarter) const {
    return codes + (group * 2 + half) * tokens * 64 + token * 64 + quarter * 16;
  }
};

// Adds one group of inputs of 16 rows to the float sums of all tokens.
template <int BITS, int NT>
__device__ __forceinline__ void add_group(float (&sums)[NT][4], const uint32_t (&a)[16], uint32_t scales,
                                          uint32_t zeros, const Activations& activations, int group, int lane) {
  constexpr int kZeroMask = BITS <= 4 ? (1 << BITS) - 1 : 0xffff;  // above it stands the sum of the codes
  const float scale_low = __uint_as_float(scales << 16), scale_high = __uint_as_float(scales & 0xffff0000u);
  const int zero_low = zeros & kZeroMask, zero_high = zeros >> 16 & kZeroMask;
#pragma unroll
  for (int t = 0; t < NT; t++) {
    const int token = min(8 * t + lane / 4, activations.tokens - 1);  // columns beyond the last token are not stored
    int d[4] = {0, 0, 0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 b = *reinterpret_cast<const uint4*>(activations.code(group, half, token, lane % 4));
      multiply<BITS == 8>(d, a + 8 * half, b.x, b.y);
      multiply<BITS == 8>(d, a + 8 * half + 4, b.z, b.w);
    }
    const float4 meta = activations.params[(group * NT + t) * 4 + lane % 4];
    if constexpr (BITS != 8) {
      const int sum0 = __float_as_int(meta.z), sum1 = __float_as_int(meta.w);
      d[0] -= zero_low * sum0, d[1] -= zero_low * sum1;
      d[2] -= zero_high * sum0, d[3] -= zero_high * sum1;
    }
    sums[t][0] = fmaf(static_cast<float>(d[0]) * scale_low, meta.x, sums[t][0]);
    sums[t][1] = fmaf(static_cast<float>(d[1]) * scale_low, meta.y, sums[t][1]);
    sums[t][2] = fmaf(static_cast<float>(d[2]) * scale_high, meta.x, sums[t][2]);
    sums[t][3] = fmaf(static_cast<float>(d[3]) * scale_high, meta.y, sums[t][3]);
  }
}

// One group of one slot: codes and parameters to registers, the slot given back, then the arithmetic.
template <int BITS, int NT>
__device__ __forceinline__ void consume(float (&sums)[NT][4], const uint8_t* block, uint32_t empty, uint32_t arrivals,
                                        const Activations& activations, int group, int slice, int lane) {
  uint32_t a[16];
  load_codes<BITS>(a, block, slice, lane);
  const int pair = 8 * slice + lane / 4;
  const uint32_t scales = *reinterpret_cast<const uint32_t*>(block + 1024 * BITS + 4 * pair);
  const uint32_t zeros = *reinterpret_cast<const uint32_t*>(block + 1024 * BITS + 128 + 4 * pair);
  __syncwarp();
  if (lane == 0) barrier_arrive(empty, arrivals);
  add_group<BITS, NT>(sums, a, scales, zeros, activations, group, lane);
}

// The activations of a pass to shared memory in the order of B fragments; quantized here if asked for.
template <int NT, bool QUANTIZE>
__device__ __forceinline__ void load_activations(const StreamParams& p, const Activations& to, int first_token, int warp,
                                                 int lane) {
  constexpr int kBatch = 4, kWarps = kConsumers / 32;  // loads in flight
  float* params = reinterpret_cast<float*>(to.params);
  const int tasks = to.tokens * p.G;
  for (int start = warp; start < tasks; start += kBatch * kWarps) {
    float4 v[kBatch];
    uint32_t codes[kBatch];
    float scales[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int task = start + i * kWarps, token = first_token + task % to.tokens, group = task / to.tokens;
      if (task >= tasks) continue;
      if constexpr (QUANTIZE) {
        v[i] = load_four(p.x, token * p.x_stride, group * kGroup + 4 * lane, p.K, p.x_type, p.aligned);
      } else {
        const int64_t at = static_cast<int64_t>(group) * p.prepared.Mp;
        const uint8_t* from = p.prepared.codes + at * kGroup + code_place(token, lane / 4) + 4 * (lane % 4);
        codes[i] = *reinterpret_cast<const uint32_t*>(from) ^ 0x80808080u;
        scales[i] = p.prepared.scale[at + scale_place(token)];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int task = start + i * kWarps, token = task % to.tokens, group = task / to.tokens;
      if (task >= tasks) continue;
      if constexpr (QUANTIZE) {
        const Quantizer quantizer(__reduce_max_sync(0xffffffffu, largest_of(v[i])));
        codes[i] = quantizer.codes(v[i].x, v[i].y, v[i].z, v[i].w);
        scales[i] = quantizer.scale;
      }
      const int sum = __reduce_add_sync(0xffffffffu, sum_of_codes(codes[i]));
      // this thread's word is k step s, half h, quarter q of the group: lane = 8 s + 4 h + q
      const int s = lane / 8, h = lane / 4 % 2, q = lane % 4;
      *reinterpret_cast<uint32_t*>(to.code(group, s / 2, token, q) + 8 * (s % 2) + 4 * h) = codes[i];
      if (lane == 0) {
        float* meta = params + (group * NT + token / 8) * 16 + 4 * (token % 8 / 2) + token % 2;
        meta[0] = scales[i];
        meta[2] = __int_as_float(sum);
      }
    }
  }
}

// Groups of inputs in one slot.
__device__ __forceinline__ int groups_per_slot(int bits) { return bits > kNarrowBits ? 1 : 2; }

// Streams this block's tiles into the ring; runs in one warp.
__device__ __forceinline__ void produce(const StreamParams& p, const Deal& deal, uint32_t ring, uint32_t full,
                                        uint32_t empty, int lane) {
  Ring at;
  int tile = deal.tile(0);
  int offset = 0, bits = 0;
  if (tile < p.T) offset = __ldg(p.tile_table + 4 * tile), bits = __ldg(p.tile_table + 4 * tile + 1);
  for (int i = 1; tile < p.T; i++) {
    const int following = deal.tile(i);
    int next_offset = 0, next_bits = 0;  // asked for now, so that the next tile need not wait for them
    if (following < p.T) {
      next_offset = __ldg(p.tile_table + 4 * following);
      next_bits = __ldg(p.tile_table + 4 * following + 1);
    }
    const int bytes = block_bytes(bits), per_slot = groups_per_slot(bits);
    const uint8_t* from = p.tiles + 16 * static_cast<int64_t>(offset);
    for (int g = 0; g < p.G; g += per_slot) {
      const int size = min(per_slot, p.G - g) * bytes;
      barrier_wait(empty + 8 * at.slot, at.phase ^ 1);
      __syncwarp();  // a thread that came late would wait for a phase that is over
      copy_async(ring + at.slot * kSlotBytes, from, size, full + 8 * at.slot, lane);
      at.advance(1, p.slots);
      from += size;
    }
    tile = following, offset = next_offset, bits = next_bits;
  }
}

// Multiplies one tile; `at` is its first slot.
template <int NT>
__device__ __forceinline__ void multiply_tile(float (&sums)[NT][4], const StreamParams& p, int bits, Ring at,
                                              const uint8_t* ring, uint32_t full, uint32_t empty,
                                              const Activations& activations, int slice, int my_lane, int lane) {
  const int per_slot = groups_per_slot(bits), sets = kLanes / per_slot, bytes = block_bytes(bits);
  const uint32_t arrivals = sets == 2 ? 1 : 2;  // of each warp: eight for every slot, whoever reads it
  const int inside = my_lane % per_slot;
  at.advance(my_lane / per_slot, p.slots);
  for (int first = my_lane / per_slot * per_slot; first < p.G; first += kLanes) {
    barrier_wait(full + 8 * at.slot, at.phase);
    const int g = first + inside;
    const uint8_t* block = ring + at.slot * kSlotBytes + inside * bytes;
    const uint32_t free = empty + 8 * at.slot;
    if (g >= p.G) {
      __syncwarp();
      if (lane == 0) barrier_arrive(free, arrivals);
    } else if (bits == 4) {
      consume<4, NT>(sums, block, free, arrivals, activations, g, slice, lane);
    } else if (bits == 8) {
      consume<8, NT>(sums, block, free, arrivals, activations, g, slice, lane);
    } else if (bits == 3) {
      consume<3, NT>(sums, block, free, arrivals, activations, g, slice, lane);
    } else if (bits == 5) {
      consume<5, NT>(sums, block, free, arrivals, activations, g, slice, lane);
    } else {
      consume<6, NT>(sums, block, free, arrivals, activations, g, slice, lane);
    }
    at.advance(sets, p.slots);
  }
}

template <int NT, bool QUANTIZE>
__global__ void __launch_bounds__(kConsumers + 32, NT == 1 ? 2 : 1)
    stream_kernel(const __grid_constant__ StreamParams p) {
  constexpr int kTokens = 8 * NT, kSums = kTokens * kSumStride;  // floats of one lane
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_token = blockIdx.y * p.together, tokens = min(p.together, p.M - first_token);

  const uint32_t full = smem_address(shared), empty = full + 8 * kMaxSlots;
  int* index = reinterpret_cast<int*>(shared + kHeadBytes);
  float* lane_sums = reinterpret_cast<float*>(index + kIndexBuffers * kTileRows);
  uint8_t* rest = reinterpret_cast<uint8_t*>(lane_sums + 2 * kLanes * kSums);
  const Activations activations = {rest, reinterpret_cast<float4*>(rest + p.G * p.together * 128), tokens};
  const uint8_t* ring = shared + stream_fixed_bytes(p.together, p.G);

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; i++) {
      barrier_init(full + 8 * i, kCopyArrivals);
      barrier_init(empty + 8 * i, 8);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int wide = static_cast<int>(blockIdx.x) < p.T ? __ldg(p.tile_table + 4 * blockIdx.x + 2) : 0;
  const Deal deal(blockIdx.x, gridDim.x, wide, p.T);
  if (warp == kConsumers / 32) {
    produce(p, deal, smem_address(ring), full, empty, lane);
    return;
  }

  load_activations<NT, QUANTIZE>(p, activations, first_token, warp, lane);
  named_barrier(1, kConsumers);
  const int slice = warp % kSlices, my_lane = warp / kSlices, outputs = kTileRows * tokens;
  Ring at;
  int tile = deal.tile(0), i = 0;
  int bits = tile < p.T ? __ldg(p.tile_table + 4 * tile + 1) : 0;
  for (; tile < p.T; i++) {
    const int following = deal.tile(i + 1);
    const int next_bits = following < p.T ? __ldg(p.tile_table + 4 * following + 1) : 0;
    if (threadIdx.x < kTileRows) {
      index[i % kIndexBuffers * kTileRows + threadIdx.x] = __ldg(p.row_index + tile * kTileRows + threadIdx.x);
    }
    float sums[NT][4];
#pragma unroll
    for (int t = 0; t < NT; t++) sums[t][0] = sums[t][1] = sums[t][2] = sums[t][3] = 0.0f;
    multiply_tile<NT>(sums, p, bits, at, ring, full, empty, activations, slice, my_lane, lane);
    at.advance((p.G + groups_per_slot(bits) - 1) / groups_per_slot(bits), p.slots);

    // two buffers: who writes this one has seen everybody pass the barrier of the tile between
    float* mine = lane_sums + (i % 2 * kLanes + my_lane) * kSums + 16 * slice + lane / 4;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const int token = 8 * t + 2 * (lane % 4);
      mine[token * kSumStride] = sums[t][0];
      mine[(token + 1) * kSumStride] = sums[t][1];
      mine[token * kSumStride + 8] = sums[t][2];
      mine[(token + 1) * kSumStride + 8] = sums[t][3];
    }
    named_barrier(1, kConsumers);
    for (int e = threadIdx.x; e < outputs; e += kConsumers) {
      const float* parts = lane_sums + i % 2 * kLanes * kSums + e / kTileRows * kSumStride + e % kTileRows;
      float total = parts[0];
#pragma unroll
      for (int l = 1; l < kLanes; l++) total += parts[l * kSums];
      const int n = index[i % kIndexBuffers * kTileRows + e % kTileRows];
      if (n < 0) continue;
      if (p.bias != nullptr) total += load_float(p.bias, n, p.bias_type);
      store_float(p.y, static_cast<int64_t>(first_token + e / kTileRows) * p.N + n, p.y_type, total);
    }
    tile = following, bits = next_bits;
  }
}

}  // namespace torchmix
