// The functions of common.cuh that are PTX on a GPU. Included there, between two halves of namespace torchmix.
#pragma once

#include "tensor_cores.h"

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

inline void prefetch_bulk(const void*, uint32_t bytes) {
  if (bytes % 16 != 0) emulator::fail("prefetch of %u bytes", bytes);
}

// --- clusters of two blocks ------------------------------------------------------------------------------------------

inline int cluster_rank() { return kHopper ? static_cast<int>(emulator::cluster_rank()) : 0; }
inline void cluster_barrier() {
  if constexpr (kHopper) {
    emulator::cluster_arrive();
    emulator::cluster_wait();
  }
}
inline void barrier_arrive_at(uint32_t barrier, int rank) {
  emulator::barrier_arrive(emulator::map_address(barrier, static_cast<uint32_t>(rank)), Scope::kCluster);
}
inline void copy_bulk_to_both(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  emulator::copy_bytes_multicast(to, from, bytes, barrier, 3);
}

// --- between blocks, through device memory: clusters run one after another, in order ----------------------------------

inline void signal_ready(uint64_t* flag, uint64_t signal) { *flag = signal; }
inline void await_ready(uint64_t* flag, uint64_t signal) {
  if (*flag != signal) emulator::fail("a block waits for one that comes after it");
  *flag = 0;
}
inline float load_fresh(const float* from) { return *from; }

// --- launches that overlap: here one kernel runs after another --------------------------------------------------------

inline void start_next() {}
inline void wait_for_previous() {}

// --- tensor cores --------------------------------------------------------------------------------------------------

template <bool kSignedWeight>
inline void multiply(int (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  const emulator::MultiplyOperands operands = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::collective(kSignedWeight ? "multiply signed" : "multiply", 0xffffffffu, &operands, d,
                       emulator::multiply_lanes<kSignedWeight>);
}

inline uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat16 parts[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  uint32_t both;
  memcpy(&both, parts, 4);
  return both;
}

template <int N>
inline void stay_here(uint32_t (&)[N]) {}

// A barrier of some warps of a block.
inline void named_barrier(int id, int threads) { emulator::block_barrier(id, threads); }

}  // namespace torchmix

#include "emulated_wgmma.h"
