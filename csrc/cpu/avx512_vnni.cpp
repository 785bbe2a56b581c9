// CPU kernels with AVX-512: VNNI multiplies, VBMI unpacks.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "problem.h"
#include "target.h"

TORCHMIX_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,bmi2,fma")

namespace torchmix::cpu {
namespace {

constexpr int kFusedTokens = 4;   // up to which weights are unpacked in registers, for each use
constexpr int kWidestTile = 12;   // 24 sums of two blocks, and registers for weights and tokens
constexpr int kMetaGroups = 16;   // groups whose scales and zero points are brought into order at a time

// Codes 0, 2, 4, 6, then 1, 3, 5, 7 of eight: the order in which 4-bit codes leave a byte. Where weights are the
// signed operand (more than kFusedTokens), tokens are the unsigned one: 128 is added.
inline uint64_t tile_order(uint64_t eight, int tile) {
  const uint64_t ordered = _pext_u64(eight, 0x00ff00ff00ff00ffull) | _pext_u64(eight, 0xff00ff00ff00ff00ull) << 32;
  return tile > kFusedTokens ? ordered ^ 0x8080808080808080ull : ordered;
}

#include "repeat.inl"

#include "activation.inl"
#include "rows.inl"

#include "blocked.inl"
#include "avx512_unpack.inl"

// --- few tokens ------------------------------------------------------------------------------------------------------

struct Meta {
  alignas(64) float scale[kMetaGroups][kBlockRows];
  alignas(64) float zero_point[kMetaGroups][kBlockRows];
};

// One block for T tokens: codes (unsigned; those of 8 bits plus 128) times tokens, minus zero point times sum.
template <int kBits, int T>
void multiply_fused(const Block& block, const Weight& weight, const Tiles& tiles, const Output& out, Prefetch& ahead) {
  constexpr int kSums = T == 1 ? 4 : 2;  // for each token, so that one addition need not wait for the last
  __m512 y[T];
  repeat<T>([&](auto i) TORCHMIX_INLINE { y[i] = _mm512_setzero_ps(); });
  const int group_bytes = weight.group_size / 8 * kBits;
  Meta meta;
  int64_t at = 0;
  for (int64_t g = 0; g < weight.G; g++, at += group_bytes) {
    const int j = static_cast<int>(g % kMetaGroups);
    if (j == 0) {
      transpose_scales(block, weight.G, g, &meta.scale[0][0]);
      transpose_zero_points<kBits>(block, weight, g, kBits == 8 ? 128 : 0, [&](int i, __m512i values) {
        _mm512_store_ps(meta.zero_point[i], _mm512_cvtepi32_ps(values));
      });
    }
    const int length = padded_length(group_length(weight.K, weight.group_size, g));
    const uint8_t* x = tiles.codes + g * tiles.padded_group * T;
    __m512i sum[kSums][T];
    repeat<kSums>([&](auto s) TORCHMIX_INLINE {
      repeat<T>([&](auto i) TORCHMIX_INLINE { sum[s][i] = _mm512_setzero_si512(); });
    });
    for (int k = 0; k < length; k += kChunk, x += kChunk * T) {
      __m512i w[8];
      unpack_chunk<kBits, true>(block.codes, at + k / 8 * kBits, w);
      repeat<8>([&](auto s) TORCHMIX_INLINE {
        repeat<T>([&](auto i) TORCHMIX_INLINE {
          add_products(sum[s % kSums][i], w[s], four_of_token(x + 4 * (s * T + i)));
        });
      });
    }
    ahead.advance(group_bytes * kBlockRows);
    const __m512 scale = _mm512_load_ps(meta.scale[j]), zero_point = _mm512_load_ps(meta.zero_point[j]);
    repeat<T>([&](auto i) TORCHMIX_INLINE {
      __m512i total = _mm512_add_epi32(sum[0][i], sum[1][i]);
      if (kSums == 4) total = _mm512_add_epi32(total, _mm512_add_epi32(sum[kSums - 2][i], sum[kSums - 1][i]));
      // Exact: all three are integers below 2^24.
      const __m512 centered =
          _mm512_fnmadd_ps(zero_point, _mm512_set1_ps(tiles.sum[g * T + i]), _mm512_cvtepi32_ps(total));
      y[i] = _mm512_fmadd_ps(_mm512_mul_ps(centered, scale), _mm512_set1_ps(tiles.scale[g * T + i]), y[i]);
    });
  }
  float bias[kBlockRows];
  for (int n = 0; n < kBlockRows; n++) bias[n] = bias_of(out, block.row[n]);
  for (int i = 0; i < T; i++) {
    alignas(64) float values[kBlockRows];
    _mm512_store_ps(values, y[i]);
    store_rows(out, block, bias, values, i, weight.N);
  }
}

template <int T>
void multiply_few(const Block& block, const Weight& weight, const Tiles& tiles, const Output& out, Prefetch& ahead) {
  switch (block.bits) {
    case 2: return multiply_fused<2, T>(block, weight, tiles, out, ahead);
    case 3: return multiply_fused<3, T>(block, weight, tiles, out, ahead);
    case 4: return multiply_fused<4, T>(block, weight, tiles, out, ahead);
    case 5: return multiply_fused<5, T>(block, weight, tiles, out, ahead);
    case 6: return multiply_fused<6, T>(block, weight, tiles, out, ahead);
    case 7: return multiply_fused<7, T>(block, weight, tiles, out, ahead);
    default: return multiply_fused<8, T>(block, weight, tiles, out, ahead);
  }
}

template <int T>
void linear_few(const Weight& weight, const Tiles& tiles, const Output& out, int64_t begin, int64_t end) {
  Prefetch ahead = {};
  for_blocks(weight, begin, end, [&](const Block& block) {
    if (ahead.at == nullptr) ahead.start(block.codes[0], weight);
    multiply_few<T>(block, weight, tiles, out, ahead);
  });
}

// --- many tokens -----------------------------------------------------------------------------------------------------

struct Avx512 {
  static constexpr int kBlocks = 2;

