// Tensor-core functions of hopper.cuh on the machine. Included by emulated_primitives.h.
#pragma once

#include <cstring>

inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int m = 0; m < 4; m++) c += (a >> 8 * m & 255) * (b >> 8 * m & 255);
  return c;
}

namespace torchmix {

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  emulator::copy_bytes(to, from, bytes, barrier);
}

template <int COUNT>
inline void fewer_registers() {}
template <int COUNT>
inline void more_registers() {}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
inline void wgmma_wait() {}

inline float bfloat16_value(uint32_t word, int half) {
  const uint32_t bits = half == 0 ? word << 16 : word & 0xffff0000u;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

struct WgmmaOperands {
  const uint32_t* a;
  uint64_t b;
  bool first;
};

// What a descriptor says (wgmma.cuh): where, and in the plain form how far blocks of inputs and of tokens are apart.
// The address is one of this block.
inline uint32_t described(uint64_t descriptor) {
  return emulator::map_address(static_cast<uint32_t>(descriptor & 0x3fff) << 4, emulator::cluster_rank());
}

// A warp's 16 rows times 8 * R / 4 tokens of 32 bytes: the other warps of its group do the same with theirs.
template <int R>
void wgmma_lanes(const emulator::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) emulator::fail("wgmma: lanes %08x only", lanes.present);
  const auto& all = *static_cast<const WgmmaOperands*>(lanes.in[0]);
  if (all.b >> 62 != 1) emulator::fail("wgmma: codes are read without the swizzle");
  const uint32_t at = described(all.b), start = at % 1024, atom = at - start;
  if (start >= 128 || start % 32 != 0) emulator::fail("wgmma: inputs begin at byte %u of a token", start);
  const uint8_t* b = emulator::shared_pointer(atom, 2 * R * 128, 1024, emulator::Scope::kOwn, "wgmma");
  int a[16][32];
  for (int lane = 0; lane < 32; lane++) {
    const auto& operands = *static_cast<const WgmmaOperands*>(lanes.in[lane]);
    for (int r = 0; r < 4; r++) {
      for (int m = 0; m < 4; m++) {
        a[lane / 4 + 8 * (r % 2)][16 * (r / 2) + 4 * (lane % 4) + m] = operands.a[r] >> 8 * m & 255;
      }
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    int* d = static_cast<int*>(lanes.out[lane]);
    for (int e = 0; e < R; e++) {
      const int row = lane / 4 + 8 * (e % 4 / 2), token = e / 4 * 8 + 2 * (lane % 4) + e % 2;
      int sum = all.first ? 0 : d[e];
      for (int k = 0; k < 32; k++) {
        const int byte = static_cast<int>(start) + k, part = byte / 16 ^ token % 8;
        sum += a[row][k] * b[token / 8 * 1024 + token % 8 * 128 + part * 16 + byte % 16];
      }
      d[e] = sum;
    }
  }
}

template <int R>
inline void wgmma_multiply(int (&d)[R], const uint32_t* a, uint64_t b, bool first) {
  const WgmmaOperands operands = {a, b, first};
  emulator::collective("wgmma", 0xffffffffu, &operands, d, wgmma_lanes<R>);
}

// The same in bfloat16, 16 inputs from blocks of 8 tokens by 16 bytes.
template <int R>
void wgmma_bfloat16_lanes(const emulator::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) emulator::fail("wgmma: lanes %08x only", lanes.present);
  const auto& all = *static_cast<const WgmmaOperands*>(lanes.in[0]);
  const uint32_t inputs = static_cast<uint32_t>(all.b >> 16 & 0x3fff) << 4;
  const uint32_t tokens = static_cast<uint32_t>(all.b >> 32 & 0x3fff) << 4, blocks = R / 4;
  const uint32_t bytes = inputs + (blocks - 1) * tokens + 128;
  const uint8_t* b = emulator::shared_pointer(described(all.b), bytes, 16, emulator::Scope::kOwn, "wgmma");
  float a[16][16];
  for (int lane = 0; lane < 32; lane++) {
    const auto& operands = *static_cast<const WgmmaOperands*>(lanes.in[lane]);
    for (int r = 0; r < 4; r++) {
      for (int e = 0; e < 2; e++) {
        a[lane / 4 + 8 * (r % 2)][8 * (r / 2) + 2 * (lane % 4) + e] = bfloat16_value(operands.a[r], e);
      }
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    float* d = static_cast<float*>(lanes.out[lane]);
    for (int e = 0; e < R; e++) {
      const int row = lane / 4 + 8 * (e % 4 / 2), token = e / 4 * 8 + 2 * (lane % 4) + e % 2;
      for (int k = 0; k < 16; k++) {
        uint16_t value;
        memcpy(&value, b + token / 8 * tokens + k / 8 * inputs + token % 8 * 16 + k % 8 * 2, 2);
        d[e] += a[row][k] * bfloat16_value(value, 0);
      }
    }
  }
}

template <int R>
inline void wgmma_multiply(float (&d)[R], const uint32_t* a, uint64_t b) {
  const WgmmaOperands operands = {a, b, false};
  emulator::collective("wgmma bfloat16", 0xffffffffu, &operands, d, wgmma_bfloat16_lanes<R>);
}

}  // namespace torchmix
