// Small device functions that the kernels share: barriers in shared memory, asynchronous copies, clusters.
//
// Devices before sm_90 have no bulk copies and no clusters: there a warp copies 16 bytes per thread with cp.async, and a
// cluster is one block.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace torchmix {

constexpr int kGroup = 128;     // inputs per scale
constexpr int kTileRows = 32;     // rows of a tile
constexpr int kParamBytes = 128;  // of a block: 32 bfloat16 scales, 32 uint8 zero points, 32 bytes of 0

enum class Float : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float load_float(const void* data, int64_t index, Float type) {
  if (type == Float::kFloat32) return static_cast<const float*>(data)[index];
  if (type == Float::kFloat16) return __half2float(static_cast<const __half*>(data)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
}

__device__ __forceinline__ void store_float(void* data, int64_t index, Float type, float value) {
  if (type == Float::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else if (type == Float::kFloat16) {
    static_cast<__half*>(data)[index] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
  }
}

}  // namespace torchmix

#ifdef TORCHMIX_EMULATE
#include "emulated_primitives.h"  // the same functions on a CPU, for tests (tests/csrc/emulator)
#else

namespace torchmix {

// --- barriers in shared memory -------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialized barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __threadfence_block();
#endif
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier), "r"(count)
               : "memory");
#else
  for (uint32_t i = 0; i < count; i++) barrier_arrive(barrier);
#endif
}

// Arrives, and makes the phase wait for so many more bytes that others send.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  barrier_arrive(barrier);
#endif
}

// Waits until the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
#else
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
#endif
}

// --- copies from global to shared memory, 16-byte aligned, a multiple of 16 bytes, by one warp ----------------------

// Arrivals that a barrier needs for one copy.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t kCopyArrivals = 32;
#else
constexpr uint32_t kCopyArrivals = 1;
#endif

__device__ __forceinline__ void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
  }
#else
  for (uint32_t at = 16 * lane; at < bytes; at += 16 * 32) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at),
                 "l"(static_cast<const uint8_t*>(from) + at)
                 : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// A bulk copy whose bytes the barrier already expects; by one thread, sm_90 only.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

// --- clusters ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return static_cast<int>(size);
}

// Both halves of a barrier of all threads of the cluster, for barriers in shared memory that others are about to use.
// Ordinary shared memory is not ordered by it: that would flush everything this block has written, to device memory too.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Address of the same place in another block of the cluster.
__device__ __forceinline__ uint32_t cluster_map(uint32_t address, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
#else
  return address;
#endif
}

// Stores a value in another block, whose barrier counts its four bytes; who waits there sees it.
__device__ __forceinline__ void cluster_push(uint32_t mapped_address, float value, uint32_t mapped_barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(mapped_address),
               "f"(value), "r"(mapped_barrier)
               : "memory");
#endif
}

// --- launches that overlap -----------------------------------------------------------------------------------------

// Lets the next kernel of the stream start its blocks; it sees nothing of this one before its own wait_for_previous.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one is done and its results can be read; nothing may be read or written earlier.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- tensor cores --------------------------------------------------------------------------------------------------

// d += a b of one 16 x 8 tile over 32 inputs: a unsigned or signed codes of the weight, b signed codes of activations.
template <bool kSignedWeight>
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  if constexpr (kSignedWeight) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d += a b of one 16 x 8 tile over 16 groups, bfloat16 with float32 sums.
__device__ __forceinline__ void multiply_bfloat16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Moves registers of a block between its warpgroups: producers give away, consumers take.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT>
__device__ __forceinline__ void more_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// A barrier of some warps of a block (the number of threads is a multiple of 32).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace torchmix

#include "wgmma.cuh"

#endif  // TORCHMIX_EMULATE
