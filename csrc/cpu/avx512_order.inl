// Transposing with AVX-512. Included by avx512_vnni.cpp.

// In each lane of 16 bytes: a 4 x 4 matrix of dwords, transposed.
inline void transpose_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
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
