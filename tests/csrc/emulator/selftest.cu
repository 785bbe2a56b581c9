// Small kernels: some that work, and some with one mistake each, which the machine must report.
#include "cuda_runtime.h"
#include "tensor_cores.h"

using emulator::Scope;

namespace {

struct Problem {
  const uint8_t* source;  // 512 bytes
  int* result;            // 64 numbers
};

uint8_t* memory() { return static_cast<uint8_t*>(emulator::dynamic_shared()); }
uint32_t address(size_t byte) { return emulator::shared_address(memory() + byte); }

void start_barrier(uint32_t count) {
  if (threadIdx.x == 0) emulator::barrier_init(address(0), count);
  __syncthreads();
}

void expect_and_arrive(uint32_t bytes) {
  emulator::barrier_expect(address(0), bytes, Scope::kOwn);
  emulator::barrier_arrive(address(0), Scope::kOwn);
}

void copy_works(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) {
    expect_and_arrive(256);
    emulator::copy_bytes(address(128), p.source, 256, address(0));
  }
  emulator::barrier_wait(address(0), 0);
  p.result[threadIdx.x] = memory()[128 + threadIdx.x];
}

// Not waiting gives NaN bytes, by some seeds.
void copy_without_wait(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) {
    expect_and_arrive(256);
    emulator::copy_bytes(address(128), p.source, 256, address(0));
  }
  __syncthreads();
  p.result[threadIdx.x] = memory()[128 + threadIdx.x];
  emulator::barrier_wait(address(0), 0);
}

void copy_of_wrong_length(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) {
    expect_and_arrive(256);
    emulator::copy_bytes(address(128), p.source, 240, address(0));
  }
  emulator::barrier_wait(address(0), 0);
}

void copy_to_odd_place(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) emulator::copy_bytes(address(136), p.source, 256, address(0));
}

void copy_from_beyond(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) emulator::copy_bytes(address(128), p.source + 384, 256, address(0));
}

void copy_never_waited_for(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) {
    expect_and_arrive(256);
    emulator::copy_bytes(address(128), p.source, 256, address(0));
    emulator::copy_bytes(address(384), p.source, 256, address(0));
  }
}

void arrival_too_many(Problem) {
  if (threadIdx.x == 0) emulator::barrier_init(address(0), 2);
  __syncthreads();
  emulator::barrier_wait(address(0), 1);
  emulator::barrier_arrive(address(0), Scope::kOwn, 3);
}

void barrier_missing(Problem) { emulator::barrier_wait(address(8), 0); }

void barrier_written_over(Problem) {
  start_barrier(1);
  memory()[3] = 0;
  __syncthreads();
  emulator::barrier_wait(address(0), 1);
}

void half_of_a_block_waits(Problem) {
  if (threadIdx.x < 32) emulator::block_barrier(3, 64);
}

void lanes_part(Problem p) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    p.result[threadIdx.x] = __reduce_add_sync(0xffffffffu, 1);
  }
}

void read_beyond_shared(Problem p) { p.result[threadIdx.x] = memory()[4096 + threadIdx.x]; }
void read_beyond_global(Problem p) { p.result[threadIdx.x] = p.source[512 + threadIdx.x]; }
void write_constant(Problem p) { const_cast<uint8_t*>(p.source)[threadIdx.x] = 1; }
void read_misaligned(Problem p) {
  p.result[threadIdx.x] = static_cast<int>(reinterpret_cast<const uint4*>(p.source + 8)->x);
}
void not_initialized(Problem p) { p.result[threadIdx.x] = memory()[threadIdx.x]; }

// Sums of all blocks by all blocks, through the memory of the others.
void cluster_works(Problem p) {
  __shared__ int own;
  if (threadIdx.x == 0) own = 1 << emulator::cluster_rank();
  emulator::cluster_arrive();
  emulator::cluster_wait();
  int sum = 0;
  for (unsigned rank = 0; rank < emulator::cluster_size(); rank++) {
    const uint32_t there = emulator::map_address(emulator::shared_address(&own), rank);
    sum += *reinterpret_cast<int*>(emulator::shared_pointer(there, 4, 4, Scope::kCluster, "load"));
  }
  p.result[threadIdx.x] = sum;
  emulator::cluster_arrive();
  emulator::cluster_wait();
}

// A block may end before another one reads its memory, by some seeds.
void cluster_leaves_early(Problem p) {
  *reinterpret_cast<int*>(memory()) = 7;
  emulator::cluster_arrive();
  emulator::cluster_wait();
  const uint32_t there = emulator::map_address(address(0), emulator::cluster_rank() ^ 1);
  p.result[threadIdx.x] = *reinterpret_cast<int*>(emulator::shared_pointer(there, 4, 4, Scope::kCluster, "load"));
}

void cluster_waits_alone(Problem) {
  emulator::cluster_arrive();
  if (emulator::cluster_rank() == 0) {
    emulator::cluster_wait();
    emulator::cluster_arrive();
    emulator::cluster_wait();
  } else {
    start_barrier(1);
    emulator::barrier_wait(address(0), 0);
  }
}

