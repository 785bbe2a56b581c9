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

// Reads memory into the second cache before its rows are needed. Rows are contiguous, and blocks take them about in
// order, so what lies ahead is simply what follows; with rows of several widths a block spans more than its own rows.
struct Prefetch {
  const uint8_t* at = nullptr;
  const uint8_t* end;
  int64_t distance;

  static constexpr int64_t kLeast = 32 << 10, kMost = 384 << 10;  // bytes

  Prefetch(const Weight& weight, int64_t end_row) : end(codes_end(weight, end_row)) {
    distance = 3 * kBlockRows * (weight.codes_bytes / weight.N);
    distance = distance < kLeast ? kLeast : distance > kMost ? kMost : distance;
  }

  void start(const Block& block, const Weight& weight) {
    if (at != nullptr) return;
    at = block.row[0] < weight.first_copied ? block.codes[0] : end;
    advance(distance);
  }

  inline void advance(int64_t bytes) {
    const uint8_t* until = end - at < bytes ? end : at + bytes;
    for (; at < until; at += 64) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

// Bytes of eight times eight codes, kBits of them into each qword (what follows them does not matter), and the bits
// where the codes of a qword begin.
template <int kBits>
struct RowPlaces {
  alignas(64) uint8_t place[64] = {};
  constexpr RowPlaces() {
    for (int i = 0; i < 64; i++) place[i] = static_cast<uint8_t>((i / 8 * kBits + i % 8) % 64);
  }
};
template <int kBits>
inline constexpr RowPlaces<kBits> kRowPlaces;
template <int kBits>
inline constexpr int64_t kInOrder = 0x0706050403020100ll * kBits;
template <int kBits>
inline constexpr int64_t kEvenThenOdd = 0x0705030106040200ll * kBits;

// 128 codes of a row. 4 bits: the even and the odd ones; else in order. 8 bits: plus 128.
template <int kBits>
inline TORCHMIX_INLINE void unpack_row(const uint8_t* row, __m512i* w) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(kBits == 8 ? 0x80 : (1 << kBits) - 1));
  if constexpr (kBits == 4) {
    const __m512i packed = _mm512_loadu_si512(row);
    w[0] = _mm512_and_si512(packed, mask);
    w[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
  } else if constexpr (kBits == 8) {
    w[0] = _mm512_xor_si512(_mm512_loadu_si512(row), mask);
    w[1] = _mm512_xor_si512(_mm512_loadu_si512(row + 64), mask);
  } else {
    const __m512i places = _mm512_load_si512(kRowPlaces<kBits>.place), offsets = _mm512_set1_epi64(kInOrder<kBits>);
    repeat<2>([&](auto i) TORCHMIX_INLINE {
      const __m512i eights = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(row + i * 8 * kBits));
      w[i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(offsets, eights), mask);
    });
  }
}

// Sixteen sums of sixteen dwords.
inline TORCHMIX_INLINE __m512i sums_of(const __m512i* v) {
  __m512i four[4];  // lane l, dword i: the sum of lane l of vector 4 q + i
  repeat<4>([&](auto q) TORCHMIX_INLINE {
    const __m512i a = v[4 * q], b = v[4 * q + 1], c = v[4 * q + 2], d = v[4 * q + 3];
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    four[q] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  });
  const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x44),
                                       _mm512_shuffle_i32x4(four[0], four[1], 0xee));
  const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x44),
                                        _mm512_shuffle_i32x4(four[2], four[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

// 128 codes of 16 rows from byte `at` of each row (4 bits), or 64: w[i] has four codes of every row, in the order of
// place_group. take(i, w[i]) for all of them.
template <int kBits, class Take>
inline TORCHMIX_INLINE void unpack_rows_of_block(const uint8_t* const* rows, int64_t at, const Take& take) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
  __m512i v[16];
  repeat<16>([&](auto i) TORCHMIX_INLINE {
    v[i] = _mm512_loadu_si512(rows[i] + at);
    if constexpr (kBits == 8) {
      const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
      v[i] = _mm512_shuffle_epi8(v[i], _mm512_broadcast_i32x4(order));
    } else if constexpr (kBits != 4) {
      const __m512i eights = _mm512_permutexvar_epi8(_mm512_load_si512(kRowPlaces<kBits>.place), v[i]);
      const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(kEvenThenOdd<kBits>), eights);
      v[i] = _mm512_and_si512(codes, mask);
    }
  });
  transpose_16(v);
  repeat<16>([&](auto i) TORCHMIX_INLINE {
    if constexpr (kBits == 4) {
      take(2 * i, _mm512_and_si512(v[i], mask));
      take(2 * i + 1, _mm512_and_si512(_mm512_srli_epi16(v[i], 4), mask));
    } else {
      take(i, v[i]);
    }
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
