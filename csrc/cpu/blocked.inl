// Many tokens: blocks of rows are unpacked strip by strip into codes minus zero points, which all tokens then use.
// Included by every implementation in its own namespace, after rows.inl. `Isa` brings the instructions:
//   kBlocks        blocks of rows that a tile is multiplied with at a time
//   Isa(weight, end) what a thread keeps in the course of a call
//   unpack(...)    a strip of a block, the first or second at a time, into scratch memory
//   multiply(...)  a tile of tokens with a strip of kBlocks blocks, added to y
//   store(...)     results of a block for one token

// A strip of one block: `groups` groups from group `first` on.
struct Strip {
  int8_t* codes;      // (groups, padded_group / 4, 16 rows, 4): code - zero point
  int32_t* start;     // (groups, 16): what the integer sums start from
  float* scale;       // (groups, 16)
  int64_t first;
  int groups;
};

constexpr int64_t kCachedTokens = 16;     // up to which a strip should stay in the first cache
constexpr int kFewCodes = 512;         // of a row in such a strip
constexpr int kManyCodes = 2048;       // and otherwise
constexpr int64_t kTokensAtOnce = 528; // for which unpacked codes are used again
constexpr int kMostGroups = 16;        // of a strip

inline void* aligned(void* pointer) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(pointer) + 63) / 64 * 64);
}

// Scratch memory of one thread in one call.
template <class Isa>
struct Scratch {
  explicit Scratch(const Tiles& tiles) {
    const int codes = tiles.M <= kCachedTokens ? kFewCodes : kManyCodes;
    groups = kMostGroups;
    while (groups > 1 && groups * tiles.padded_group > codes) groups /= 2;
    const int64_t strip = static_cast<int64_t>(groups) * tiles.padded_group * kBlockRows;
    const int64_t tokens = tiles.M < kTokensAtOnce ? tiles.M : kTokensAtOnce + kMostTile;
    const int64_t y_bytes = tokens * Isa::kBlocks * kBlockRows * 4;
    memory = std::malloc(static_cast<size_t>(Isa::kBlocks * strip + y_bytes + 64));
    if (memory == nullptr) throw std::bad_alloc();
    y = static_cast<float*>(aligned(memory));
    int8_t* at = reinterpret_cast<int8_t*>(y) + y_bytes;
    for (int b = 0; b < Isa::kBlocks; b++) {
      strips[b] = {at + b * strip, start[b], scale[b], 0, 0};
    }
  }
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* memory;
  float* y;
  Strip strips[2];
  int groups;
  alignas(64) int32_t start[2][kMostGroups * kBlockRows];
  alignas(64) float scale[2][kMostGroups * kBlockRows];
};

// Tokens begin .. end - 1 of y (tile, block, token, 16). The blocks of a token lie close together in the result.
template <class Isa>
void store_tiles(const Block* blocks, int count, const float* y, int64_t N, const Tiles& tiles, const Output& out,
                 int64_t begin, int64_t end) {
  float bias[2][kBlockRows];
  for (int b = 0; b < count; b++) {
    for (int i = 0; i < kBlockRows; i++) bias[b][i] = bias_of(out, blocks[b].row[i]);
  }
  constexpr int kAhead = 8;  // tokens; their places in the result are far apart
  const int64_t value_bytes = out.type == Float::kFloat32 ? 4 : 2;
  const auto fetch = [&](int64_t token, const Block& block) {
    const int64_t at = (token < end ? token : end - 1) * N;
    __builtin_prefetch(static_cast<const char*>(out.y) + (at + block.row[0]) * value_bytes, 1);
    __builtin_prefetch(static_cast<const char*>(out.y) + (at + block.row[block.count - 1]) * value_bytes, 1);
  };
  for (int64_t t = begin / tiles.tile; tiles.first(t) < end; t++) {
    const float* tile_y = y + (tiles.first(t) - begin) * Isa::kBlocks * kBlockRows;
    const int T = tiles.width(t);
    for (int i = 0; i < T; i++) {
      for (int b = 0; b < count; b++) {
        fetch(tiles.first(t) + i + kAhead, blocks[b]);
        Isa::store(out, blocks[b], bias[b], tile_y + (b * T + i) * kBlockRows, tiles.first(t) + i, N);
      }
    }
  }
}