  template <int kBits>
  static void unpack_width(const Block& block, const Weight& weight, int padded_group, Strip& strip) {
    alignas(64) float scales[kMetaGroups * kBlockRows];
    alignas(64) int32_t zero_points[kMetaGroups][kBlockRows];
    const int64_t meta = strip.first / kMetaGroups * kMetaGroups;
    transpose_scales(block, weight.G, meta, scales);
    transpose_zero_points<kBits>(block, weight, meta, 0, [&](int i, __m512i values) {
      _mm512_store_si512(zero_points[i], _mm512_mullo_epi32(values, _mm512_set1_epi32(0x01010101)));
    });
    const __m512i minus_128 = _mm512_set1_epi8(-128);
    for (int j = 0; j < strip.groups; j++) {
      const int64_t g = strip.first + j;
      const int length = padded_length(group_length(weight.K, weight.group_size, g));
      const __m512i zero_point = _mm512_load_si512(zero_points[g - meta]);
      __m512i start = _mm512_setzero_si512();
      int8_t* to = strip.codes + static_cast<int64_t>(j) * padded_group * kBlockRows;
      const int64_t at = g * (weight.group_size / 8) * kBits;
      for (int k = 0; k < length; k += kChunk, to += kChunk * kBlockRows) {
        __m512i w[8];
        unpack_chunk<kBits, false>(block.codes, at + k / 8 * kBits, w);
        repeat<8>([&](auto s) TORCHMIX_INLINE {
          const __m512i centered = kBits == 8 ? w[s] : _mm512_sub_epi8(w[s], zero_point);
          add_products(start, minus_128, centered);  // 128 * (code - zero point)
          _mm512_store_si512(to + 64 * s, centered);
        });
      }
      _mm512_store_si512(strip.start + j * kBlockRows, _mm512_sub_epi32(_mm512_setzero_si512(), start));
      _mm512_store_ps(strip.scale + j * kBlockRows, _mm512_load_ps(scales + (g - meta) * kBlockRows));
    }
  }

  static void unpack(const Block& block, const Weight& weight, int padded_group, Strip& strip) {
    switch (block.bits) {
      case 2: return unpack_width<2>(block, weight, padded_group, strip);
      case 3: return unpack_width<3>(block, weight, padded_group, strip);
      case 4: return unpack_width<4>(block, weight, padded_group, strip);
      case 5: return unpack_width<5>(block, weight, padded_group, strip);
      case 6: return unpack_width<6>(block, weight, padded_group, strip);
      case 7: return unpack_width<7>(block, weight, padded_group, strip);
      default: return unpack_width<8>(block, weight, padded_group, strip);
    }
  }

