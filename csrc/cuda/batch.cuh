// mixed_linear for many tokens: the time is that of the arithmetic. For sm_90a.
//
// A block multiplies 128 rows (two pairs of tiles, one for each of two warpgroups) by TOKENS tokens, and goes on to the
// next such piece of the result. A producer warp brings the weights of one group of inputs and the tokens' codes into a
// ring of stages; weights are unpacked to bytes in registers, the left operand of wgmma.
//
// Per group of inputs the integer sums v are scaled with two multiply-adds for each, without a conversion: both
// operands are unsigned (activations code + 128, weights code - zero point + offset), so 0 <= v < 2^23 and the bits of
// v, read as a float, are the denormal number v * 2^-149, exactly. With s the weight's scale and a the token's
//
//     t = fma(bits(v), s * 2^124, -s * 128 * sum(w) * 2^-25)       y += t * a
//
// is the dot product of w with the signed codes, in units of 2^-25. What is left is offset * sum(codes) * s * a of every
// row, token and group: a product over the groups, added at the end by tensor cores in bfloat16, which holds s exactly
// and sum(codes) * a in three parts.
//
// Scales of activations are taken relative to a power of two for each token (PreparedTokens), which the end puts back;
// groups with weight scales too large or small for these units are converted and scaled one by one.
//
// Shapes: M tokens, Mp the same in a multiple of 16, N rows, G groups of 128 inputs, Gp the same in a multiple of 16.
#pragma once

#include "stream.cuh"

namespace torchmix {

constexpr int kBatchThreads = 384;  // a warpgroup that copies, two that multiply
constexpr int kBatchStages = 6;
constexpr int kPairBytes = 2 * (512 * 8 + kParamBytes);  // weights of a warpgroup in a stage, at most
constexpr float kLeastScale = 0x1p-90f, kMostScale = 4.0f;  // weight scales that the fast units hold

// Activations as batch_kernel reads them.
struct PreparedTokens {
  uint8_t* codes;      // (G, Mp, 128): code + 128; 16-byte parts of 8 tokens swizzled as wgmma reads them
  float* scale;        // (G, Mp): over the token's unit; 16 tokens in the order of a thread's registers
  uint32_t* sums;      // (Mp, Gp / 16, 4, 6): sum(codes) * scale of 4 groups, high parts in two words, middle, low
  float* unit;         // (Mp): the token's power of two
  int Mp, Gp;
};

struct BatchParams {
  const uint8_t* tiles;
  const int32_t* row_index;
  const int32_t* tile_table;
  PreparedTokens tokens;
  const void* bias;
  void* y;
  int M, N, G, T;
  Float bias_type, y_type;
};

template <int TOKENS>
struct BatchLayout {
  static constexpr int kTokenBytes = TOKENS * kGroup;
  static constexpr int kStageBytes = (kTokenBytes + 2 * kPairBytes + TOKENS * 4 + 1023) / 1024 * 1024;
  static constexpr int kSharedBytes = 1024 + kBatchStages * kStageBytes;
};

// Place of a token's scale among 16: a thread's four, of columns 2q, 2q + 1 of two tiles of 8, lie together.
__device__ __forceinline__ int scale_place(int token) {
  return token / 16 * 16 + token % 8 / 2 * 4 + token % 16 / 8 * 2 + token % 2;
}

// Which piece of the result comes when: eight tiles of tokens go through all rows together, so that blocks that run at
// one time share both.
struct Piece {
  int rows, tokens;  // numbers of the 128 rows and of the TOKENS tokens

  __device__ __forceinline__ Piece(int i, int row_pieces, int token_pieces) {
    constexpr int kTogether = 8;
    const int band = i / (kTogether * row_pieces), in_band = min(kTogether, token_pieces - band * kTogether);
    const int inside = i - band * kTogether * row_pieces;
    rows = inside / in_band;
    tokens = band * kTogether + inside % in_band;
  }
};

// The two tiles of a warpgroup, and their width; bits 0: there are none.
struct Pair {
  int64_t offset[2];
  int bits;

