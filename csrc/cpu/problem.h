// What the CPU kernels work on: plain pointers and sizes, no torch, no instruction set.
// Shapes: M tokens, N rows of the weight, K inputs, G = ceil(K / group_size) groups.
#pragma once

#include <cstdint>
#include <cstring>

namespace torchmix::cpu {

enum class Float { kFloat32, kFloat16, kBFloat16 };

constexpr int kBlockRows = 16;   // rows of one width that are worked on together
constexpr int kChunk = 32;       // codes of a row that are unpacked at a time; groups are padded to a multiple
constexpr int kMostGroup = 512;  // up to which 255 * 127 * group_size < 2^24, the integers that float32 holds
constexpr int kSlack = 192;      // bytes that kernels may read behind a row
constexpr int kOffsetRows = 64;  // rows from one known offset to the next
constexpr int kMostTile = 16;    // tokens of one tile

// torchmix/packing.py: rows one after another, eight codes in `bits` bytes, lowest bits first.
struct Weight {
  const uint8_t* codes;
  const uint16_t* scale;      // bfloat16 (N, G)
  const uint8_t* zero_point;  // packed; rows of 8 bits have none
  const uint8_t* row_bits;    // (N,)
  int64_t codes_bytes, zero_point_bytes;
  int64_t N, K, G;
  int group_size;
  // Where every kOffsetRows-th row begins, and the end.
  const int64_t* code_offsets;
  const int64_t* zero_point_offsets;
  // The last rows once more, followed by kSlack readable bytes: for rows from `first_copied` on.
  const uint8_t* copied;
  int64_t first_copied, copied_offset;
};

struct Input {
  const void* x;
  Float type;
  int64_t token_stride;  // in values; the features of a token are next to one another
  int64_t M, K, G;
  int group_size;
  bool per_token;
};

// Quantized tokens in tiles of `tile` tokens, the last one narrower. A tile of T tokens holds codes, `group_bytes` for
// each group and token in an order of the implementation's own, then scale (G, T) and sum (G, T).
// Tile t starts at token t * tile.
struct Tiles {
  uint8_t* codes;
  float* scale;
  float* sum;
  int64_t M, G;
  int group_size;
  // Set by Kernels::lay_out from the above.
  int tile;
  int padded_group;  // codes of a group with the zeros behind them, a multiple of kChunk
  int group_bytes;
  bool wide;  // one tile, whose codes are in the order for few tokens

  int64_t num_tiles() const { return (M + tile - 1) / tile; }
  int64_t tokens() const { return wide ? tile : M; }  // a wide tile may hold tokens of zeros
  int64_t first(int64_t t) const { return t * tile; }
  int width(int64_t t) const { return static_cast<int>(tokens() - t * tile < tile ? tokens() - t * tile : tile); }
  uint8_t* tile_codes(int64_t t) const { return codes + first(t) * G * group_bytes; }
  float* tile_scale(int64_t t) const { return scale + first(t) * G; }
  float* tile_sum(int64_t t) const { return sum + first(t) * G; }
};

struct Output {
  void* y;  // (M, N)
  Float type;
  const void* bias;  // (N,) or null
  Float bias_type;
};

// One implementation. Every function works on a part of the problem, and may run in several threads.
struct Kernels {
  const char* name;
  void (*lay_out)(Tiles& tiles);
  // Tokens begin .. end - 1 into codes int8 (M, K), scale float32 (M, G), group_sum int32 (M, G).
  void (*quantize)(const Input& input, int8_t* codes, float* scale, int32_t* group_sum, int64_t begin, int64_t end);
  // Tiles begin .. end - 1 from floats, or from what `quantize` gave.
  void (*fill_tiles)(const Input& input, const Tiles& tiles, int64_t begin, int64_t end);
  void (*copy_tiles)(const int8_t* codes, const float* scale, const int32_t* group_sum, int64_t K, const Tiles& tiles,
                     int64_t begin, int64_t end);
  // Rows begin .. end - 1 of the weight for all tokens.
  void (*linear)(const Weight& weight, const Tiles& tiles, const Output& output, int64_t begin, int64_t end);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#endif

// The implementation in use. Throws where TORCHMIX_CPU_CAPABILITY names none, or one that this processor lacks.
const Kernels& kernels();

}  // namespace torchmix::cpu
