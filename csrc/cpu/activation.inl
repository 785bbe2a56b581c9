// Activations: quantization by the fixed formula (torchmix/ops/quantize_activation.py), and tiles of tokens.
// Included by every implementation in its own namespace, so that each compiles it for its own instructions.
// Products are rounded before they are added (-ffp-contract=off): the integers must be those of the reference.

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kMinRangeBits = 0x0d800000u;  // 2^-100: a group below it counts as zero
constexpr float kRounder = 12582912.0f;          // 1.5 * 2^23: added to |v| < 2^22 it rounds v, half to even

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  // The exponent is moved by a product, which is exact and takes care of subnormal numbers.
  const float scaled = float_of(magnitude << 13) * 0x1p112f;
  return float_of((magnitude >= 0x7c00 ? (magnitude << 13) | kInfinityBits : bits_of(scaled)) | sign);
}

// `count` values from `x + start` as float32.
inline void load_floats(const void* x, Float type, int64_t start, int count, float* out) {
  if (type == Float::kFloat32) {
    std::memcpy(out, static_cast<const float*>(x) + start, static_cast<size_t>(count) * 4);
  } else if (type == Float::kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + start;
    for (int i = 0; i < count; i++) out[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x) + start;
    for (int i = 0; i < count; i++) out[i] = from_half(from[i]);
  }
}

// Magnitudes are compared as integers: the order is the same, and NaN comes out largest instead of being dropped.
inline uint32_t largest_bits(const float* x, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; i++) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

struct Quantized {
  float scale;
  int32_t sum;
};

// Codes of one group whose largest magnitude is known.
inline Quantized quantize_group(const float* x, int count, uint32_t largest, int8_t* codes) {
  const bool finite = largest < kInfinityBits;
  if (!finite || largest < kMinRangeBits) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return {finite ? 0.0f : float_of(0x7fc00000u), 0};
  }
  const float factor = 127.0f / float_of(largest);
  int32_t sum = 0;
  for (int i = 0; i < count; i++) {
    const float scaled = x[i] * factor;
    const int32_t code = static_cast<int32_t>(bits_of(scaled + kRounder) - bits_of(kRounder));
    codes[i] = static_cast<int8_t>(code);
    sum += code;
  }
  return {float_of(largest) / 127.0f, sum};
}

inline int group_length(int64_t K, int group_size, int64_t g) {
  const int64_t left = K - g * group_size;
  return static_cast<int>(left < group_size ? left : group_size);
}

inline uint32_t largest_of_token(const Input& in, int64_t token) {
  float values[kMostGroup];
  uint32_t largest = 0;
  for (int64_t g = 0; g < in.G; g++) {
    const int count = group_length(in.K, in.group_size, g);
    load_floats(in.x, in.type, token * in.token_stride + g * in.group_size, count, values);
    const uint32_t here = largest_bits(values, count);
    largest = here > largest ? here : largest;
  }
  return largest;
}

// Codes of group g of a token into `codes`. `largest`: of the token, where all its groups share a scale.
inline Quantized quantize_one(const Input& in, int64_t token, int64_t g, uint32_t largest, int8_t* codes) {
  float values[kMostGroup];
  const int count = group_length(in.K, in.group_size, g);
  load_floats(in.x, in.type, token * in.token_stride + g * in.group_size, count, values);
  return quantize_group(values, count, in.per_token ? largest : largest_bits(values, count), codes);
}

void quantize(const Input& in, int8_t* codes, float* scale, int32_t* group_sum, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; m++) {
    const uint32_t largest = in.per_token ? largest_of_token(in, m) : 0;
    for (int64_t g = 0; g < in.G; g++) {
      const Quantized group = quantize_one(in, m, g, largest, codes + m * in.K + g * in.group_size);
      scale[m * in.G + g] = group.scale;
      group_sum[m * in.G + g] = group.sum;
    }
  }
}

// Tiles group by group: quantize(token, g, codes) gives a group's codes, scale and sum. What a tile holds besides, behind
// the codes of a group and for tokens that are not there, is zero.
template <class Quantize>
void fill_groups(const Tiles& tiles, int64_t K, int64_t t, const Quantize& quantize_token) {
  int8_t codes[kMostTile][kMostGroup];
  const int T = tiles.width(t);
  for (int64_t g = 0; g < tiles.G; g++) {
    const int count = group_length(K, tiles.group_size, g);
    for (int i = 0; i < T; i++) {
      Quantized group = {0.0f, 0};
      int filled = 0;
      if (tiles.first(t) + i < tiles.M) {
        group = quantize_token(i, g, codes[i]);
        filled = count;
      }
      std::memset(codes[i] + filled, 0, static_cast<size_t>(tiles.padded_group - filled));
      tiles.tile_scale(t)[g * T + i] = group.scale;
      tiles.tile_sum(t)[g * T + i] = static_cast<float>(group.sum);
    }
    place_group(codes, tiles, tiles.tile_codes(t) + g * tiles.group_bytes * T, T);
  }
}

void fill_tiles(const Input& in, const Tiles& tiles, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    uint32_t largest[kMostTile] = {};
    for (int i = 0; in.per_token && i < tiles.width(t) && tiles.first(t) + i < tiles.M; i++) {
      largest[i] = largest_of_token(in, tiles.first(t) + i);
    }
    fill_groups(tiles, in.K, t, [&](int i, int64_t g, int8_t* codes) {
      return quantize_one(in, tiles.first(t) + i, g, largest[i], codes);
    });
  }
}

void copy_tiles(const int8_t* from, const float* scale, const int32_t* group_sum, int64_t K, const Tiles& tiles,
                int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    fill_groups(tiles, K, t, [&](int i, int64_t g, int8_t* codes) -> Quantized {
      const int64_t token = tiles.first(t) + i;
      std::memcpy(codes, from + token * K + g * tiles.group_size,
                  static_cast<size_t>(group_length(K, tiles.group_size, g)));
      return {scale[token * tiles.G + g], group_sum[token * tiles.G + g]};
    });
  }
}