// Each block sends a number to the one before it, and gets a multicast of block 0.
void pushes_work(Problem p) {
  start_barrier(1);
  if (threadIdx.x == 0) expect_and_arrive(4 + 16);
  emulator::cluster_arrive();
  emulator::cluster_wait();
  const uint32_t rank = emulator::cluster_rank(), blocks = emulator::cluster_size();
  if (threadIdx.x == 0) {
    const int value = static_cast<int>(100 + rank);
    const uint32_t other = (rank + 1) % blocks;
    emulator::store_async(emulator::map_address(address(64), other), &value, 4,
                          emulator::map_address(address(0), other));
    if (rank == 0) emulator::copy_bytes_multicast(address(128), p.source, 16, address(0), (1u << blocks) - 1);
  }
  emulator::barrier_wait(address(0), 0);
  if (rank == 0) p.result[threadIdx.x] = *reinterpret_cast<int*>(memory() + 64) + memory()[128 + threadIdx.x % 16];
  emulator::cluster_arrive();
  emulator::cluster_wait();
}

// wgmma of one warp against mma: two steps of 32 inputs, two tiles of 8 columns; the result is the number of differences.
void group_multiply_works(Problem p) {
  for (unsigned i = threadIdx.x; i < 1024; i += blockDim.x) memory()[i] = static_cast<uint8_t>(i * 7 + i / 32);
  __syncthreads();
  uint32_t a[2][4];
  for (int s = 0; s < 2; s++) {
    for (int r = 0; r < 4; r++) a[s][r] = 0x01030507u * (threadIdx.x + 3) + static_cast<uint32_t>(5 * s + r);
  }
  // no swizzle: 8 columns x 16 inputs are 128 bytes; the next inputs 128 bytes on, the next columns 512
  int wide[8] = {1, 2, 3, 4, 5, 6, 7, 8}, narrow[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
  for (uint32_t s = 0; s < 2; s++) {
    const uint64_t start = (address(256 * s) & 0x3ffff) >> 4;
    emulator::group_multiply<true, 2>(wide, a[s], start | 8ull << 16 | 32ull << 32, true);
  }
  emulator::group_commit();
  emulator::group_wait<0>();
  for (uint32_t s = 0; s < 2; s++) {
    for (uint32_t t = 0; t < 2; t++) {
      emulator::MultiplyOperands operands = {{a[s][0], a[s][1], a[s][2], a[s][3]}, {}};
      for (uint32_t h = 0; h < 2; h++) {
        const unsigned lane = threadIdx.x % 32;
        memcpy(&operands.b[h], memory() + 256 * s + 512 * t + 128 * h + 16 * (lane / 4) + 4 * (lane % 4), 4);
      }
      emulator::collective("mma", 0xffffffffu, &operands, narrow[t], emulator::multiply_lanes<true>);
    }
  }
  int differences = 0;
  for (int i = 0; i < 8; i++) differences += wide[i] != narrow[i / 4][i % 4];
  p.result[threadIdx.x] = differences;
}

// Sums that are read before they are waited for.
void group_multiply_without_wait(Problem p) {
  memory()[threadIdx.x] = 0;
  for (unsigned i = threadIdx.x; i < 1024; i += blockDim.x) memory()[i] = 0;
  __syncthreads();
  const uint32_t a[4] = {1, 1, 1, 1};
  int d[4] = {0, 0, 0, 0};
  emulator::group_multiply<false, 1>(d, a, (address(0) & 0x3ffff) >> 4 | 8ull << 16 | 32ull << 32, true);
  emulator::group_commit();
  p.result[threadIdx.x] = d[0];
  emulator::group_wait<0>();
}

struct Case {
  const char* name;
  void (*kernel)(Problem);
  unsigned cluster;
};
constexpr Case kCases[] = {
#define TORCHMIX_CASE(name, cluster) {#name, name, cluster}
    TORCHMIX_CASE(copy_works, 1),
    TORCHMIX_CASE(copy_without_wait, 1),
    TORCHMIX_CASE(copy_of_wrong_length, 1),
    TORCHMIX_CASE(copy_to_odd_place, 1),
    TORCHMIX_CASE(copy_from_beyond, 1),
    TORCHMIX_CASE(copy_never_waited_for, 1),
    TORCHMIX_CASE(arrival_too_many, 1),
    TORCHMIX_CASE(barrier_missing, 1),
    TORCHMIX_CASE(barrier_written_over, 1),
    TORCHMIX_CASE(half_of_a_block_waits, 1),
    TORCHMIX_CASE(lanes_part, 1),
    TORCHMIX_CASE(read_beyond_shared, 1),
    TORCHMIX_CASE(read_beyond_global, 1),
    TORCHMIX_CASE(write_constant, 1),
    TORCHMIX_CASE(read_misaligned, 1),
    TORCHMIX_CASE(not_initialized, 1),
    TORCHMIX_CASE(cluster_works, 4),
    TORCHMIX_CASE(cluster_leaves_early, 2),
    TORCHMIX_CASE(cluster_waits_alone, 2),
    TORCHMIX_CASE(pushes_work, 4),
    TORCHMIX_CASE(group_multiply_works, 1),
    TORCHMIX_CASE(group_multiply_without_wait, 1),
#undef TORCHMIX_CASE
};

}  // namespace

// 64 threads with 4096 bytes of shared memory; result has 64 numbers. -1: no kernel of this name.
extern "C" int emulated_selftest(const char* name, uint64_t seed, const uint8_t* source, int* result) {
  for (const Case& one : kCases) {
    if (strcmp(one.name, name) != 0) continue;
    emulator::set_seed(seed);
    const emulator::GlobalBuffer in("source", source, 512);
    emulator::GlobalBuffer out("result", result, 256);
    const Problem problem = {static_cast<const uint8_t*>(in.get()), static_cast<int*>(out.get())};
    return emulator::launch(one.kernel, {dim3(one.cluster), dim3(64), 4096, one.cluster}, problem);
  }
  return -1;
}
