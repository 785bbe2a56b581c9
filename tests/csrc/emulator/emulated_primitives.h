// The functions of common.cuh that are PTX on a GPU. Included there, between two halves of namespace torchmix.
#pragma once

namespace torchmix {

using emulator::Scope;

constexpr bool kHopper = __CUDA_ARCH__ >= 900;

// --- barriers in shared memory -------------------------------------------------------------------------------------

inline void barrier_init(uint32_t barrier, uint32_t count) { emulator::barrier_init(barrier, count); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, Scope::kOwn); }
inline void barrier_arrive(uint32_t barrier, uint32_t count) {
  emulator::barrier_arrive(barrier, Scope::kOwn, count);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  emulator::barrier_expect(barrier, bytes, Scope::kOwn);
  emulator::barrier_arrive(barrier, Scope::kOwn);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }

// --- copies from global to shared memory -----------------------------------------------------------------------------

constexpr uint32_t kCopyArrivals = kHopper ? 1 : 32;

inline void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, int lane) {
  if constexpr (kHopper) {
    if (lane == 0) {
      emulator::barrier_expect(barrier, bytes, Scope::kOwn);
      emulator::barrier_arrive(barrier, Scope::kOwn);
      emulator::copy_bytes(to, from, bytes, barrier);
    }
  } else {
    for (uint32_t at = 16 * static_cast<uint32_t>(lane); at < bytes; at += 16 * 32) {
      emulator::copy_of_thread(to + at, static_cast<const uint8_t*>(from) + at, 16);
    }
    emulator::arrive_after_copies(barrier);
  }
}

// --- clusters ------------------------------------------------------------------------------------------------------

inline int cluster_rank() { return kHopper ? static_cast<int>(emulator::cluster_rank()) : 0; }
inline int cluster_size() { return kHopper ? static_cast<int>(emulator::cluster_size()) : 1; }
inline void cluster_arrive() {
  if constexpr (kHopper) emulator::cluster_arrive();
}
inline void cluster_wait() {
  if constexpr (kHopper) emulator::cluster_wait();
}
inline uint32_t cluster_map(uint32_t address, int rank) {
  return kHopper ? emulator::map_address(address, static_cast<uint32_t>(rank)) : address;
}
inline void cluster_push(uint32_t mapped_address, float value, uint32_t mapped_barrier) {
  emulator::store_async(mapped_address, &value, sizeof value, mapped_barrier);
}

// --- launches that overlap: here one kernel runs after another --------------------------------------------------------

inline void start_next() {}
inline void wait_for_previous() {}

// --- tensor cores --------------------------------------------------------------------------------------------------

struct MultiplyOperands {
  uint32_t a[4], b[2];
};

// mma.m16n8k32: a is 16 x 32, b 32 x 8; lane 4 i + q has rows i, i + 8 of a, column i of b, columns 2 q, 2 q + 1 of d.
template <bool kSignedWeight>
void multiply_lanes(const emulator::Lanes& lanes) {
  if (lanes.present != 0xffffffffu) emulator::fail("multiply: lanes %08x only", lanes.present);
  int a[16][32], b[8][32];
  for (int lane = 0; lane < 32; lane++) {
    const auto& operands = *static_cast<const MultiplyOperands*>(lanes.in[lane]);
    const int i = lane / 4, q = lane % 4;
    for (int m = 0; m < 4; m++) {
      for (int r = 0; r < 4; r++) {
        const uint32_t byte = operands.a[r] >> 8 * m & 255;
        a[i + 8 * (r % 2)][16 * (r / 2) + 4 * q + m] =
            kSignedWeight ? static_cast<int8_t>(byte) : static_cast<int>(byte);
      }
      for (int r = 0; r < 2; r++) b[i][16 * r + 4 * q + m] = static_cast<int8_t>(operands.b[r] >> 8 * m);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    int* d = static_cast<int*>(lanes.out[lane]);
    for (int r = 0; r < 4; r++) {
      const int *left = a[lane / 4 + 8 * (r / 2)], *right = b[2 * (lane % 4) + r % 2];
      for (int k = 0; k < 32; k++) d[r] += left[k] * right[k];
    }
  }
}

template <bool kSignedWeight>
inline void multiply(int (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  const MultiplyOperands operands = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::collective(kSignedWeight ? "multiply signed" : "multiply", 0xffffffffu, &operands, d,
                       multiply_lanes<kSignedWeight>);
}

inline void named_barrier(int id, int threads) { emulator::block_barrier(id, threads); }

}  // namespace torchmix

#include "emulated_wgmma.h"