  __device__ __forceinline__ Pair(const BatchParams& p, int pair) : offset{0, 0}, bits(0) {
    if (2 * pair >= p.T) return;
    const int32_t* entry = p.tile_table + 6 * pair;
    offset[0] = 16 * static_cast<int64_t>(__ldg(entry)), offset[1] = 16 * static_cast<int64_t>(__ldg(entry + 3));
    bits = __ldg(entry + 1);
  }
};

__device__ __forceinline__ int block_bytes(int bits) { return 512 * bits + kParamBytes; }

template <int TOKENS>
__device__ __forceinline__ void produce_batch(const BatchParams& p, int pieces, int row_pieces, int token_pieces,
                                              uint32_t stages, uint32_t full, uint32_t empty) {
  using Layout = BatchLayout<TOKENS>;
  Ring at;
  for (int i = blockIdx.x; i < pieces; i += gridDim.x) {
    const Piece piece(i, row_pieces, token_pieces);
    const Pair pairs[2] = {Pair(p, 2 * piece.rows), Pair(p, 2 * piece.rows + 1)};
    const int first = piece.tokens * TOKENS, tokens = min(TOKENS, p.tokens.Mp - first);
    uint32_t bytes = tokens * (kGroup + 4);
    for (const Pair& pair : pairs) bytes += pair.bits > 0 ? 2 * block_bytes(pair.bits) : 0;
    for (int g = 0; g < p.G; g++) {
      const uint32_t to = stages + at.slot * Layout::kStageBytes, barrier = full + 8 * at.slot;
      barrier_wait(empty + 8 * at.slot, at.phase ^ 1);
      barrier_expect(barrier, bytes);
      const int64_t token = static_cast<int64_t>(g) * p.tokens.Mp + first;
      copy_bulk(to, p.tokens.codes + token * kGroup, tokens * kGroup, barrier);
      copy_bulk(to + Layout::kTokenBytes + 2 * kPairBytes, p.tokens.scale + token, tokens * 4, barrier);
      for (int w = 0; w < 2; w++) {
        if (pairs[w].bits == 0) continue;
        const int size = block_bytes(pairs[w].bits);
        const uint32_t weights = to + Layout::kTokenBytes + w * kPairBytes;
        for (int half = 0; half < 2; half++) {
          copy_bulk(weights + half * size, p.tiles + pairs[w].offset[half] + static_cast<int64_t>(g) * size, size,
                    barrier);
        }
      }
      at.advance(1, kBatchStages);
    }
  }
}

// Weights of one group as unsigned bytes, and what scales them. Rows `low` and `high` are i and i + 8 of a warp's 16.
struct GroupWeights {
  uint32_t a[16];
  float scale_low, scale_high;  // s
  int sum_low, sum_high;        // of w over the group
};

template <int BITS>
__device__ __forceinline__ constexpr int weight_offset() {
  return BITS == 8 ? 128 : BITS <= 4 ? 16 : 1 << BITS;
}

template <int BITS>
__device__ __forceinline__ void load_weights(GroupWeights& w, const uint8_t* block, int slice, int lane) {
  load_codes<BITS>(w.a, block, slice, lane);
  const int pair = 8 * slice + lane / 4;
  const uint32_t scales = *reinterpret_cast<const uint32_t*>(block + 512 * BITS + 4 * pair);
  w.scale_low = __uint_as_float(scales << 16), w.scale_high = __uint_as_float(scales & 0xffff0000u);
  if constexpr (BITS == 8) {
#pragma unroll
    for (int j = 0; j < 16; j++) w.a[j] ^= 0x80808080u;
  } else {
    const uint32_t zeros = *reinterpret_cast<const uint16_t*>(block + 512 * BITS + 64 + 2 * pair);
    const uint32_t low = (zeros & 0xff) * 0x01010101u, high = (zeros >> 8) * 0x01010101u;
    constexpr uint32_t kOffset = weight_offset<BITS>() * 0x01010101u;
#pragma unroll
    for (int j = 0; j < 16; j++) w.a[j] = (w.a[j] | kOffset) - (j % 2 == 0 ? low : high);  // no byte borrows
  }
  int sums[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 16; j++) sums[j % 2] = __dp4a(w.a[j], 0x01010101u, static_cast<uint32_t>(sums[j % 2]));
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], step);
    sums[1] += __shfl_xor_sync(0xffffffffu, sums[1], step);
  }
  w.sum_low = sums[0], w.sum_high = sums[1];
}

