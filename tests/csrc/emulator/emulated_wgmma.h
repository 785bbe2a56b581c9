// Tensor-core functions of batch.cuh on the machine. Included by emulated_primitives.h.
#pragma once

#include <cstring>

inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int m = 0; m < 4; m++) c += (a >> 8 * m & 255) * (b >> 8 * m & 255);
  return c;
}
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(x)}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(__bfloat162float(a.x) * __bfloat162float(b.x)),
          __float2bfloat16_rn(__bfloat162float(a.y) * __bfloat162float(b.y))};
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

struct WgmmaOperands {
  const uint32_t* a;
  uint32_t tokens;
  int step;
  bool first;
};

// A warp's 16 rows times N tokens: the other warps of its group do the same with theirs.
template <int N>
void wgmma_lanes(const emulator::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) emulator::fail("wgmma: lanes %08x only", lanes.present);
  const auto& all = *static_cast<const WgmmaOperands*>(lanes.in[0]);
  const uint8_t* b = emulator::shared_pointer(all.tokens, N * 128, 1024, emulator::Scope::kOwn, "wgmma");
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
    for (int e = 0; e < N / 2; e++) {
      const int row = lane / 4 + 8 * (e % 4 / 2), token = e / 4 * 8 + 2 * (lane % 4) + e % 2;
      int sum = all.first ? 0 : d[e];
      for (int k = 0; k < 32; k++) {
        const int byte = 32 * all.step + k, part = byte / 16 ^ token % 8;
        sum += a[row][k] * b[token / 8 * 1024 + token % 8 * 128 + part * 16 + byte % 16];
      }
      d[e] = sum;
    }
  }
}

template <int HALF>
inline void wgmma_multiply(int (&d)[HALF], const uint32_t* a, uint32_t tokens, int step, bool first) {
  const WgmmaOperands operands = {a, tokens, step, first};
  emulator::collective("wgmma", 0xffffffffu, &operands, d, wgmma_lanes<2 * HALF>);
}

inline void multiply_bfloat16_lanes(const emulator::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) emulator::fail("multiply_bfloat16: lanes %08x only", lanes.present);
  auto value = [](uint32_t word, int half) {
    const uint32_t bits = half == 0 ? word << 16 : word & 0xffff0000u;
    float result;
    memcpy(&result, &bits, 4);
    return result;
  };
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; lane++) {
    const auto& operands = *static_cast<const emulator::MultiplyOperands*>(lanes.in[lane]);
    const int i = lane / 4, q = lane % 4;
    for (int e = 0; e < 2; e++) {
      for (int r = 0; r < 4; r++) a[i + 8 * (r % 2)][8 * (r / 2) + 2 * q + e] = value(operands.a[r], e);
      for (int r = 0; r < 2; r++) b[i][8 * r + 2 * q + e] = value(operands.b[r], e);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    float* d = static_cast<float*>(lanes.out[lane]);
    for (int e = 0; e < 4; e++) {
      for (int k = 0; k < 16; k++) d[e] += a[lane / 4 + 8 * (e / 2)][k] * b[2 * (lane % 4) + e % 2][k];
    }
  }
}

inline void multiply_bfloat16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  const emulator::MultiplyOperands operands = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::collective("multiply_bfloat16", 0xffffffffu, &operands, d, multiply_bfloat16_lanes);
}

}  // namespace torchmix
