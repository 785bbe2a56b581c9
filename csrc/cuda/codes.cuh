// What the kernels that read tiles share: the ring through which they come, and codes from planes to registers.
#pragma once

#include "common.cuh"

namespace torchmix {

// A place in the ring and the parity of its use.
struct Ring {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int by, int slots) {
    slot += by;
    while (slot >= slots) {
      slot -= slots;
      phase ^= 1;
    }
  }
};

// The 16 registers of codes of a warp's 16 x 128 part of a block, from its planes (layout: torchmix/tiles.py).
template <int BITS>
__device__ __forceinline__ void load_codes(uint32_t (&a)[16], const uint8_t* block, int slice, int lane) {
  if constexpr (BITS == 8) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const uint4 v = *reinterpret_cast<const uint4*>(block + 2048 * slice + 512 * s + 16 * lane);
      a[4 * s] = v.x, a[4 * s + 1] = v.y, a[4 * s + 2] = v.z, a[4 * s + 3] = v.w;
    }
    return;
  }
  if constexpr (BITS >= 4) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = *reinterpret_cast<const uint4*>(block + 1024 * slice + 512 * half + 16 * lane);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[8 * half + 2 * i] = words[i] & 0x0f0f0f0fu;
        a[8 * half + 2 * i + 1] = (words[i] >> 4) & 0x0f0f0f0fu;
      }
    }
  }
  if constexpr (BITS == 6 || BITS == 3) {
    constexpr int kShift = BITS == 6 ? 4 : 0;
    const uint8_t* plane = BITS == 6 ? block + 4096 : block;
    const uint4 v = *reinterpret_cast<const uint4*>(plane + 512 * slice + 16 * lane);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const uint32_t codes = ((words[j / 4] >> (2 * (j % 4))) & 0x03030303u) << kShift;
      a[j] = BITS == 6 ? a[j] | codes : codes;
    }
  }
  if constexpr (BITS == 5 || BITS == 3) {
    constexpr int kShift = BITS == 5 ? 4 : 2;
    const uint8_t* plane = BITS == 5 ? block + 4096 : block + 2048;
    const uint2 v = *reinterpret_cast<const uint2*>(plane + 256 * slice + 8 * lane);
    const uint32_t words[2] = {v.x, v.y};
#pragma unroll
    for (int j = 0; j < 16; j++) a[j] |= ((words[j / 8] >> (j % 8)) & 0x01010101u) << kShift;
  }
}

}  // namespace torchmix
