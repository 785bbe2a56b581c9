// CPU kernels with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "problem.h"
#include "target.h"

TORCHMIX_TARGET_BEGIN("avx2,fma,bmi2")

namespace torchmix::cpu {
namespace {

#include "interleaved.inl"

inline void place_group(const int8_t (*codes)[kMostGroup], const Tiles& tiles, uint8_t* group, int T) {
  place_interleaved(codes, tiles, group, T);
}

#include "repeat.inl"

#include "activation.inl"
#include "rows.inl"

#include "blocked.inl"

struct Avx2 {
  static constexpr int kBlocks = 1;

  Avx2(const Weight&, int64_t) {}

  static void unpack(int, const Block& block, const Weight& weight, int padded_group, Strip& strip) {
    const uint64_t mask = 0x0101010101010101ull * ((1ull << block.bits) - 1);
    unpack_rows(block, weight, padded_group, strip, [mask](uint64_t packed, int) { return _pdep_u64(packed, mask); });
  }

  // maddubs adds two products in 16 bits. |code - zero point| and |x| are at most 127, which it takes without
  // saturation: it multiplies the magnitude of the one by the other with its sign.
  template <int T>
  static void multiply_group(const int8_t* codes, const int8_t* x, int length, const float* scale,
                             const float* token_scale, float* y) {
    __m256i sum[T][2] = {};
    const __m256i ones = _mm256_set1_epi16(1);
    for (int k = 0; k < length; k += 4, codes += 64, x += 4 * T) {
      const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
      const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + 32));
      const __m256i size0 = _mm256_abs_epi8(w0), size1 = _mm256_abs_epi8(w1);
      repeat<T>([&](auto i) TORCHMIX_INLINE {
        int four;
        std::memcpy(&four, x + 4 * i, 4);
        const __m256i token = _mm256_set1_epi32(four);
        const __m256i p0 = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(token, w0));
        const __m256i p1 = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(token, w1));
        sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(p0, ones));
        sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(p1, ones));
      });
    }
    for (int i = 0; i < T; i++) {
      for (int half = 0; half < 2; half++) {
        float* at = y + i * kBlockRows + 8 * half;
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[i][half]), _mm256_loadu_ps(scale + 8 * half));
        _mm256_storeu_ps(at, _mm256_fmadd_ps(scaled, _mm256_set1_ps(token_scale[i]), _mm256_loadu_ps(at)));
      }
    }
  }

  template <int T>
  static void multiply_tile(const Strip& strip, const Weight& weight, const Tiles& tiles, int64_t t, float* y) {
    for (int j = 0; j < strip.groups; j++) {
      const int64_t g = strip.first + j;
      const int8_t* codes = strip.codes + static_cast<int64_t>(j) * tiles.padded_group * kBlockRows;
      const int8_t* x = reinterpret_cast<const int8_t*>(tiles.tile_codes(t)) + g * tiles.padded_group * T;
      const int length = padded_length(group_length(weight.K, weight.group_size, g));
      multiply_group<T>(codes, x, length, strip.scale + j * kBlockRows, tiles.tile_scale(t) + g * T, y);
    }
  }

  static void multiply(const Strip* strips, int, const Weight& weight, const Tiles& tiles, int64_t t, float* y) {
    switch (tiles.width(t)) {
      case 1: return multiply_tile<1>(strips[0], weight, tiles, t, y);
      case 2: return multiply_tile<2>(strips[0], weight, tiles, t, y);
      case 3: return multiply_tile<3>(strips[0], weight, tiles, t, y);
      default: return multiply_tile<4>(strips[0], weight, tiles, t, y);
    }
  }

  static void store(const Output& out, const Block& block, const float* bias, const float* y, int64_t token,
                    int64_t N) {
    store_rows(out, block, bias, y, token, N);
  }
};

void lay_out(Tiles& tiles) { lay_out_interleaved(tiles, static_cast<int>(tiles.M < 4 ? tiles.M : 4)); }

}  // namespace

const Kernels kAvx2 = {"avx2", lay_out, quantize, fill_tiles, copy_tiles, linear_blocked<Avx2>};

}  // namespace torchmix::cpu

TORCHMIX_TARGET_END
#endif
