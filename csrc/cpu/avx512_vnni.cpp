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

constexpr int kFewTokens = 4;     // up to which weights are multiplied row by row, as they are read
constexpr int kWideChunk = 128;   // codes of a row that are then worked on at a time
constexpr int kLeastWide = 64;    // group_size from which this pays
constexpr int kWidestTile = 12;   // 24 sums of two blocks, and registers for weights and tokens
constexpr int kMetaGroups = 16;   // groups whose scales and zero points are brought into order at a time

// Codes 0, 2, 4, 6, then 1, 3, 5, 7 of eight: the order in which 4-bit codes leave a byte.
inline uint64_t even_then_odd(uint64_t eight) {
  return _pext_u64(eight, 0x00ff00ff00ff00ffull) | _pext_u64(eight, 0xff00ff00ff00ff00ull) << 32;
}

#include "interleaved.inl"
#include "repeat.inl"

#include "avx512_order.inl"

// Few tokens: (group, chunk, token, 256): the codes of a chunk in order, then the even ones, then the odd ones.
inline void place_wide(const int8_t* codes, const Tiles& tiles, uint8_t* group, int i, int T) {
  for (int k = 0; k < tiles.padded_group; k += kWideChunk) {
    uint8_t* at = group + (k * T + kWideChunk * i) * 2;
    std::memcpy(at, codes + k, kWideChunk);
    for (int j = 0; j < kWideChunk; j += 8) {
      uint64_t eight;
      std::memcpy(&eight, codes + k + j, 8);
      eight = even_then_odd(eight);
      const uint32_t even = static_cast<uint32_t>(eight), odd = static_cast<uint32_t>(eight >> 32);
      std::memcpy(at + kWideChunk + j / 2, &even, 4);
      std::memcpy(at + kWideChunk + kWideChunk / 2 + j / 2, &odd, 4);
    }
  }
}

// Else (group, padded_group / 4, token, 4). Eight codes are in the order in which 4-bit codes leave a byte, even then
// odd. Weights are the signed operand of a product there and tokens the unsigned one: 128 is added.
inline void place_group(const int8_t (*codes)[kMostGroup], const Tiles& tiles, uint8_t* group, int T) {
  if (tiles.wide) {
    for (int i = 0; i < T; i++) place_wide(codes[i], tiles, group, i, T);
    return;
  }
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m512i plus_128 = _mm512_set1_epi8(-128);
  const __mmask16 tokens = static_cast<__mmask16>((1u << T) - 1);
  for (int k = 0; k < tiles.padded_group; k += 64) {
    __m512i v[16];
    repeat<16>([&](auto i) TORCHMIX_INLINE {
      v[i] = _mm512_setzero_si512();
      if (i < T) v[i] = _mm512_loadu_si512(codes[i] + k);
      v[i] = _mm512_xor_si512(_mm512_shuffle_epi8(v[i], order), plus_128);
    });
    transpose_16(v);
    const int vectors = tiles.padded_group - k < 64 ? (tiles.padded_group - k) / 4 : 16;
    repeat<16>([&](auto i) TORCHMIX_INLINE {
      if (i < vectors) _mm512_mask_storeu_epi32(group + (k / 4 + i) * 4 * T, tokens, v[i]);
    });
  }
}

#include "activation.inl"
#include "rows.inl"

#include "blocked.inl"
#include "avx512_unpack.inl"

