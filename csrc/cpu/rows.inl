// Rows of mixed widths in blocks of one width, and results on their way out.
// Included by every implementation in its own namespace.

// Up to kBlockRows rows of one width; where there are fewer, the last one stands in for the rest.
struct Block {
  const uint8_t* codes[kBlockRows];
  const uint8_t* zero_point[kBlockRows];
  const uint16_t* scale[kBlockRows];
  int64_t row[kBlockRows];
  int count = 0;
  int bits = 0;
};

inline int64_t blocks_of_eight(int64_t K) { return (K + 7) / 8; }
inline int64_t zero_point_length(int64_t G, int bits) { return bits == 8 ? 0 : (G * bits + 7) / 8; }

inline void fill_up(Block& block) {
  for (int i = block.count; i < kBlockRows; i++) {
    block.codes[i] = block.codes[i - 1];
    block.zero_point[i] = block.zero_point[i - 1];
    block.scale[i] = block.scale[i - 1];
    block.row[i] = block.row[i - 1];
  }
}

// A byte behind the codes of rows .. end - 1, at the next known offset.
inline const uint8_t* codes_end(const Weight& weight, int64_t end) {
  return weight.codes + weight.code_offsets[(end + kOffsetRows - 1) / kOffsetRows];
}

// Calls `take(block)` for rows begin .. end - 1 in blocks of one width, about in the order of memory.
template <class Take>
void for_blocks(const Weight& weight, int64_t begin, int64_t end, const Take& take) {
  Block waiting[9];
  int64_t lengths[9], zero_lengths[9];
  for (int bits = 0; bits <= 8; bits++) {
    waiting[bits].bits = bits;
    lengths[bits] = blocks_of_eight(weight.K) * bits;
    zero_lengths[bits] = zero_point_length(weight.G, bits);
  }
  const int64_t known = begin / kOffsetRows;
  int64_t at = weight.code_offsets[known], zero_at = weight.zero_point_offsets[known];
  for (int64_t n = known * kOffsetRows; n < begin; n++) {
    at += lengths[weight.row_bits[n]];
    zero_at += zero_lengths[weight.row_bits[n]];
  }
  for (int64_t n = begin; n < end; n++) {
    Block& block = waiting[weight.row_bits[n]];
    const int i = block.count++;
    block.codes[i] = n < weight.first_copied ? weight.codes + at : weight.copied + (at - weight.copied_offset);
    block.zero_point[i] = weight.zero_point + zero_at;
    block.scale[i] = weight.scale + n * weight.G;
    block.row[i] = n;
    at += lengths[block.bits];
    zero_at += zero_lengths[block.bits];
    if (block.count == kBlockRows) {
      take(block);
      block.count = 0;
    }
  }
  for (Block& block : waiting) {
    if (block.count == 0) continue;
    fill_up(block);
    take(block);
  }
}

inline int padded_length(int count) { return (count + kChunk - 1) / kChunk * kChunk; }

// Eight codes of `bits` bits, one in each byte.
inline uint64_t spread(uint64_t packed, int bits) {
  if (bits == 8) return packed;
  const uint64_t low = (1ull << (4 * bits)) - 1;
  packed = (packed & low) | ((packed & (low << (4 * bits))) << (32 - 4 * bits));
  const uint64_t pairs = 0x0000000100000001ull * ((1ull << (2 * bits)) - 1);
  packed = (packed & pairs) | ((packed & (pairs << (2 * bits))) << (16 - 2 * bits));
  const uint64_t ones = 0x0001000100010001ull * ((1ull << bits) - 1);
  return (packed & ones) | ((packed & (ones << bits)) << (8 - bits));
}

// Eight zero points of a row from group g on, which is a multiple of 8; reads no byte behind the row's.
inline uint64_t eight_zero_points(const uint8_t* row, int64_t g, int64_t G, int bits) {
  if (bits == 8) return 0;
  const int64_t start = g / 8 * bits, left = zero_point_length(G, bits) - start;
  uint64_t packed = 0;
  for (int i = 0; i < bits && i < left; i++) packed |= static_cast<uint64_t>(row[start + i]) << (8 * i);
  return spread(packed, bits);
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > kInfinityBits) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 puts the last place of the sum where that of the result is
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float bias_of(const Output& out, int64_t row) {
  if (out.bias == nullptr) return 0.0f;
  float value;
  load_floats(out.bias, out.bias_type, row, 1, &value);
  return value;
}

// One result; the bias is part of it.
inline void store_one(const Output& out, int64_t at, float value) {
  if (out.type == Float::kFloat32) {
    static_cast<float*>(out.y)[at] = value;
  } else {
    static_cast<uint16_t*>(out.y)[at] = out.type == Float::kBFloat16 ? to_bfloat16(value) : to_half(value);
  }
}

// A block's results for one token.
inline void store_rows(const Output& out, const Block& block, const float* bias, const float* y, int64_t token,
                       int64_t N) {
  for (int i = 0; i < block.count; i++) store_one(out, token * N + block.row[i], y[i] + bias[i]);
}
