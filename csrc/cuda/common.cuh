// Small device functions that the kernels share: barriers in shared memory, asynchronous copies, tensor cores.
//
// Devices before sm_90 have no bulk copies: there a warp copies 16 bytes per thread with cp.async.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace torchmix {

constexpr int kGroup = 128;        // inputs per scale
constexpr int kTileRows = 64;      // rows of a tile
constexpr int kBlockParams = 256;  // bytes of a block after its codes: 32 pairs of scales, 32 pairs of zero points and sums

// Bytes of one group of inputs of a tile.
__device__ __forceinline__ constexpr int block_bytes(int bits) { return 1024 * bits + kBlockParams; }

enum class Float : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float load_float(const void* data, int64_t index, Float type) {
  if (type == Float::kFloat32) return static_cast<const float*>(data)[index];
  if (type == Float::kFloat16) return __half2float(static_cast<const __half*>(data)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
}

__device__ __forceinline__ void assign(float* to, float value) { *to = value; }
__device__ __forceinline__ void assign(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void assign(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

__device__ __forceinline__ void store_float(void* data, int64_t index, Float type, float value) {
  if (type == Float::kFloat32) {
    assign(static_cast<float*>(data) + index, value);
  } else if (type == Float::kFloat16) {
    assign(static_cast<__half*>(data) + index, value);
  } else {
    assign(static_cast<__nv_bfloat16*>(data) + index, value);
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

// Makes initialized barriers visible to the copy engine.
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

// Brings memory into the L2 cache; a multiple of 16 bytes.
__device__ __forceinline__ void prefetch_bulk(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// --- clusters of two blocks, on sm_90 --------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// A barrier of all threads of the cluster. Ordinary shared memory is not ordered by it: that would flush all that this
// block has written, to device memory too.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
#endif
}

// Arrives at the barrier in the same place of another block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#endif
}

// copy_bulk to the same place of both blocks of a cluster; each one's barrier counts the bytes.
__device__ __forceinline__ void copy_bulk_to_both(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(3))
      : "memory");
#endif
}

// --- between blocks, through device memory ---------------------------------------------------------------------------

// Tells a block that waits for it that everything which the threads before this one's last barrier have written is there.
__device__ __forceinline__ void signal_ready(uint64_t* flag, uint64_t signal) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(signal) : "memory");
}

// Waits for the signal, and clears it for the next launch that has this memory.
__device__ __forceinline__ void await_ready(uint64_t* flag, uint64_t signal) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != signal);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(uint64_t{0}) : "memory");
}

// What another block has written: not from this multiprocessor's cache.
__device__ __forceinline__ float load_fresh(const float* from) { return __ldcg(from); }

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

// Two bfloat16, the first one in the low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
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

// Has these registers computed here. The compiler would do it after a wait for the tensor cores, which leave the time.
template <int N>
__device__ __forceinline__ void stay_here(uint32_t (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(values[i]));
}

// A barrier of some warps of a block (the number of threads is a multiple of 32).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace torchmix

#endif  // TORCHMIX_EMULATE

#include "wgmma.cuh"