// A switch over widths that the compiler sees through.
template <class Function>
__device__ __forceinline__ void with_bits(int bits, Function function) {
  if (bits == 4) {
    function.template operator()<4>();
  } else if (bits == 8) {
    function.template operator()<8>();
  } else if (bits == 3) {
    function.template operator()<3>();
  } else if (bits == 5) {
    function.template operator()<5>();
  } else {
    function.template operator()<6>();
  }
}

__device__ __forceinline__ int runtime_offset(int bits) { return bits == 8 ? 128 : bits <= 4 ? 16 : 1 << bits; }

// y += integer sums times scales, for a thread's two rows and TOKENS / 4 tokens.
template <int TOKENS>
__device__ __forceinline__ void scale_sums(float (&y)[TOKENS / 2], const int (&v)[TOKENS / 2], const GroupWeights& w,
                                           const float4* token_scales) {
  const float least = fminf(w.scale_low, w.scale_high), most = fmaxf(w.scale_low, w.scale_high);
  const bool usual = (least >= kLeastScale || (least == 0.0f && most == 0.0f)) && most <= kMostScale;
  if (__all_sync(0xffffffffu, usual)) {
    const float low = w.scale_low * 0x1p124f, high = w.scale_high * 0x1p124f;
    const float low_rest = w.scale_low * (-128.0f * 0x1p-25f * static_cast<float>(w.sum_low));
    const float high_rest = w.scale_high * (-128.0f * 0x1p-25f * static_cast<float>(w.sum_high));
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
      const float4 a = token_scales[j * 2];
      const float scales[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int at = 4 * (j + e / 2) + e % 2;
        y[at] = fmaf(fmaf(__int_as_float(v[at]), low, low_rest), scales[e], y[at]);
        y[at + 2] = fmaf(fmaf(__int_as_float(v[at + 2]), high, high_rest), scales[e], y[at + 2]);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j += 2) {
    const float4 a = token_scales[j * 2];
    const float scales[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int at = 4 * (j + e / 2) + e % 2;
      y[at] = fmaf(static_cast<float>(v[at] - 128 * w.sum_low) * (w.scale_low * 0x1p-25f), scales[e], y[at]);
      y[at + 2] = fmaf(static_cast<float>(v[at + 2] - 128 * w.sum_high) * (w.scale_high * 0x1p-25f), scales[e],
                       y[at + 2]);
    }
  }
}

// y -= offset * sum over groups of (weight scale) * (sum of codes * token scale), in units of 2^-25.
template <int TOKENS>
__device__ __forceinline__ void subtract_offsets(float (&y)[TOKENS / 2], const BatchParams& p, const uint8_t* tile,
                                                 int bits, int first_token, int slice, int lane) {
  const int i = lane / 4, q = lane % 4, bytes = block_bytes(bits);
  const uint8_t* scales = tile + 512 * bits + 4 * (8 * slice + i);
  const __nv_bfloat162 factor = __float2bfloat162_rn(-0x1p-25f * static_cast<float>(runtime_offset(bits)));
  for (int chunk = 0; chunk < p.tokens.Gp / 16; chunk++) {
    uint32_t pairs[4];  // {row i, row i + 8} of this thread's four groups
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int g = 16 * chunk + 4 * q + e;
      pairs[e] = g < p.G ? __ldg(reinterpret_cast<const uint32_t*>(scales + static_cast<int64_t>(g) * bytes)) : 0;
    }
    uint32_t a[4] = {__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[0], pairs[1], 0x7632),
                     __byte_perm(pairs[2], pairs[3], 0x5410), __byte_perm(pairs[2], pairs[3], 0x7632)};
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a[r]), factor);
      a[r] = *reinterpret_cast<const uint32_t*>(&product);
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      const int token = min(first_token + 8 * j + i, p.tokens.Mp - 1);
      const uint2* b = reinterpret_cast<const uint2*>(p.tokens.sums) +
                       ((static_cast<int64_t>(token) * (p.tokens.Gp / 16) + chunk) * 4 + q) * 3;
      float d[4] = {y[4 * j], y[4 * j + 1], y[4 * j + 2], y[4 * j + 3]};
