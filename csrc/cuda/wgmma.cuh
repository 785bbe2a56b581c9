// wgmma of sm_90a: a warpgroup's 64 rows in registers times tokens in shared memory (common.cuh includes it).
//
// A thread's sums d are those of rows i and i + 8 of its warp's 16, for columns 2q, 2q + 1 of every eight tokens.
#pragma once

namespace torchmix {

// Descriptor of 8-bit codes in shared memory: rows (tokens) of 128 bytes, 8 of them to a swizzled atom of 1024 bytes; 32
// inputs further on it is larger by 2.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// Descriptor of blocks of 8 tokens by 16 bytes: `inputs` bytes to the next block of inputs, `tokens` to that of tokens.
__device__ __forceinline__ uint64_t plain_descriptor(uint32_t address, uint32_t inputs, uint32_t tokens) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(inputs >> 4) << 16 |
         static_cast<uint64_t>(tokens >> 4) << 32;
}

}  // namespace torchmix

#ifndef TORCHMIX_EMULATE

namespace torchmix {

#if __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Lists of registers in the text of an instruction, and of the variables for them.
#define TORCHMIX_R4 "%0,%1,%2,%3"
#define TORCHMIX_R8 TORCHMIX_R4 ",%4,%5,%6,%7"
#define TORCHMIX_R16 TORCHMIX_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define TORCHMIX_R32 TORCHMIX_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TORCHMIX_R64                                                                                              \
  TORCHMIX_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
               "%56,%57,%58,%59,%60,%61,%62,%63"
#define TORCHMIX_D4(kind, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define TORCHMIX_D8(kind, i) TORCHMIX_D4(kind, i), TORCHMIX_D4(kind, i + 4)
#define TORCHMIX_D16(kind, i) TORCHMIX_D8(kind, i), TORCHMIX_D8(kind, i + 8)
#define TORCHMIX_D32(kind, i) TORCHMIX_D16(kind, i), TORCHMIX_D16(kind, i + 16)
#define TORCHMIX_D64(kind, i) TORCHMIX_D32(kind, i), TORCHMIX_D32(kind, i + 32)

// d (64 rows x N tokens, N / 2 registers) = a (64 x 32, unsigned) b (32 x N, unsigned), plus d unless `first`; and
// d += a (64 x 16) b (16 x N) in bfloat16. The numbers are those of the operands after d.
#define TORCHMIX_WGMMA(R, N, A0, A1, A2, A3, B, FLAG)                                                                 \
  __device__ __forceinline__ void wgmma_multiply(int(&d)[R], const uint32_t* a, uint64_t b, bool first) {             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" FLAG ", 0;\nwgmma.mma_async.sync.aligned.m64n" N                \
                 "k32.s32.u8.u8 {" TORCHMIX_R##R "}, {%" A0 ",%" A1 ",%" A2 ",%" A3 "}, %" B ", p;\n}\n"              \
                 : TORCHMIX_D##R("+r", 0)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(first ? 0 : 1));                           \
  }                                                                                                                   \
  __device__ __forceinline__ void wgmma_multiply(float(&d)[R], const uint32_t* a, uint64_t b) {                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" TORCHMIX_R##R "}, {%" A0 ",%" A1 ",%" A2 \
                 ",%" A3 "}, %" B ", 1, 1, 1, 0;\n"                                                                   \
                 : TORCHMIX_D##R("+f", 0)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
  }

TORCHMIX_WGMMA(4, "8", "4", "5", "6", "7", "8", "9")
TORCHMIX_WGMMA(8, "16", "8", "9", "10", "11", "12", "13")
TORCHMIX_WGMMA(16, "32", "16", "17", "18", "19", "20", "21")
TORCHMIX_WGMMA(32, "64", "32", "33", "34", "35", "36", "37")
TORCHMIX_WGMMA(64, "128", "64", "65", "66", "67", "68", "69")

#else

__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit() {}
__device__ __forceinline__ void wgmma_wait() {}
template <int R>
__device__ __forceinline__ void wgmma_multiply(int (&)[R], const uint32_t*, uint64_t, bool) {}
template <int R>
__device__ __forceinline__ void wgmma_multiply(float (&)[R], const uint32_t*, uint64_t) {}

#endif

}  // namespace torchmix

#endif  // TORCHMIX_EMULATE