  // Tokens plus 128 (unsigned) times centered codes; `start` takes the 128 out again.
  template <int T, int B>
  static void multiply_tile(const Strip* strips, const Weight& weight, const Tiles& tiles, int64_t t, float* y) {
    const float* token_scale = tiles.tile_scale(t) + strips[0].first * T;
    for (int j = 0; j < strips[0].groups; j++, token_scale += T) {
      const int64_t g = strips[0].first + j;
      const int length = padded_length(group_length(weight.K, weight.group_size, g));
      const uint8_t* x = tiles.tile_codes(t) + g * tiles.padded_group * T;
      const int8_t* codes[B];
      __m512i sum[B][T];
      repeat<B>([&](auto b) TORCHMIX_INLINE {
        codes[b] = strips[b].codes + static_cast<int64_t>(j) * tiles.padded_group * kBlockRows;
        repeat<T>([&](auto i) TORCHMIX_INLINE { sum[b][i] = _mm512_load_si512(strips[b].start + j * kBlockRows); });
      });
      for (int k = 0; k < length; k += 4, x += 4 * T) {
        __m512i w[B];
        repeat<B>([&](auto b) TORCHMIX_INLINE { w[b] = _mm512_load_si512(codes[b] + k * kBlockRows); });
        repeat<T>([&](auto i) TORCHMIX_INLINE {
          const __m512i four = four_of_token(x + 4 * i);
          repeat<B>([&](auto b) TORCHMIX_INLINE { add_products(sum[b][i], four, w[b]); });
        });
      }
      repeat<B>([&](auto b) TORCHMIX_INLINE {
        const __m512 scale = _mm512_load_ps(strips[b].scale + j * kBlockRows);
        repeat<T>([&](auto i) TORCHMIX_INLINE {
          float* at = y + (b * T + i) * kBlockRows;
          const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[b][i]), scale);
          _mm512_store_ps(at, _mm512_fmadd_ps(scaled, _mm512_set1_ps(token_scale[i]), _mm512_load_ps(at)));
        });
      });
    }
  }

  template <int T>
  static void multiply_width(const Strip* strips, int count, const Weight& weight, const Tiles& tiles, int64_t t,
                             float* y) {
    if (count == 2) {
      multiply_tile<T, 2>(strips, weight, tiles, t, y);
    } else {
      multiply_tile<T, 1>(strips, weight, tiles, t, y);
    }
  }

  static void multiply(const Strip* strips, int count, const Weight& weight, const Tiles& tiles, int64_t t, float* y) {
    switch (tiles.width(t)) {
      case 1: return multiply_width<1>(strips, count, weight, tiles, t, y);
      case 2: return multiply_width<2>(strips, count, weight, tiles, t, y);
      case 3: return multiply_width<3>(strips, count, weight, tiles, t, y);
      case 4: return multiply_width<4>(strips, count, weight, tiles, t, y);
      case 5: return multiply_width<5>(strips, count, weight, tiles, t, y);
      case 6: return multiply_width<6>(strips, count, weight, tiles, t, y);
      case 7: return multiply_width<7>(strips, count, weight, tiles, t, y);
      case 8: return multiply_width<8>(strips, count, weight, tiles, t, y);
      case 9: return multiply_width<9>(strips, count, weight, tiles, t, y);
      case 10: return multiply_width<10>(strips, count, weight, tiles, t, y);
      case 11: return multiply_width<11>(strips, count, weight, tiles, t, y);
      default: return multiply_width<12>(strips, count, weight, tiles, t, y);
    }
  }

  static void store(const Output& out, const Block& block, const float* bias, const float* y, int64_t token,
                    int64_t N) {
    store_rows(out, block, bias, y, token, N);
  }
};

// Tiles of nearly equal width.
int tile_width(int64_t M) {
  if (M <= kWidestTile) return static_cast<int>(M > 0 ? M : 1);
  const int64_t tiles = (M + kWidestTile - 1) / kWidestTile;
  return static_cast<int>((M + tiles - 1) / tiles);
}

void linear(const Weight& weight, const Tiles& tiles, const Output& out, int64_t begin, int64_t end) {
  switch (tiles.M) {
    case 1: return linear_few<1>(weight, tiles, out, begin, end);
    case 2: return linear_few<2>(weight, tiles, out, begin, end);
    case 3: return linear_few<3>(weight, tiles, out, begin, end);
    case 4: return linear_few<4>(weight, tiles, out, begin, end);
    default: return linear_blocked<Avx512>(weight, tiles, out, begin, end);
  }
}

}  // namespace

const Kernels kAvx512Vnni = {"avx512_vnni", tile_width, quantize, fill_tiles, copy_tiles, linear};

}  // namespace torchmix::cpu

TORCHMIX_TARGET_END
#endif