#pragma unroll
      for (int part = 0; part < 3; part++) {
        const uint2 words = __ldg(b + part);
        multiply_bfloat16(d, a, words.x, words.y);
      }
      y[4 * j] = d[0], y[4 * j + 1] = d[1], y[4 * j + 2] = d[2], y[4 * j + 3] = d[3];
    }
  }
}

// One warpgroup's part of all pieces of this block.
template <int TOKENS>
__device__ __forceinline__ void consume_batch(const BatchParams& p, int pieces, int row_pieces, int token_pieces,
                                              const uint8_t* stages, uint32_t full, uint32_t empty, int group) {
  using Layout = BatchLayout<TOKENS>;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, half = warp / 2, slice = warp % 2;
  Ring at;
  for (int i = blockIdx.x; i < pieces; i += gridDim.x) {
    const Piece piece(i, row_pieces, token_pieces);
    const int number = 2 * piece.rows + group, first = piece.tokens * TOKENS;
    const Pair pair(p, number);
    float y[TOKENS / 2];
#pragma unroll
    for (int e = 0; e < TOKENS / 2; e++) y[e] = 0.0f;
    for (int g = 0; g < p.G; g++) {
      barrier_wait(full + 8 * at.slot, at.phase);
      if (pair.bits > 0) {
        const uint8_t* stage = stages + at.slot * Layout::kStageBytes;
        const uint8_t* block = stage + Layout::kTokenBytes + group * kPairBytes + half * block_bytes(pair.bits);
        GroupWeights w;
        with_bits(pair.bits, [&]<int BITS>() { load_weights<BITS>(w, block, slice, lane); });
        int v[TOKENS / 2];
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma_multiply(v, w.a + 4 * step, smem_address(stage), step, step == 0);
        wgmma_commit();
        wgmma_wait();
        const float4* scales = reinterpret_cast<const float4*>(stage + Layout::kTokenBytes + 2 * kPairBytes);
        scale_sums<TOKENS>(y, v, w, scales + lane % 4);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * at.slot);
      at.advance(1, kBatchStages);
    }
    if (pair.bits == 0) continue;
    subtract_offsets<TOKENS>(y, p, p.tiles + pair.offset[half], pair.bits, first, slice, lane);
    const int32_t* rows = p.row_index + (2 * number + half) * kTileRows + 16 * slice + lane / 4;
    const int n[2] = {__ldg(rows), __ldg(rows + 8)};
    float bias[2] = {0.0f, 0.0f};
    for (int r = 0; r < 2; r++) {
      if (p.bias != nullptr && n[r] >= 0) bias[r] = load_float(p.bias, n[r], p.bias_type);
    }
#pragma unroll
    for (int e = 0; e < TOKENS / 2; e++) {
      const int token = first + e / 4 * 8 + 2 * (lane % 4) + e % 2, r = e % 4 / 2;
      if (token >= p.M || n[r] < 0) continue;
      const float value = y[e] * 0x1p25f * __ldg(p.tokens.unit + token) + bias[r];
      store_float(p.y, static_cast<int64_t>(token) * p.N + n[r], p.y_type, value);
    }
  }
}

template <int TOKENS>
__global__ void __launch_bounds__(kBatchThreads, 1) batch_kernel(const __grid_constant__ BatchParams p) {
  extern __shared__ __align__(1024) uint8_t batch_shared[];
  const uint32_t full = smem_address(batch_shared), empty = full + 8 * kBatchStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBatchStages; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 8);  // warps that multiply
    }
    barrier_init_fence();
  }
  __syncthreads();
  start_next();
  wait_for_previous();
  const int row_pieces = (p.T + 3) / 4, token_pieces = (p.M + TOKENS - 1) / TOKENS;
  const int pieces = row_pieces * token_pieces;
  const uint8_t* stages = batch_shared + 1024;
  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      produce_batch<TOKENS>(p, pieces, row_pieces, token_pieces, smem_address(stages), full, empty);
    }
  } else {
    more_registers<232>();
    consume_batch<TOKENS>(p, pieces, row_pieces, token_pieces, stages, full, empty, threadIdx.x / 128 - 1);
  }
}

}  // namespace torchmix