// `count` blocks for all tokens.
template <class Isa>
void multiply_blocks(const Block* blocks, int count, const Weight& weight, const Tiles& tiles, const Output& out,
                     Scratch<Isa>& scratch, Isa& isa) {
  const int64_t at_once = kTokensAtOnce / tiles.tile > 0 ? kTokensAtOnce / tiles.tile : 1;
  for (int64_t t0 = 0; t0 < tiles.num_tiles(); t0 += at_once) {
    const int64_t t1 = t0 + at_once < tiles.num_tiles() ? t0 + at_once : tiles.num_tiles();
    const int64_t begin = tiles.first(t0), end = tiles.first(t1) < tiles.M ? tiles.first(t1) : tiles.M;
    std::memset(scratch.y, 0, static_cast<size_t>((end - begin) * Isa::kBlocks * kBlockRows) * 4);
    for (int64_t g = 0; g < weight.G; g += scratch.groups) {
      for (int b = 0; b < count; b++) {
        scratch.strips[b].first = g;
        scratch.strips[b].groups = static_cast<int>(weight.G - g < scratch.groups ? weight.G - g : scratch.groups);
        isa.unpack(b, blocks[b], weight, tiles.padded_group, scratch.strips[b]);
      }
      for (int64_t t = t0; t < t1; t++) {
        Isa::multiply(scratch.strips, count, weight, tiles, t,
                      scratch.y + (tiles.first(t) - begin) * Isa::kBlocks * kBlockRows);
      }
    }
    store_tiles<Isa>(blocks, count, scratch.y, weight.N, tiles, out, begin, end);
  }
}

template <class Isa>
void linear_blocked(const Weight& weight, const Tiles& tiles, const Output& out, int64_t begin, int64_t end) {
  Scratch<Isa> scratch(tiles);
  Isa isa(weight, end);
  Block waiting[2];
  int count = 0;
  for_blocks(weight, begin, end, [&](const Block& block) {
    waiting[count++] = block;
    if (count < Isa::kBlocks) return;
    multiply_blocks<Isa>(waiting, count, weight, tiles, out, scratch, isa);
    count = 0;
  });
  if (count > 0) multiply_blocks<Isa>(waiting, count, weight, tiles, out, scratch, isa);
}

// Places for eight codes minus their zero point (below 8 bits), four by four, `step` bytes apart.
inline uint64_t minus_zero_point(uint64_t eight, uint64_t zero_point) {
  constexpr uint64_t kHigh = 0x8080808080808080ull;
  return ((eight | kHigh) - zero_point * 0x0101010101010101ull) ^ kHigh;
}

// Portable unpacking, row by row; `spread_codes(packed, bits)` gives eight codes.
template <class Spread>
void unpack_rows(const Block& block, const Weight& weight, int padded_group, Strip& strip, const Spread& spread_codes) {
  const int bits = block.bits;
  for (int i = 0; i < kBlockRows; i++) {
    uint64_t zero_points = 0;
    for (int j = 0; j < strip.groups; j++) {
      const int64_t g = strip.first + j;
      if (j == 0 || g % 8 == 0) zero_points = eight_zero_points(block.zero_point[i], g / 8 * 8, weight.G, bits);
      const uint64_t zero_point = zero_points >> (g % 8 * 8) & 0xff;
      const uint8_t* from = block.codes[i] + g * (weight.group_size / 8) * bits;
      int8_t* to = strip.codes + (static_cast<int64_t>(j) * padded_group * kBlockRows + 4 * i);
      const int length = padded_length(group_length(weight.K, weight.group_size, g));
      for (int k = 0; k < length; k += 8, from += bits, to += 8 * kBlockRows) {
        uint64_t packed;
        std::memcpy(&packed, from, 8);
        uint64_t eight = spread_codes(packed, bits);
        if (bits < 8) eight = minus_zero_point(eight, zero_point);
        const uint32_t low = static_cast<uint32_t>(eight), high = static_cast<uint32_t>(eight >> 32);
        std::memcpy(to, &low, 4);
        std::memcpy(to + 4 * kBlockRows, &high, 4);
      }
      strip.scale[j * kBlockRows + i] = float_of(static_cast<uint32_t>(block.scale[i][g]) << 16);
    }
  }
}
