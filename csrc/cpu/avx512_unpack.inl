// Unpacking with AVX-512: codes, scales and zero points of a block of 16 rows, brought into the order of the products.
// Included by avx512_vnni.cpp.

// sum += a (unsigned) * b (signed), four products in each dword. GCC copies the sum around its own intrinsic.
inline TORCHMIX_INLINE void add_products(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

inline __m512i four_of_token(const uint8_t* x) {
  int four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Reads memory into the second cache a little before its rows are needed. Rows are contiguous, and blocks of one width
// take them about in order, so what lies ahead is simply what follows.
struct Prefetch {
  const uint8_t* at;
  const uint8_t* end;

  static constexpr int64_t kDistance = 32 << 10;

  void start(const uint8_t* first, const Weight& weight) {
    at = first;
    end = weight.codes + weight.codes_bytes;
    if (first < weight.codes || first >= end) at = end;
    advance(kDistance);
  }

  inline void advance(int64_t bytes) {
    const uint8_t* until = at + bytes;
    for (; at < until; at += 64) {
      if (at < end) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }
  }
};

// In each lane of 16 bytes: a 4 x 4 matrix of dwords, transposed.
inline void transpose_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

// 16 bytes of rows q, 4 + q, 8 + q and 12 + q: after transpose_lanes over q = 0..3 the rows are in order.
inline __m512i load_rows(const uint8_t* const* rows, int q, int64_t at) {
  const auto lane = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 * i + q] + at)); };
  __m512i v = _mm512_castsi128_si512(lane(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, lane(1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, lane(2));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, lane(3));
}

// For eight codes of `bits` in the low bytes of a qword: where each begins, in the order of tile_order.
template <int kBits>
inline __m512i bit_offsets() {
  uint64_t offsets = 0;
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (int i = 0; i < 8; i++) offsets |= static_cast<uint64_t>(kOrder[i] * kBits) << (8 * i);
  return _mm512_set1_epi64(static_cast<int64_t>(offsets));
}

// Per lane: bytes `first` .. of the first eight codes into the low qword, those of the next eight into the high one.
template <int kBits>
inline __m512i byte_places(int first) {
  alignas(16) int8_t places[16];
  for (int i = 0; i < 16; i++) {
    places[i] = static_cast<int8_t>(i % 8 < kBits ? first + i / 8 * kBits + i % 8 : -128);
  }
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(places)));
}

// 32 codes of 16 rows from byte `at` of each row: w[i] has four codes of every row, in the order of tile_order.
// `plus_128`: codes of 8 bits become unsigned.
template <int kBits, bool plus_128>
inline void unpack_chunk(const uint8_t* const* rows, int64_t at, __m512i* w) {
  if constexpr (kBits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i packed[4];
    transpose_lanes(load_rows(rows, 0, at), load_rows(rows, 1, at), load_rows(rows, 2, at), load_rows(rows, 3, at),
                    packed);
    repeat<4>([&](auto c) TORCHMIX_INLINE {
      w[2 * c] = _mm512_and_si512(packed[c], mask);
      w[2 * c + 1] = _mm512_and_si512(_mm512_srli_epi32(packed[c], 4), mask);
    });
  } else {
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(kBits == 8 ? 0x80 : (1 << kBits) - 1));
    __m512i low[4], high[4];
    repeat<4>([&](auto q) TORCHMIX_INLINE {
      const __m512i first = load_rows(rows, q, at);
      // up to 4 bits one load has all 32 codes
      const __m512i second = kBits <= 4 ? first : load_rows(rows, q, at + 2 * kBits);
      if constexpr (kBits == 8) {
        const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
        low[q] = _mm512_shuffle_epi8(first, order);
        high[q] = _mm512_shuffle_epi8(second, order);
      } else {
        const __m512i offsets = bit_offsets<kBits>();
        low[q] = _mm512_multishift_epi64_epi8(offsets, _mm512_shuffle_epi8(first, byte_places<kBits>(0)));
        high[q] = _mm512_multishift_epi64_epi8(
            offsets, _mm512_shuffle_epi8(second, byte_places<kBits>(kBits <= 4 ? 2 * kBits : 0)));
      }
    });
    transpose_lanes(low[0], low[1], low[2], low[3], w);
    transpose_lanes(high[0], high[1], high[2], high[3], w + 4);
    repeat<8>([&](auto i) TORCHMIX_INLINE {
      if (kBits < 8) w[i] = _mm512_and_si512(w[i], mask);
      if (kBits == 8 && plus_128) w[i] = _mm512_xor_si512(w[i], mask);
    });
  }
}

// 16 x 16 dwords.
inline void transpose_16(__m512i* r) {
  __m512i s[16];
  repeat<4>([&](auto q) TORCHMIX_INLINE { transpose_lanes(r[4 * q], r[4 * q + 1], r[4 * q + 2], r[4 * q + 3], s + 4 * q); });
  repeat<4>([&](auto c) TORCHMIX_INLINE {  // s[4 q + c]: lane l has column 4 l + c of rows 4 q .. 4 q + 3
    const __m512i a = _mm512_shuffle_i32x4(s[c], s[4 + c], 0x44), b = _mm512_shuffle_i32x4(s[8 + c], s[12 + c], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(s[c], s[4 + c], 0xee), e = _mm512_shuffle_i32x4(s[8 + c], s[12 + c], 0xee);
    r[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    r[4 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
    r[8 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
  });
}

// Scales of 16 groups from group g on as float32 (group, row); reads nothing behind the last group.
inline void transpose_scales(const Block& block, int64_t G, int64_t g, float* out) {
  const __mmask16 valid = G - g >= 16 ? 0xffff : static_cast<__mmask16>((1u << (G - g)) - 1);
  __m512i r[16];
  repeat<16>([&](auto i) TORCHMIX_INLINE {
    r[i] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, block.scale[i] + g)), 16);
  });
  transpose_16(r);
  repeat<16>([&](auto i) TORCHMIX_INLINE { _mm512_store_si512(out + 16 * i, r[i]); });
}

// Zero points of 16 groups from group g on, a multiple of 16: take(i, those of group g + i for 16 rows as int32).
template <int kBits, class Take>
inline void transpose_zero_points(const Block& block, const Weight& weight, int64_t g, int of_8_bits, const Take& take) {
  if constexpr (kBits == 8) {
    for (int i = 0; i < 16; i++) take(i, _mm512_set1_epi32(of_8_bits));
  } else {
    constexpr uint64_t kMask = 0x0101010101010101ull * ((1ull << kBits) - 1);
    const uint8_t* end = weight.zero_point + weight.zero_point_bytes;
    __m512i r[16];
    repeat<16>([&](auto i) TORCHMIX_INLINE {
      const uint8_t* from = block.zero_point[i] + g / 8 * kBits;
      uint64_t low, high = 0;
      if (end - from >= kBits + 8) {
        std::memcpy(&low, from, 8);
        std::memcpy(&high, from + kBits, 8);
        low = _pdep_u64(low, kMask);
        high = _pdep_u64(high, kMask);
      } else {
        low = eight_zero_points(block.zero_point[i], g, weight.G, kBits);
        if (g + 8 < weight.G) high = eight_zero_points(block.zero_point[i], g + 8, weight.G, kBits);
      }
      r[i] = _mm512_cvtepu8_epi32(_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)));
    });
    transpose_16(r);
    repeat<16>([&](auto i) TORCHMIX_INLINE { take(i, r[i]); });
  }
}