// Rounded half to even; NaN stays NaN.
inline __m256i bfloat16_of(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

// --- few tokens ------------------------------------------------------------------------------------------------------

struct Meta {
  alignas(64) float scale[kMetaGroups][kBlockRows];
  alignas(64) float zero_point[kMetaGroups][kBlockRows];
};

// The T values of a group, over and over.
template <int T>
inline __m512 each_token(const float* values) {
  if constexpr (T == 1) return _mm512_set1_ps(values[0]);
  if constexpr (T == 2) {
    double both;
    std::memcpy(&both, values, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  return _mm512_broadcast_f32x4(_mm_loadu_ps(values));
}

// 16 / T rows for T tokens and one group, sums in the order (row, token): codes (those of 8 bits plus 128) times tokens.
template <int kBits, int T>
inline TORCHMIX_INLINE __m512i multiply_rows(const uint8_t* const* rows, int64_t at, int length, const uint8_t* x) {
  __m512i sum[16];
  repeat<16>([&](auto i) TORCHMIX_INLINE { sum[i] = _mm512_setzero_si512(); });
  for (int k = 0; k < length; k += kWideChunk, at += kWideChunk / 8 * kBits, x += 2 * kWideChunk * T) {
    __m512i tokens[2 * T];
    repeat<2 * T>([&](auto i) TORCHMIX_INLINE {
      tokens[i] = _mm512_loadu_si512(x + i / 2 * 2 * kWideChunk + (kBits == 4 ? kWideChunk : 0) + i % 2 * 64);
    });
    repeat<16 / T>([&](auto r) TORCHMIX_INLINE {
      __m512i w[2];
      unpack_row<kBits>(rows[r] + at, w);
      repeat<T>([&](auto i) TORCHMIX_INLINE {
        add_products(sum[r * T + i], w[0], tokens[2 * i]);
        add_products(sum[r * T + i], w[1], tokens[2 * i + 1]);
      });
    });
  }
  return sums_of(sum);
}

// One block for T tokens.
template <int kBits, int T>
void multiply_wide(const Block& block, const Weight& weight, const Tiles& tiles, const Output& out, Prefetch& ahead) {
  constexpr int kRows = 16 / T;
  __m512 y[T];
  __m512i row_of[T];  // of each sum
  repeat<T>([&](auto s) TORCHMIX_INLINE {
    alignas(64) int32_t rows[16];
    for (int i = 0; i < 16; i++) rows[i] = s * kRows + i / T;
    row_of[s] = _mm512_load_si512(rows);
    y[s] = _mm512_setzero_ps();
  });
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
    const int length = group_length(weight.K, weight.group_size, g);
    const __m512 scale = _mm512_load_ps(meta.scale[j]), zero_point = _mm512_load_ps(meta.zero_point[j]);
    const __m512 token_sum = each_token<T>(tiles.sum + g * T), token_scale = each_token<T>(tiles.scale + g * T);
    repeat<T>([&](auto s) TORCHMIX_INLINE {
      const __m512i sum = multiply_rows<kBits, T>(block.codes + s * kRows, at, length, tiles.codes + g * tiles.group_bytes * T);
      const __m512 scales = T == 1 ? scale : _mm512_permutexvar_ps(row_of[s], scale);
      const __m512 zero_points = T == 1 ? zero_point : _mm512_permutexvar_ps(row_of[s], zero_point);
      // Exact: all three are integers below 2^24.
      const __m512 centered = _mm512_fnmadd_ps(zero_points, token_sum, _mm512_cvtepi32_ps(sum));
      y[s] = _mm512_fmadd_ps(_mm512_mul_ps(centered, scales), token_scale, y[s]);
    });
    ahead.advance(group_bytes * kBlockRows);
  }
  for (int s = 0; s < T; s++) {
    alignas(64) float values[16];
    _mm512_store_ps(values, y[s]);
    for (int i = 0; i < 16; i++) {
      const int row = s * kRows + i / T, token = i % T;
      if (row >= block.count || token >= tiles.M) continue;
      store_one(out, token * weight.N + block.row[row], values[i] + bias_of(out, block.row[row]));
    }
  }
}

template <int T>
void linear_wide(const Weight& weight, const Tiles& tiles, const Output& out, int64_t begin, int64_t end) {
  Prefetch ahead(weight, end);
  for_blocks(weight, begin, end, [&](const Block& block) {
    ahead.start(block, weight);
    switch (block.bits) {
      case 2: return multiply_wide<2, T>(block, weight, tiles, out, ahead);
      case 3: return multiply_wide<3, T>(block, weight, tiles, out, ahead);
      case 4: return multiply_wide<4, T>(block, weight, tiles, out, ahead);
      case 5: return multiply_wide<5, T>(block, weight, tiles, out, ahead);
      case 6: return multiply_wide<6, T>(block, weight, tiles, out, ahead);
      case 7: return multiply_wide<7, T>(block, weight, tiles, out, ahead);
      default: return multiply_wide<8, T>(block, weight, tiles, out, ahead);
    }
  });
}

// --- many tokens -----------------------------------------------------------------------------------------------------

struct Avx512 {
  static constexpr int kBlocks = 2;

  Avx512(const Weight& weight, int64_t end) : ahead(weight, end) {}

  // Of 16 groups of a block.
  struct Meta {
    alignas(64) float scale[kMetaGroups][kBlockRows];
    alignas(64) int32_t zero_point[kMetaGroups][kBlockRows];  // in each of four bytes
  };

  Prefetch ahead;
  Meta meta[kBlocks];

  template <int kBits>
  static void read_meta(Meta& meta, const Block& block, const Weight& weight, int64_t g) {
    transpose_scales(block, weight.G, g, &meta.scale[0][0]);
    transpose_zero_points<kBits>(block, weight, g, 0, [&](int i, __m512i values) {
      _mm512_store_si512(meta.zero_point[i], _mm512_mullo_epi32(values, _mm512_set1_epi32(0x01010101)));
    });
  }

  template <int kBits>
  void unpack_width(Meta& meta, const Block& block, const Weight& weight, int padded_group, Strip& strip) {
    constexpr int kCodes = kBits == 4 ? 128 : 64;
    if (strip.first % kMetaGroups == 0) read_meta<kBits>(meta, block, weight, strip.first);
    const int group_bytes = weight.group_size / 8 * kBits;
    const __m512i minus_128 = _mm512_set1_epi8(-128);
    int64_t at = strip.first * group_bytes;
    for (int j = 0; j < strip.groups; j++, at += group_bytes) {
      const int64_t g = strip.first + j;
      const int length = padded_length(group_length(weight.K, weight.group_size, g));
      const __m512i zero_point = _mm512_load_si512(meta.zero_point[g % kMetaGroups]);
      __m512i start[2] = {};
      int8_t* to = strip.codes + static_cast<int64_t>(j) * padded_group * kBlockRows;
      for (int k = 0; k < length; k += kCodes, to += kCodes * kBlockRows) {
        const int vectors = length - k < kCodes ? (length - k) / 4 : kCodes / 4;  // the next group follows
        unpack_rows_of_block<kBits>(block.codes, at + k / 8 * kBits, [&](auto i, __m512i w) TORCHMIX_INLINE {
          if (i >= vectors) return;
          const __m512i centered = kBits == 8 ? w : _mm512_sub_epi8(w, zero_point);
          add_products(start[i % 2], minus_128, centered);  // 128 * (code - zero point)
          _mm512_store_si512(to + 64 * i, centered);
        });
      }
      const __m512i all = _mm512_add_epi32(start[0], start[1]);
      _mm512_store_si512(strip.start + j * kBlockRows, _mm512_sub_epi32(_mm512_setzero_si512(), all));
      _mm512_store_ps(strip.scale + j * kBlockRows, _mm512_load_ps(meta.scale[g % kMetaGroups]));
      ahead.advance(group_bytes * kBlockRows);
    }
  }

  void unpack(int b, const Block& block, const Weight& weight, int padded_group, Strip& strip) {
    ahead.start(block, weight);
    switch (block.bits) {
      case 2: return unpack_width<2>(meta[b], block, weight, padded_group, strip);
      case 3: return unpack_width<3>(meta[b], block, weight, padded_group, strip);
      case 4: return unpack_width<4>(meta[b], block, weight, padded_group, strip);
      case 5: return unpack_width<5>(meta[b], block, weight, padded_group, strip);
      case 6: return unpack_width<6>(meta[b], block, weight, padded_group, strip);
      case 7: return unpack_width<7>(meta[b], block, weight, padded_group, strip);
      default: return unpack_width<8>(meta[b], block, weight, padded_group, strip);
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
      asm volatile("" ::: "memory");  // y stays in memory: there are no registers for it
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
    const __m512 values = _mm512_add_ps(_mm512_load_ps(y), _mm512_loadu_ps(bias));
    const int64_t at = token * N;
    if (out.type == Float::kFloat32) {
      alignas(64) float full[kBlockRows];
      _mm512_store_ps(full, values);
      for (int i = 0; i < block.count; i++) static_cast<float*>(out.y)[at + block.row[i]] = full[i];
      return;
    }
    alignas(32) uint16_t half[kBlockRows];
    const __m256i packed = out.type == Float::kBFloat16
                               ? bfloat16_of(values)
                               : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_store_si256(reinterpret_cast<__m256i*>(half), packed);
    uint16_t* to = static_cast<uint16_t*>(out.y) + at;
    if (block.count == kBlockRows) {
      repeat<kBlockRows>([&](auto i) TORCHMIX_INLINE { to[block.row[i]] = half[i]; });
    } else {
      for (int i = 0; i < block.count; i++) to[block.row[i]] = half[i];
    }
  }
};

void lay_out(Tiles& tiles) {
  if (tiles.M <= kFewTokens && tiles.group_size >= kLeastWide) {
    tiles.wide = true;
    tiles.tile = tiles.M == 3 ? 4 : static_cast<int>(tiles.M);
    tiles.padded_group = (tiles.group_size + kWideChunk - 1) / kWideChunk * kWideChunk;
    tiles.group_bytes = 2 * tiles.padded_group;
    return;
  }
  const int64_t count = (tiles.M + kWidestTile - 1) / kWidestTile;  // of tiles, of nearly equal width
  lay_out_interleaved(tiles, static_cast<int>((tiles.M + count - 1) / count));
}

void linear(const Weight& weight, const Tiles& tiles, const Output& out, int64_t begin, int64_t end) {
  if (!tiles.wide) return linear_blocked<Avx512>(weight, tiles, out, begin, end);
  switch (tiles.tile) {
    case 1: return linear_wide<1>(weight, tiles, out, begin, end);
    case 2: return linear_wide<2>(weight, tiles, out, begin, end);
    default: return linear_wide<4>(weight, tiles, out, begin, end);
  }
}

}  // namespace

const Kernels kAvx512Vnni = {"avx512_vnni", lay_out, quantize, fill_tiles, copy_tiles, linear};

}  // namespace torchmix::cpu

TORCHMIX_TARGET_END
#endif
