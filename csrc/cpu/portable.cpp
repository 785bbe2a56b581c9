// CPU kernels in plain C++: for every processor, and the pattern that the others follow.
#include <cstdlib>
#include <new>

#include "problem.h"

namespace torchmix::cpu {
namespace {

#include "interleaved.inl"

inline void place_group(const int8_t (*codes)[kMostGroup], const Tiles& tiles, uint8_t* group, int T) {
  place_interleaved(codes, tiles, group, T);
}

#include "activation.inl"
#include "rows.inl"

#include "blocked.inl"

struct Portable {
  static constexpr int kBlocks = 1;

  Portable(const Weight&, int64_t) {}

  static void unpack(int, const Block& block, const Weight& weight, int padded_group, Strip& strip) {
    unpack_rows(block, weight, padded_group, strip, spread);
  }

  static void multiply(const Strip* strips, int, const Weight& weight, const Tiles& tiles, int64_t t, float* y) {
    const int T = tiles.width(t);
    for (int j = 0; j < strips[0].groups; j++) {
      const int64_t g = strips[0].first + j;
      const int length = padded_length(group_length(weight.K, weight.group_size, g));
      const int8_t* codes = strips[0].codes + static_cast<int64_t>(j) * tiles.padded_group * kBlockRows;
      const float* scale = strips[0].scale + j * kBlockRows;
      for (int i = 0; i < T; i++) {
        const int8_t* x = reinterpret_cast<const int8_t*>(tiles.tile_codes(t)) + g * tiles.padded_group * T + 4 * i;
        int32_t sum[kBlockRows] = {};
        for (int k = 0; k < length; k += 4) {
          const int8_t* four = x + k * T;
          const int8_t* rows = codes + k * kBlockRows;
          for (int n = 0; n < kBlockRows; n++) {
            for (int c = 0; c < 4; c++) sum[n] += rows[4 * n + c] * four[c];
          }
        }
        const float token_scale = tiles.tile_scale(t)[g * T + i];
        for (int n = 0; n < kBlockRows; n++) {
          y[i * kBlockRows + n] += static_cast<float>(sum[n]) * scale[n] * token_scale;
        }
      }
    }
  }

  static void store(const Output& out, const Block& block, const float* bias, const float* y, int64_t token,
                    int64_t N) {
    store_rows(out, block, bias, y, token, N);
  }
};

void lay_out(Tiles& tiles) { lay_out_interleaved(tiles, static_cast<int>(tiles.M < 4 ? tiles.M : 4)); }

}  // namespace

const Kernels kPortable = {"portable", lay_out, quantize, fill_tiles, copy_tiles, linear_blocked<Portable>};

}  // namespace torchmix::cpu
